"""Gemma 4, Llama 4, Molmo 2, Perception LM, OCR models and others: units, variants, refusals, beams."""

from __future__ import annotations

import pytest
import torch
from reference import generate, gradients
from transformers import Gemma3nConfig
from transformers.utils import is_timm_available

from orchestrator.compression import attach
from orchestrator.compression.families import family_of
from orchestrator.compression.testing import check_compressor
from orchestrator.compression.testing.families import GEMMA_4_CAUSAL, MOLMO2_VIDEO, PERCEPTION_LM, TINY
from orchestrator.compression.testing.kit import bench_of
from orchestrator.compression.testing.tiny import IMAGE
from orchestrator.errors import UsageError
from orchestrator.models.parts import PROJECTOR, VISION_TOWER, part_of
from orchestrator.spec.components import Grid

NAMES = (
    "gemma4",
    "llama4",
    "molmo2",
    "got_ocr2",
    "pp_chart2table",
    "step3p7",
    "aria",
    "lighton_ocr",
    "ernie4_5_vl_moe",
)
VARIANTS = {"gemma4": GEMMA_4_CAUSAL, "molmo2": MOLMO2_VIDEO, "perception_lm": PERCEPTION_LM}
MIXED = [[3, "image", 7], [9], [2, "small", "image", 2, "image", 6]]


def built(tiny):
    return tiny.build(tiny.attentions[-1], 0)


def pool(layer, stride=2):
    return [{"kind": "average_pool", "layer": layer, "stride": stride}]


@pytest.fixture
def variant(monkeypatch):
    """A further tiny model of a type, where the kit looks for it."""

    def use(name):
        bench_of.cache_clear()
        monkeypatch.setitem(TINY, name, VARIANTS[name])
        return VARIANTS[name]

    yield use
    bench_of.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_units_are_those_stated_by_hand(name):
    tiny = TINY[name]
    rows = [*MIXED, [4, "video", 2, "image", "video", 5]] if "video" in tiny.units else MIXED
    batch, family = tiny.batch(rows, "left", 0, 3), family_of(built(tiny))
    stated = [grid for row in rows for part in row if isinstance(part, str) for grid in tiny.units[part]]
    placeholders = int(family.visual_BN(batch["input_ids"]).sum())
    assert family.grids(batch, placeholders) == stated
    assert family.num_visual_tokens(batch) == placeholders == sum(grid.tokens for grid in stated)


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_images_reaches_tower_and_projector(name):
    tiny = TINY[name]
    model = built(tiny)
    attach(model, pool(1))
    parts = (VISION_TOWER, PROJECTOR)
    images = tiny.batch([[3, "image", 7]], "right", 5, 3)
    seeing = {one for one in gradients(model, model(**images).loss) if part_of(one) in parts}
    text = tiny.batch([[5], [8]], "right", 5, 3)
    idle = gradients(model, model(**text).loss + family_of(model).idle_features().sum())
    assert seeing and seeing <= set(idle)


@pytest.mark.parametrize("name", ["gemma4", "molmo2"])
def test_variants_hold_what_the_kit_asks(name, variant):
    variant(name)
    for kind in ("average_pool", "fastv", "q_former"):
        assert check_compressor({"kind": kind}, [name]).proven == (name,)


def test_blocks_of_gemma_4_are_in_its_sliding_layers_alone():
    """A text-only mask is causal in both; an image's tokens see what follows them where the window is."""
    seen = []
    model = built(TINY["gemma4"]).eval()
    attach(model, pool(1))
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model.model.language_model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**TINY["gemma4"].batch([[3, "image", 7]], "right", 0, 3))
    sliding, full = (mask[0, 0] for mask in seen)
    assert bool(sliding.triu(1).any()) and not bool(full.triu(1).any())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input 8"),
        ({"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}, "the last 2 layers"),
        ({"use_bidirectional_attention": "all"}, "its text sees itself both ways"),
    ],
)
def test_layers_that_ask_for_the_tokens_that_came_in_are_refused(values, reason):
    config = built(TINY["gemma4"]).config
    for name, value in values.items():
        setattr(config.text_config, name, value)
    with torch.device("meta"), pytest.raises(UsageError, match=reason):
        attach(type(built(TINY["gemma4"]))(config), [])


