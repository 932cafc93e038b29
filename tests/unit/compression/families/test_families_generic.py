"""A model of no known family: served where its decoder is a list of layers, else refused with what is missing."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_gradients, generate, gradients, reference_loss
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Cohere2Config,
    DeepseekVLForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    OPTConfig,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from orchestrator.compression import attach
from orchestrator.compression.families import FAMILIES, family_of
from orchestrator.compression.families.generic import GenericFamily
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.tiny import IMAGE, SIZES, TEXT_SIZES, VISION_SIZES, batcher, builder
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid

MIXED = [[3, "image", 7], [9], [2, "image", "image", 2, "image", 6]]
HALF = [{"kind": "average_pool", "layer": 1, "stride": 2}]


def deepseek_vl(seed=0, attention="sdpa"):
    """A model without an adapter: a decoder with sliding layers, 2 x 2 tokens per image."""
    vision = SiglipVisionConfig(**VISION_SIZES, image_size=32, patch_size=16)
    text = Cohere2Config(**TEXT_SIZES, sliding_window=8)
    return builder(DeepseekVLForConditionalGeneration, vision, text, image_token_id=IMAGE)(attention, seed)


def deepseek_batch(padding="right", answer=3):
    def pixels(draw):
        draw.inputs["pixel_values"] = draw.pixels(4, 3, 32, 32)

    return batcher({"image": [IMAGE] * 4}, pixels)(MIXED, padding, 1, answer)


def test_a_model_of_no_known_family_keeps_its_numbers():
    model, batch = deepseek_vl(), deepseek_batch("left")
    assert "deepseek_vl" not in FAMILIES
    assert isinstance(family_of(model), GenericFamily)
    plain = float(model(**batch).loss.detach())
    attachment = attach(model, [])
    for layer in range(4):
        attachment.switch([{"kind": "average_pool", "layer": layer, "stride": 1}])
        assert abs(float(model(**batch).loss.detach()) - plain) < 1e-5


def test_a_model_of_no_known_family_equals_a_plain_loop():
    batch, units = deepseek_batch(), [[4], [], [4] * 3]  # two of the images in one run
    plain = deepseek_vl(attention="eager")
    expected = reference_loss(plain, batch, [{"kind": "average_pool", "layer": 2, "stride": 2}], units=units)
    wanted = gradients(plain, expected)
    model = deepseek_vl()
    attach(model, [{"kind": "average_pool", "layer": 2, "stride": 2}])
    loss = model(**batch).loss
    assert abs(float(loss.detach() - expected.detach())) < 1e-5
    assert_same_gradients(gradients(model, loss), wanted)


def test_generation_sees_the_same_images_as_forward():
    model, batch = deepseek_vl().eval(), deepseek_batch("left", 0)
    del batch["labels"]
    attach(model, [{"kind": "average_pool_2d", "layer": 1, "keep_tokens": 2}])
    cached = generate(model, batch, 4)
    assert torch.equal(cached.sequences, generate(model, batch, 4, use_cache=False).sequences)
    with torch.no_grad():
        assert torch.allclose(cached.logits[0], model(**batch).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "internvl", "llava_onevision", "mistral3"])
def test_every_image_or_tile_is_a_run_of_placeholders_or_an_equal_share_of_one(name):
    tiny = TINY[name]
    rows = [[3, "image", 7], [4], [2, "image", "image", 5]]
    batch, model = tiny.batch(rows, "left", 0, 3), tiny.build("sdpa", 0)
    family = GenericFamily(model)
    count = int(family.visual_BN(batch["input_ids"]).sum())
    expected = {"llava": [Grid(3, 3)] * 3, "internvl": [Grid(3, 3)] * 9}  # three tiles an image, in one run
    if name not in expected:  # packed tiles with newlines; rows of patches apart: nobody but an adapter knows
        with pytest.raises(UsageError, match="which do not say where one ends"):
            family.grids(batch, count)
        return
    images = family.grids(batch, count)
    assert images == expected[name]
    assert family.num_visual_tokens(batch) == sum(grid.tokens for grid in images)


def test_what_belongs_to_single_tokens_is_refused():
    family = GenericFamily(deepseek_vl())
    assert family.segment_options({"use_cache": False, "output_attentions": None}, 1)
    with pytest.raises(UsageError, match="per_token_features"):
        family.segment_options({"per_token_features": torch.zeros(2, 9)}, 1)


def test_models_that_cannot_be_served_say_why():
    vision = {**VISION_SIZES, "image_size": 32, "patch_size": 8}
    mllama = MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 48,
            "vision_output_dim": 64,
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
        },
        text_config={**TEXT_SIZES, "bos_token_id": 1, "eos_token_id": 2, "cross_attention_layers": [1]},
    )
    blip2 = Blip2Config(
        vision_config=vision,
        qformer_config={**SIZES, "num_hidden_layers": 1, "encoder_hidden_size": 32, "vocab_size": 64},
        text_config=OPTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            ffn_dim=48,
            num_attention_heads=4,
            vocab_size=64,
            word_embed_proj_dim=32,
        ).to_dict(),
        image_token_id=IMAGE,
    )
    t5 = T5Config(d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, vocab_size=64)
    for model, reason in (
        (MllamaForConditionalGeneration(mllama), "MllamaForConditionalGeneration.*cross-attention"),
        (Blip2ForConditionalGeneration(blip2), "Blip2ForConditionalGeneration.*no decoder with a list of layers"),
        (T5ForConditionalGeneration(t5), "T5ForConditionalGeneration.*encoder-decoder"),
        (TINY["llava"].build("sdpa", 0).model.language_model, "no image_token_id or image_token_index"),
        (torch.nn.Linear(2, 2), "no Hugging Face model"),
    ):
        with pytest.raises(UsageError, match=reason):
            attach(model, HALF)
