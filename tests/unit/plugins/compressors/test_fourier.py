"""fourier: against the DCT written as its sums, image by image and channel by channel; what a low-pass resize keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_checks import (
    build,
    check_against_loop,
    images_of,
    sizes_of,
    window_tokens,
)

from orchestrator.spec.components import Grid


def dct_of(rows_ND):
    """Orthonormal DCT-II along the first axis, from its definition."""
    count, result = len(rows_ND), []
    for k in range(count):
        waves = [math.cos(math.pi * k * (2 * i + 1) / (2 * count)) for i in range(count)]
        total = sum(row * wave for row, wave in zip(rows_ND, waves, strict=True))
        result.append(total * math.sqrt((1 if k == 0 else 2) / count))
    return result


def inverse_of(frequencies):
    """Its inverse, the DCT-III."""
    count, result = len(frequencies), []
    for i in range(count):
        total = frequencies[0] * math.sqrt(1 / count)
        for k in range(1, count):
            total = total + frequencies[k] * math.sqrt(2 / count) * math.cos(math.pi * k * (2 * i + 1) / (2 * count))
        result.append(total)
    return result


def loop_over(grid, kept):
    def loop(visual_ND, ids, sizes, count):
        image = [[visual_ND[r * grid.width + c].double() for c in range(grid.width)] for r in range(grid.height)]
        lines = [dct_of(row)[: kept.width] for row in image]
        columns = [dct_of([line[c] for line in lines])[: kept.height] for c in range(kept.width)]
        columns = [inverse_of(column) for column in columns]
        scale = math.sqrt(kept.tokens / grid.tokens)
        small = [inverse_of([columns[c][r] for c in range(kept.width)]) for r in range(kept.height)]
        totals, left = sizes_of(grid, kept, sizes), []
        for m, window in enumerate(window_tokens(grid, kept)):
            place = tuple(sum(axis) // len(window) for axis in zip(*[ids[n] for n in window], strict=True))
            hidden = (small[m // kept.width][m % kept.width] * scale).float()
            left.append((hidden, place, totals[m], window[0]))
        assert len(left) == count
        return left

    return loop


@settings(max_examples=25, deadline=None)
@given(data=st.data(), height=st.integers(1, 7), width=st.integers(1, 7), axes=st.sampled_from([1, 3]))
def test_every_block_of_every_grid(data, height, width, axes):
    grid = Grid(height, width)
    block = Grid(data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    method = build("fourier", keep_tokens=block.tokens)
    result = check_against_loop(method, loop_over(grid, method.spec.kept_grid(grid)), grid, axes=axes)
    assert torch.equal(result.sizes_BM.sum(1), images_of(grid)[1].sizes_BN.sum(1))


@pytest.mark.parametrize(("grid", "stride"), [(Grid(24, 24), 4), (Grid(24, 24), 8), (Grid(7, 10), 3), (Grid(1, 9), 2)])
def test_a_constant_stays_and_so_does_a_low_wave(grid, stride):
    _, context = images_of(grid, images=1)
    method = build("fourier", stride=stride)
    kept = method.compress(torch.full((1, grid.tokens, 2), 3.5), grid, context)
    assert torch.allclose(kept.hidden_BMD, torch.full_like(kept.hidden_BMD, 3.5), atol=1e-5)
    # Half a wave over the width is a kept frequency: it is sampled anew at the windows' middles.
    places_w = (torch.arange(grid.width) + 0.5) / grid.width
    wave_1N1 = torch.cos(torch.pi * places_w).repeat(grid.height).view(1, -1, 1)
    kept = method.compress(wave_1N1, grid, context)
    middles_W = (torch.arange(kept.grid.width) + 0.5) / kept.grid.width
    expected_1M1 = torch.cos(torch.pi * middles_W).repeat(kept.grid.height).view(1, -1, 1)
    assert torch.allclose(kept.hidden_BMD, expected_1M1, atol=1e-5)
