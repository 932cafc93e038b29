"""Methods that need only tokens inside a LLaVA: all kept is the plain model; a second point sees the first grid."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_gradients, gradients, make_batch, tiny_llava

from orchestrator.compression import attach
from orchestrator.errors import UsageError
from orchestrator.plan.cost import visual_tokens_by_layer
from orchestrator.spec.components import Grid

METHODS = ("average_pool", "average_pool_2d", "fourier", "k_means", "tome", "divprune")
MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5]]
IMAGES = 4


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", METHODS)
def test_keeping_all_is_the_plain_model(kind, padding):
    model, batch = tiny_llava("sdpa").train(), make_batch(MIXED, padding)
    loss = model(**batch).loss
    expected = gradients(model, loss)
    for layer in (0, 2):
        attachment = attach(model, [{"kind": kind, "layer": layer, "stride": 1}])
        compressed = model(**batch).loss
        assert abs(float(compressed.detach() - loss.detach())) < 1e-5
        assert_same_gradients(gradients(model, compressed), expected)
        attachment.detach()


@pytest.mark.parametrize("kind", METHODS)
def test_a_batch_equals_its_rows_and_gradients_reach_the_projector(kind):
    """Other images and padding change nothing, and every layer runs the tokens that the planner counts."""
    model = tiny_llava("sdpa").train()
    rows = [[3, "image", 7], [2, "image", 2, "image", "image", 5]]
    points = [{"kind": kind, "layer": 1, "keep_tokens": 6}, {"kind": kind, "layer": 3, "keep_tokens": 2}]
    attachment = attach(model, points)
    batch = make_batch(rows)
    together = model(**batch, return_logits=True)
    planned = visual_tokens_by_layer(Grid(3, 3), points, 4)
    assert planned == [9, 6, 6, 2]
    assert attachment.visual_tokens_per_layer == tuple(IMAGES * tokens for tokens in planned)
    together.loss.backward()
    grown = [name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0]
    assert any("projector" in name for name in grown)
    for row, images in ((0, slice(0, 1)), (1, slice(1, IMAGES))):
        length = int(batch["attention_mask"][row].sum())
        alone = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "attention_mask", "labels")}
        logits = model(**alone, pixel_values=batch["pixel_values"][images], return_logits=True).logits
        close = torch.isclose(logits[0], together.logits[row, :length], atol=1e-4, equal_nan=True)
        assert bool(close.all())


@pytest.mark.parametrize("kind", ["average_pool_2d", "fourier"])
def test_an_amount_that_is_no_block_is_an_error_at_once(kind):
    model = tiny_llava("sdpa")
    attach(model, [{"kind": kind, "layer": 1, "keep_tokens": 5}])
    with pytest.raises(UsageError, match=r"keep_tokens 5 is no product .*nearest possible is 4 or 6"):
        model(**make_batch(MIXED))


@pytest.mark.parametrize("first", ["stride", "average_pool"])
def test_a_method_of_one_row_that_keeps_all_leaves_the_grid(first):
    """As the planner counts: 4 of 3 x 3 is a block of 2 x 2, and 7 is none."""
    model, batch = tiny_llava("sdpa"), make_batch(MIXED)
    points = [{"kind": first, "layer": 0, "stride": 1}, {"kind": "average_pool_2d", "layer": 1, "keep_tokens": 7}]
    attachment = attach(model, points)
    with pytest.raises(UsageError, match="nearest possible is 6 or 9"):
        model(**batch)
    with pytest.raises(ValueError, match="nearest possible is 6 or 9"):
        visual_tokens_by_layer(Grid(3, 3), points, 4)
    attachment.switch([{"kind": first, "layer": 0, "keep_tokens": 8}, points[1]])
    model(**batch)
    assert attachment.visual_tokens_per_layer == (8 * IMAGES, *(7 * IMAGES,) * 3)
