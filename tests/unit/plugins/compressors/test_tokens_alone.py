"""Methods that need tokens alone: all kept as they are, too many refused, each image by itself, low precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from method_checks import GRIDS, build, images_of

from orchestrator.spec.components import Grid

KINDS = ("average_pool_2d", "divprune", "fourier", "k_means", "tome")
OTHER_OPTIONS = (("tome", {"positions": "mean"}), ("average_pool", {}), ("average_pool", {"size_bias": True}))
SELECTING = [(kind, stride) for kind in ("divprune", "k_means", "tome") for stride in (2, 5)]
METHODS = [("average_pool_2d", 3), ("average_pool_2d", 4), ("fourier", 3), *SELECTING]


@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in KINDS), *OTHER_OPTIONS])
def test_all_tokens_are_left_as_they_are(kind, options):
    """Every way to ask for all tokens leaves them exactly as they are."""
    for grid in GRIDS:
        for amount in ({"stride": 1}, {"keep_tokens": grid.tokens}, {"keep_ratio": 1}):
            visual_BND, context = images_of(grid, axes=3)
            kept = build(kind, **amount, **options).compress(visual_BND, grid, context)
            assert torch.allclose(kept.hidden_BMD, visual_BND, rtol=0, atol=1e-6)
            assert torch.equal(kept.positions_ABM, context.positions_ABN)
            assert torch.equal(kept.sizes_BM, context.sizes_BN)
            assert kept.grid in (grid, None)  # none named: the same where all are kept
            assert kept.sources_BM.tolist() == [list(range(grid.tokens))] * len(visual_BND)


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_there_are_is_refused(kind):
    """For the planner as for the method."""
    method, (visual_BND, context) = build(kind, keep_tokens=36), images_of(Grid(5, 7))
    with pytest.raises(ValueError, match="keep_tokens 36 is more than the image's 35 tokens"):
        method.spec.kept_tokens(Grid(5, 7))
    with pytest.raises(ValueError, match="keep_tokens 36 is more than the image's 35 tokens"):
        method.compress(visual_BND, Grid(5, 7), context)


@pytest.mark.parametrize(("kind", "stride"), METHODS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_an_image_gives_the_same_whatever_else_is_in_the_batch(kind, stride, grid):
    method, (visual_BND, context) = build(kind, stride=stride), images_of(grid, images=4)
    together = method.compress(visual_BND, grid, context)
    for image in range(4):
        one = slice(image, image + 1)
        positions_ABN, sizes_BN = context.positions_ABN[:, one], context.sizes_BN[one]
        own = dataclasses.replace(context, positions_ABN=positions_ABN, sizes_BN=sizes_BN, rows_B=context.rows_B[one])
        alone = method.compress(visual_BND[one], grid, own)
        assert torch.allclose(alone.hidden_BMD[0], together.hidden_BMD[image], atol=1e-6)
        assert torch.equal(alone.positions_ABM[:, 0], together.positions_ABM[:, image])
        assert torch.equal(alone.sizes_BM[0], together.sizes_BM[image])
        assert torch.equal(alone.sources_BM[0], together.sources_BM[image])


@pytest.mark.parametrize(("kind", "stride"), METHODS)
@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_bfloat16_is_chosen_and_summed_in_float32_and_rounded_once(kind, stride, grid):
    """Also under autocast."""
    method, (visual_BND, context) = build(kind, stride=stride), images_of(grid, dtype=torch.bfloat16)
    exact = method.compress(visual_BND.float(), grid, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = method.compress(visual_BND, grid, context)
    assert low.hidden_BMD.dtype == torch.bfloat16
    assert torch.equal(low.hidden_BMD, exact.hidden_BMD.bfloat16())
    assert torch.equal(low.sources_BM, exact.sources_BM)
    assert torch.equal(low.positions_ABM, exact.positions_ABM)
