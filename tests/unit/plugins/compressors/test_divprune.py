"""divprune: the tokens chosen and their gradients against the greedy max-min loop; ties; that it is quick."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_checks import (
    GRIDS,
    build,
    check_against_loop,
    first_largest,
    images_of,
)

from orchestrator.spec.components import Grid


def loop(visual_ND, ids, sizes, count):
    rows = visual_ND.detach().double()
    tokens = range(len(rows))
    distance = [[1 - float(F.cosine_similarity(rows[a], rows[b], dim=0)) for b in tokens] for a in tokens]
    nearest = [min((distance[a][b] for b in tokens if b != a), default=0) for a in tokens]
    chosen = [first_largest(nearest, scale=1)]
    while len(chosen) < count:
        rest = [a for a in tokens if a not in chosen]
        chosen.append(rest[first_largest([min(distance[a][b] for b in chosen) for a in rest], scale=1)])
    return [(visual_ND[n], ids[n], sizes[n], n) for n in sorted(chosen)]


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 50))
def test_every_amount(grid, data, seed):
    count = data.draw(st.integers(1, grid.tokens))
    check_against_loop(build("divprune", keep_tokens=count), loop, grid, axes=3, seed=seed)


@pytest.mark.parametrize("axes_of_tokens", [[3, 3, 3, 3, 3, 3], [0, 0, 1, 2, 2, 1], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_of_equals_the_first(axes_of_tokens, count):
    """Unit vectors, so that cosines are exactly 0 or 1; a token that is all zero is at distance 1 from all."""
    visual_BND = torch.eye(6)[torch.tensor(axes_of_tokens)].unsqueeze(0).repeat(3, 1, 1)
    visual_BND[1, 4] = 0
    check_against_loop(build("divprune", keep_tokens=count), loop, Grid(2, 3), visual_BND=visual_BND)


def test_selecting_costs_little():
    """144 of 576 tokens, batch 4, width 512: 30 ms on one thread; the bound leaves room for a slow, busy machine."""
    visual_BND = torch.randn(4, 576, 512, generator=torch.Generator().manual_seed(0))
    context = images_of(Grid(24, 24), images=4)[1]
    method, seconds = build("divprune", keep_tokens=144), []
    for _ in range(5):
        start = time.perf_counter()
        method.compress(visual_BND, Grid(24, 24), context)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