def test_a_view_of_step_3_7_is_a_unit_of_its_own():
    tiny = TINY["step3p7"]
    family, batch = family_of(built(tiny)), tiny.batch([["image", "small"]], "left", 0, 0)
    local, whole = Grid(2, 2), Grid(3, 3)
    assert family.grids(batch, 26) == [local, local, whole, whole]
    assert family.grids(batch | {"num_local_patches": torch.tensor([2, 0])}, 26) == [local, local, whole, whole]


def test_visual_tokens_of_ernie_stay_with_their_experts():
    tiny = TINY["ernie4_5_vl_moe"]
    model, seen = built(tiny), []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["moe_mm_token_type_ids"]), with_kwargs=True
        )
    attachment = attach(model, pool(2, 4))
    batch = tiny.batch(MIXED, "left", 0, 3)
    model(**batch)
    types = batch["moe_mm_token_type_ids"]
    borders = int(types.sum()) - int((batch["input_ids"] == IMAGE).sum())
    assert [int((one > 0).sum()) for one in seen] == [borders + tokens for tokens in attachment.visual_tokens_per_layer]
    assert seen[0].equal(types) and seen[2].shape[1] < types.shape[1]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("granite4_vision", 2),
        ("idefics3", "projector"),
        ("glm4v", 1),
        ("video_llama_3", 1),
        ("lfm2_vl", 1),
        ("gemma4", 1),
        ("llama4", 1),
        ("aria", 1),
    ],
)
def test_beams_begin_as_the_row_alone_does(name, layer):
    """Images of a row are repeated as its tokens are: all beams of a row see the same images, in order."""
    tiny = TINY[name]
    model = built(tiny).eval()
    attach(model, pool(layer))
    kinds = [kind for kind in tiny.units if kind != "video"]
    batch = tiny.batch([[3, kinds[0], kinds[-1], 7], [2, kinds[-1], 4], [9]], "left", 3, 0)
    del batch["labels"]
    cached, again = (
        model.generate(
            **batch,
            max_new_tokens=2,
            min_new_tokens=2,
            num_beams=2,
            do_sample=False,
            suppress_tokens=[60, 61, 62, 63],
            return_dict_in_generate=True,
            output_scores=True,
            use_cache=use,
        )
        for use in (True, False)
    )
    with torch.no_grad():
        alone = model(**batch).logits[:, -1].log_softmax(-1)[:, :60]
    for beam in (0, 1):
        assert torch.allclose(cached.scores[0][beam::2, :60], alone, atol=1e-4)
    assert torch.equal(cached.sequences, again.sequences)


@pytest.mark.parametrize("name", ["molmo2", "step3p7"])
def test_beams_of_images_in_pieces_are_refused(name):
    tiny = TINY[name]
    model = built(tiny).eval()
    attach(model, pool(1))
    batch = tiny.batch([[3, "image", 7]], "left", 3, 0)
    del batch["labels"]
    with pytest.raises(UsageError, match="by neither image nor tile, so several beams"):
        generate(model, batch, 2, num_beams=2)


@pytest.mark.skipif(not is_timm_available(), reason="its tower needs timm, which is not installed")
def test_perception_lm_holds_what_the_kit_asks(variant):
    variant("perception_lm")
    for kind in ("average_pool", "fastv", "q_former", "registers", "evs"):
        assert check_compressor({"kind": kind}, ["perception_lm"]).proven == ("perception_lm",)


@pytest.mark.skipif(not is_timm_available(), reason="its tower needs timm, which is not installed")
def test_gemma_3n_is_refused_with_the_reason():
    from transformers import Gemma3nForConditionalGeneration

    with torch.device("meta"), pytest.raises(UsageError, match="hidden_size_per_layer_input 256"):
        attach(Gemma3nForConditionalGeneration(Gemma3nConfig()), [])
