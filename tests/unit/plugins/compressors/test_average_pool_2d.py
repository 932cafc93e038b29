"""average_pool_2d: windows, positions, sizes and gradients against loops and torch's own adaptive pooling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_checks import (
    build,
    check_against_loop,
    images_of,
    sizes_of,
    window_tokens,
)

from orchestrator.plan.cost import visual_tokens_by_layer
from orchestrator.spec.components import Grid

SIDE = st.integers(1, 9)


def loop_over(grid, kept, positions="mean"):
    def loop(visual_ND, ids, sizes, count):
        totals, left = sizes_of(grid, kept, sizes), []
        for m, window in enumerate(window_tokens(grid, kept)):
            mean = tuple(sum(axis) // len(window) for axis in zip(*[ids[n] for n in window], strict=True))
            place = ids[window[0]] if positions == "first" else mean
            left.append((sum(visual_ND[n] for n in window) / len(window), place, totals[m], window[0]))
        assert len(left) == count
        return left

    return loop


@settings(max_examples=40, deadline=None)
@given(data=st.data(), height=SIDE, width=SIDE, axes=st.sampled_from([1, 3]))
def test_every_block_of_every_grid(data, height, width, axes):
    grid = Grid(height, width)
    block = Grid(data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    method = build("average_pool_2d", keep_tokens=block.tokens)
    kept = method.spec.kept_grid(grid)
    assert kept.tokens == block.tokens
    result = check_against_loop(method, loop_over(grid, kept), grid, axes=axes)
    assert result.grid == kept
    assert torch.equal(result.sizes_BM.sum(1), images_of(grid)[1].sizes_BN.sum(1))
    assert bool((result.positions_ABM[0].diff(dim=1) >= 0).all())


@pytest.mark.parametrize(("grid", "stride"), [(Grid(24, 24), 4), (Grid(24, 24), 8), (Grid(7, 10), 3), (Grid(5, 1), 2)])
def test_the_hidden_states_are_those_of_adaptive_pooling(grid, stride):
    visual_BND, context = images_of(grid)
    kept = build("average_pool_2d", stride=stride).compress(visual_BND, grid, context)
    image_BDhw = visual_BND.mT.unflatten(2, (grid.height, grid.width))
    expected_BDhw = F.adaptive_avg_pool2d(image_BDhw, (kept.grid.height, kept.grid.width))
    assert torch.allclose(kept.hidden_BMD, expected_BDhw.flatten(2).mT, atol=1e-6)


def test_positions_first_and_renumbered():
    grid = Grid(6, 4)
    method = build("average_pool_2d", stride=4, positions="first")
    check_against_loop(method, loop_over(grid, Grid(3, 2), "first"), grid)
    assert build("average_pool_2d", stride=4, positions="renumber").compress(*in_call(grid)).renumber
    assert not method.compress(*in_call(grid)).renumber


def in_call(grid):
    visual_BND, context = images_of(grid)
    return visual_BND, grid, context


def test_a_second_point_pools_the_grid_the_first_one_left():
    first, second = build("average_pool_2d", keep_tokens=12), build("average_pool_2d", keep_tokens=2)
    grid = Grid(6, 8)
    once = first.compress(*in_call(grid))
    assert once.grid == Grid(3, 4)
    twice = second.compress(once.hidden_BMD, once.grid, images_of(once.grid)[1])
    assert twice.grid == Grid(1, 2)
    points = [{"kind": "average_pool_2d", "layer": layer, "keep_tokens": n} for layer, n in ((1, 12), (2, 9), (3, 2))]
    assert visual_tokens_by_layer(grid, points, 5) == [48, 12, 9, 2, 2]
    # Of one row of 12 tokens, ten are a block; of 3 x 4 they are none.
    with pytest.raises(ValueError, match="nearest possible is 9 or 12"):
        visual_tokens_by_layer(grid, [points[0], {**points[1], "keep_tokens": 10}], 5)
