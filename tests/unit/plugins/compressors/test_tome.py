"""tome: matching, order, positions, sizes and gradients against bipartite soft matching in plain loops."""

from __future__ import annotations

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
    top_of,
)

from orchestrator.spec.components import Grid


def one_round(present, merges):
    """Merges the `merges` most alike pairs; a present token is (source, members)."""
    first, second = present[::2], present[1::2]
    pairs = []
    for a, token in enumerate(first):
        alike = [
            float(F.cosine_similarity(token["mean"].detach().double(), other["mean"].detach().double(), dim=0))
            for other in second
        ]
        pairs.append((max(alike, default=-1), a, first_largest(alike, scale=1)))
    merged = [pairs[a] for a in top_of([alike for alike, _, _ in pairs], merges, scale=1)]
    for _, a, b in merged:
        second[b]["members"] = second[b]["members"] + first[a]["members"]
    gone = {first[a]["source"] for _, a, _ in merged}
    return [token for token in present if token["source"] not in gone]


def loop_with(positions):
    def loop(visual_ND, ids, sizes, count):
        present = [{"source": n, "members": [n], "mean": token} for n, token in enumerate(visual_ND)]
        while len(present) > count:
            present = one_round(present, min(len(present) - count, len(present) // 2))
            for token in present:
                weight = sum(sizes[n] for n in token["members"])
                token["mean"] = sum(sizes[n] * visual_ND[n] for n in token["members"]) / weight
        left = []
        for token in present:
            size = sum(sizes[n] for n in token["members"])
            axes = range(len(ids[0]))
            mean = tuple(sum(sizes[n] * ids[n][axis] for n in token["members"]) // size for axis in axes)
            place = mean if positions == "mean" else ids[token["source"]]
            left.append((token["mean"], place, size, token["source"]))
        return left

    return loop


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 50), positions=st.sampled_from(["destination", "mean", "renumber"]))
def test_every_amount(grid, data, seed, positions):
    count = data.draw(st.integers(1, grid.tokens))
    method = build("tome", keep_tokens=count, positions=positions)
    kept = check_against_loop(method, loop_with(positions), grid, seed=seed)
    assert torch.equal(kept.sizes_BM.sum(1), images_of(grid, seed=seed)[1].sizes_BN.sum(1))
    assert bool((kept.sources_BM.diff(dim=1) > 0).all())
    assert kept.renumber == (positions == "renumber")


def test_several_axes_of_positions():
    check_against_loop(build("tome", stride=4, positions="mean"), loop_with("mean"), Grid(5, 7), axes=3)


def test_a_round_merges_at_most_half_and_the_first_of_equals():
    """Unit vectors, so that cosines are exactly 0 or 1: 0, 2, 4 look at 1, 3, 5; 0 and 4 have a twin there, 2 none."""
    axis_N = torch.tensor([0, 5, 1, 0, 2, 2])
    visual_BND = torch.eye(6)[axis_N].unsqueeze(0)
    context = images_of(Grid(1, 6), images=1, sizes=False)[1]
    for count, sources in ((5, [1, 2, 3, 4, 5]), (4, [1, 2, 3, 5]), (3, [1, 3, 5])):
        kept = build("tome", keep_tokens=count).compress(visual_BND, Grid(1, 6), context)
        assert kept.sources_BM.tolist() == [sources]
    # Token 2 is like none of 1, 3, 5: it goes to the first.
    assert kept.sizes_BM.tolist() == [[2, 2, 2]]


def test_proportional_attention_is_asked_for_unless_told_not_to():
    grid = Grid(5, 7)
    visual_BND, context = images_of(grid)
    assert build("tome", stride=2).compress(visual_BND, grid, context).size_bias
    assert not build("tome", stride=2, size_bias=False).compress(visual_BND, grid, context).size_bias
