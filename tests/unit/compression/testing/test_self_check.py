"""A type without an adapter proves itself before it is served: a family broken in any known way is refused."""

from __future__ import annotations

import json
import runpy

import pytest
import torch
from repository import MODELS
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Cohere2Config,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    GraniteConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

from orchestrator.compression import attach
from orchestrator.compression.families.generic import GenericFamily
from orchestrator.compression.forward import decoder, model
from orchestrator.compression.forward.cache import SegmentCache
from orchestrator.compression.shrink_config import shrunk_config
from orchestrator.compression.testing import self_check
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.tiny import IMAGE, TEXT_SIZES, VISION_SIZES, builder
from orchestrator.errors import UsageError
from orchestrator.plan.identity import cache_folder
from orchestrator.spec.components import Grid

REQUIRED = dict.fromkeys(self_check.REQUIRED, "proven")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def deepseek_vl(text):
    """Return a DeepSeek-VL, which has no adapter, with a text model of some type; 2 x 2 tokens per image."""
    vision = SiglipVisionConfig(**VISION_SIZES, image_size=32, patch_size=16)
    return builder(DeepseekVLForConditionalGeneration, vision, text, image_token_id=IMAGE)("sdpa", 0)


def granite():
    return deepseek_vl(GraniteConfig(**TEXT_SIZES, embedding_multiplier=12.0))


def cohere():
    return deepseek_vl(Cohere2Config(**TEXT_SIZES, sliding_window=6))


def of_type(model_type):
    config = shrunk_config(AutoConfig.for_model(model_type), 4)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")


def failed(built):
    """Return the required checks that do not hold, with what they found."""
    found = self_check.self_check(built)
    return {name: found[name] for name in self_check.REQUIRED if found[name] != "proven"}


def naive_slices(family, segment, flow, positions, mask, cache, options, *further):
    """A segment as slices of the layers alone: what the forward does to its input, and what it reads by a layer's
    number, is wrong there.
    """
    language_model = family.language_model
    view = object.__new__(type(language_model))
    view.__dict__.update(language_model.__dict__)
    view.__dict__["_modules"] = dict(language_model._modules)
    view._modules["layers"] = language_model.layers[segment.first : segment.last]
    if segment.last != len(language_model.layers):
        view._modules["norm"] = nn.Identity()
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return type(language_model).forward(view, inputs_embeds=flow.hidden_BND, **given, **options)


@pytest.mark.parametrize("build", [granite, cohere])
def test_a_family_that_holds_is_proven(build):
    assert failed(build()) == {}


@pytest.mark.parametrize("build", [granite, cohere])
def test_scaled_inputs_and_configuration_by_layer_in_naive_slices_are_refused(build, monkeypatch):
    monkeypatch.setattr(decoder, "run_layers", naive_slices)
    assert "loss against the plain model" in failed(build())["identity"]


def test_experts_whose_auxiliary_loss_is_dropped_are_refused(monkeypatch):
    built = of_type("qwen3_5_moe")
    assert failed(built) == {}
    monkeypatch.setattr(model, "_balance_weight", lambda family: 0.0)
    assert "no points: loss against the plain model" in failed(built)["identity"]


def test_linear_attention_without_its_state_is_refused(monkeypatch):
    for name in ("get_conv_state", "get_recurrent_state"):
        monkeypatch.setattr(SegmentCache, name, lambda *args, **kwargs: None)
    assert "with a KV cache against recomputing" in failed(of_type("qwen3_5"))["generation"]


@pytest.mark.parametrize(
    ("units", "said"),
    [
        (lambda grids: [(Grid(1, 1),) * sum(grid.tokens for unit in grids for grid in unit)], "stand in"),
        (lambda grids: [*grids[:-2], (Grid(1, grids[-2][0].tokens + grids[-1][0].tokens),)], "holds tokens of"),
    ],
    ids=["patches taken for images", "images mixed"],
)
def test_wrong_boundaries_are_refused(units, said, monkeypatch):
    right = GenericFamily._units

    def wrong(self, *args):
        found = right(self, *args)
        return units(found) if found else []

    monkeypatch.setattr(GenericFamily, "_units", wrong)
    assert said in failed(granite())["boundaries"]


