"""late_injection: text alone below a depth, then the image as the projector gave it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from orchestrator_plugins.compressors.late_injection import LateInjectionSpec
from reference import assert_same_gradients, generate, gradients, make_batch, tiny_llava
from transformers import CLIPVisionConfig, GraniteConfig, LlavaForConditionalGeneration

from orchestrator.compression import attach
from orchestrator.compression.testing import check_compressor
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.kit import Cell
from orchestrator.compression.testing.tiny import IMAGE, TEXT_SIZES, VISION_SIZES, Bench, builder
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid

MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5], [1, "image", "image", 4]]


def late(layer):
    return {"kind": "late_injection", "layer": layer}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_at_layer_0_nothing_changes(padding):
    batch = make_batch(MIXED, padding)
    plain, model = tiny_llava("sdpa").train(), tiny_llava("sdpa").train()
    attachment = attach(model, [late(0)])
    expected, output = plain(**batch).loss, model(**batch)
    assert attachment.visual_tokens_per_layer == (6 * 9,) * 4
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert_same_gradients(gradients(model, output.loss), gradients(plain, expected), 1e-6)


def test_it_holds_the_contract_where_images_are_tiled_seen_both_ways_and_numbered_on_three_axes():
    report = check_compressor({"kind": "late_injection"}, ["llava_next", "gemma3", "qwen2_vl", "qwen3_5", "qwen3_vl"])
    assert list(report.refused) == ["qwen3_vl"]
    assert "adds visual features up to layer 0 (DeepStack)" in report.refused["qwen3_vl"]


def test_what_joins_is_scaled_where_the_decoder_scales_its_input():
    """Granite multiplies what it is given before layer 0; the image that joins later has had the same."""
    text = GraniteConfig(**TEXT_SIZES, embedding_multiplier=12.0)
    vision = CLIPVisionConfig(**VISION_SIZES, image_size=24, patch_size=8)
    build = builder(LlavaForConditionalGeneration, vision, text, image_token_id=IMAGE)
    bench = Bench(dataclasses.replace(TINY["llava"], build=build))
    spec = LateInjectionSpec(layer=2)
    assert list(Cell(bench, [[spec]]).errors()) == []


@pytest.mark.parametrize(
    "points",
    [
        [{"kind": "average_pool", "layer": "projector", "stride": 3}, late(1)],
        [{"kind": "average_pool", "layer": 0, "keep_tokens": 4, "positions": "renumber"}, late(2)],
        [{"kind": "average_pool", "layer": "projector", "stride": 2, "positions": "renumber"}, late("50%")],
        [late(1), {"kind": "average_pool", "layer": 1, "stride": 2, "positions": "renumber"}],
        [{"kind": "tome", "layer": "projector", "keep_tokens": 5}, late(2), {"kind": "tome", "layer": 3, "stride": 2}],
        [late(1), {"kind": "q_former", "layer": 2, "keep_tokens": 3}],
    ],
)
def test_points_before_and_after_it(points):
    assert check_compressor(points, ["llava", "llava_next"]).proven == ("llava", "llava_next")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_a_row_that_ends_with_its_image_is_continued_with_a_cache_as_without(attention, options):
    """Renumbered where text alone runs: the highest id of a row is the image's, which waits."""
    model = tiny_llava(attention).eval()
    points = [{"kind": "average_pool", "layer": "projector", "stride": 2, "positions": "renumber"}, late(2)]
    attach(model, points)
    batch = make_batch([[3, "image", 7], [8], [4, "image", "image"]], "left", answer=0)
    del batch["labels"]
    if options:
        common = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE], **options}
        assert torch.equal(model.generate(**batch, **common), model.generate(**batch, **common, use_cache=False))
        return
    cached, recomputed = generate(model, batch, 5), generate(model, batch, 5, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)
    for one, other in zip(cached.logits, recomputed.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "points",
    [
        [late(2)],
        [late(1), {"kind": "average_pool", "layer": 2, "stride": 2, "positions": "renumber"}],
        [late(1), {"kind": "average_pool", "layer": 1, "stride": 2, "positions": "renumber"}],
    ],
)
def test_a_later_turn_brings_another_image(points):
    batch = make_batch([[3, "image", 7, "image", 4]], "left", answer=0)
    del batch["labels"]
    model, cut = tiny_llava("sdpa").eval(), 3 + 9 + 7
    attach(model, points)
    with torch.no_grad():
        first = model(input_ids=batch["input_ids"][:, :cut], pixel_values=batch["pixel_values"][:1], use_cache=True)
        cache = first.past_key_values
        # Beside the record's own answer, which is the original length, what each layer holds.
        lengths = [cache.layers[layer].get_seq_length() for layer in range(4)]
        assert lengths[: points[0]["layer"]] == [10] * points[0]["layer"] and lengths[-1] > 10
        second = model(
            input_ids=batch["input_ids"][:, cut:],
            pixel_values=batch["pixel_values"][1:],
            attention_mask=batch["attention_mask"],
            past_key_values=cache,
        )
        together = model(**batch)
    assert torch.allclose(second.logits[0, -4:], together.logits[0, -4:], atol=1e-4)


def test_a_turn_that_is_an_image_alone_is_refused():
    batch = make_batch([[3, "image", 7]], answer=0)
    model = tiny_llava("sdpa").eval()
    attach(model, [late(2)])
    with pytest.raises(UsageError, match="the rows hold images alone, and some layers see text only"):
        model(input_ids=batch["input_ids"][:, 3:12], pixel_values=batch["pixel_values"])


def test_it_takes_no_amount_and_keeps_all():
    spec = LateInjectionSpec(layer=8)
    assert (spec.tokens_before(Grid(24, 24)), spec.kept_tokens(Grid(24, 24))) == (0, 576)
    with pytest.raises(ValueError, match="it takes no amount"):
        LateInjectionSpec(layer=8, stride=2)
    with pytest.raises(UsageError, match="cannot act at layer projector"):
        attach(tiny_llava(), [late("projector")])