def test_padding_that_is_seen_is_refused(monkeypatch):
    monkeypatch.setattr(decoder, "_mask", lambda flow, *_: torch.ones(flow.hidden_BND.shape[:2], dtype=torch.bool))
    assert "plain computation" in failed(granite())["reference"]


def test_frames_that_are_mixed_refuse_videos_alone(monkeypatch):
    built = of_type("hyperclovax_vision_v2")
    right = GenericFamily._units

    def mixed(self, inputs, kind, *args):
        found = right(self, inputs, kind, *args)
        return found if kind == "image" else [(Grid(1, sum(grid.tokens for grid in unit)),) for unit in found]

    assert self_check.self_check(built)["video"] == "proven"
    monkeypatch.setattr(GenericFamily, "_units", mixed)
    family = GenericFamily(built)
    self_check.check_family(family)
    video = family.token_ids[1]
    with pytest.raises(UsageError, match=r"holds videos, and they are not proven for its type: unit 0 of .* 0, 1, 2"):
        family.grids({"input_ids": torch.tensor([[5, video, video]])}, 2)


def test_attach_names_the_check_that_failed(monkeypatch):
    monkeypatch.setattr(decoder, "run_layers", naive_slices)
    with pytest.raises(UsageError, match=r"deepseek_vl.* has no adapter of its own, .* at identity: all tokens kept"):
        attach(granite(), [])


def test_what_a_decoder_takes_beside_its_tokens_is_refused_at_attach():
    with pytest.raises(UsageError, match=r"failed at identity: .*visual_pos_masks"):
        attach(of_type("cosmos3_omni"), [])


def test_a_config_is_checked_once(monkeypatch):
    attach(granite(), []).detach()
    (file,) = (cache_folder() / "self_checks").glob("deepseek_vl-*.json")
    monkeypatch.setattr(self_check, "self_check", lambda _: pytest.fail("checked again"))
    attach(granite(), []).detach()
    file.write_text("{")
    monkeypatch.setattr(self_check, "self_check", lambda _: REQUIRED | {"video": "it takes no videos"})
    attach(granite(), []).detach()
    assert json.loads(file.read_text())["identity"] == "proven"
    monkeypatch.setattr(self_check, "self_check", lambda _: REQUIRED | {"identity": "another", "video": ""})
    with pytest.raises(UsageError, match=r"identity: another"):
        attach(cohere(), [])


@pytest.fixture
def with_processor(tmp_path):
    """A DeepSeek-VL and the folder of its processor: images of 32 pixels, four tokens each."""
    base = runpy.run_path(str(MODELS / "make_tiny_llava.py"))["make_tokenizer"]()
    base.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    images = DeepseekVLImageProcessorPil(size={"height": 32, "width": 32})
    DeepseekVLProcessor(images, tokenizer, num_image_tokens=4).save_pretrained(tmp_path / "model")
    built = granite()
    built.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    built.config.save_pretrained(tmp_path / "model")
    built.config._name_or_path = str(tmp_path / "model")
    return GenericFamily(built)


def test_units_are_held_against_what_the_processor_makes(with_processor, monkeypatch):
    processed, seen = self_check._processed, []
    monkeypatch.setattr(self_check, "_processed", lambda *args: seen.append(processed(*args)) or seen[-1])
    assert list(self_check.against_processor(with_processor)) == []
    assert [int(with_processor.visual_BN(one["input_ids"]).sum()) for one in seen] == [12, 4, 4, 4]
    right = GenericFamily._units

    def mixed(self, inputs, kind, ids, places):
        found = right(self, inputs, kind, ids, places)
        return found if len(found) < 3 else [*found[:1], (Grid(1, 8),)]

    monkeypatch.setattr(GenericFamily, "_units", mixed)
    assert "together" in next(self_check.against_processor(with_processor))
    monkeypatch.setattr(self_check, "verdict", lambda _: REQUIRED | {"video": "proven"})
    with pytest.raises(UsageError, match=r"what its processor makes of images is not what .* together, and .* alone"):
        self_check.check_family(with_processor)
    monkeypatch.setattr(GenericFamily, "_units", lambda _, inputs, kind, *places: [(Grid(1, 16),)] * (kind == "image"))
    assert "have 12 placeholders, and units of 16 tokens" in next(self_check.against_processor(with_processor))


def test_without_a_processor_there_is_nothing_to_hold_against():
    assert list(self_check.against_processor(GenericFamily(granite()))) == []


def test_a_check_that_takes_too_long_is_an_error_and_is_not_kept(monkeypatch):
    monkeypatch.setattr(self_check, "_MOST_SECONDS", 0.0)
    with pytest.raises(UsageError, match=r"failed at identity: .*the check took too long"):
        attach(granite(), [])
    assert not list((cache_folder() / "self_checks").glob("*"))
    monkeypatch.undo()


def test_large_images_and_large_configs(monkeypatch):
    """Images are made small first; what stays large is an error."""
    vision = SiglipVisionConfig(**VISION_SIZES, image_size=1600, patch_size=16)
    text = GraniteConfig(**TEXT_SIZES)
    large = builder(DeepseekVLForConditionalGeneration, vision, text, image_token_id=IMAGE)("sdpa", 0)
    sizes = [config.vision_config.image_size for config in self_check.small_configs(large)]
    assert sizes == [256, 1600]
    monkeypatch.setattr(self_check, "_MOST_PARAMETERS", 1000)
    assert "its config stays large when shrunk" in failed(large)["identity"]


def test_images_of_several_sizes_in_one_run_have_no_known_ends():
    family = GenericFamily(granite())
    ids = torch.tensor([[5, *[IMAGE] * 8, 5]])
    sizes = torch.tensor([[32, 32], [32, 64]])
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(2, 3, 32, 64)}
    assert len(family.grids(inputs, 8)) == 2
    with pytest.raises(UsageError, match="do not say where one ends"):
        family.grids(inputs | {"image_sizes": sizes}, 8)


def test_families_with_an_adapter_are_not_checked(monkeypatch):
    monkeypatch.setattr(self_check, "check_family", lambda _: pytest.fail("checked"))
    for name in ("llava", "qwen3_vl_moe", "gemma3"):
        attach(TINY[name].build("sdpa", 0), [])


def test_experts_balance_over_the_tokens_that_ran():
    tiny = TINY["qwen3_vl_moe"]
    batch, built = tiny.batch([[3, "image", 7], [9], [2, "image", 2, "small", 5]], "left", 0, 3), tiny.build("sdpa", 0)
    coefficient = built.config.text_config.router_aux_loss_coef = 0.5
    plain, without = (float(built(**batch, output_router_logits=on).loss.detach()) for on in (True, False))
    attachment = attach(built, [])
    for points in ([], [{"kind": "average_pool", "layer": 2, "stride": 1}]):
        attachment.switch(points)
        assert abs(float(built(**batch, output_router_logits=True).loss.detach()) - plain) < 1e-5
    assert abs(plain - without) > 0.1
    attachment.switch([{"kind": "average_pool", "layer": 2, "stride": 3}])
    output = built(**batch, output_router_logits=True)
    tokens = [len(one) for one in output.router_logits]
    real = int(batch["attention_mask"].sum())
    visual = int(attachment.visual_BN(batch["input_ids"]).sum())
    ran = attachment.visual_tokens_per_layer
    assert tokens == [real, real, real - visual + ran[2], real - visual + ran[3]]
    chance = torch.cat([one.softmax(-1) for one in output.router_logits])
    chosen = nn.functional.one_hot(chance.topk(2).indices, 4).sum(1).float()
    expected = 4 * float((chosen.mean(0) * chance.mean(0)).sum().detach())
    assert abs(float(output.aux_loss.detach()) - expected) < 1e-5
    assert abs(float((output.loss - built(**batch).loss).detach()) - coefficient * expected) < 1e-5
