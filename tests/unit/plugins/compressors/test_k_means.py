"""k_means: clusters, order, positions, sizes and gradients against Lloyd's algorithm in plain loops."""

from __future__ import annotations

import pytest
import torch
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


def apart(a, b):
    return float((a - b).norm())


def clusters_of(tokens, count, iterations):
    """Members of each cluster, in the order in which clusters were made."""
    centres = [tokens[m * len(tokens) // count] for m in range(count)]
    for _ in range(iterations):
        members = [[] for _ in centres]
        distances = []
        for n, token in enumerate(tokens):
            all_distances = [apart(token, centre) for centre in centres]
            scale = float(token.norm()) + min(all_distances)
            nearest = first_largest([-distance for distance in all_distances], scale)
            distances.append(all_distances[nearest])
            members[nearest].append(n)
        centres = [
            sum(tokens[n] for n in group) / len(group) if group else centre
            for group, centre in zip(members, centres, strict=True)
        ]
    for group in members:
        if not group:
            movable = sorted(n for other in members if len(other) > 1 for n in other)
            scale = sum(float(token.norm()) for token in tokens) / len(tokens) + max(distances)
            token = movable[first_largest([distances[n] for n in movable], scale)]
            next(other for other in members if token in other).remove(token)
            group.append(token)
    return members


def loop_with(iterations):
    def loop(visual_ND, ids, sizes, count):
        members = clusters_of(list(visual_ND.detach().double()), count, iterations)
        left = []
        for group in sorted((sorted(group) for group in members), key=lambda g: (sum(g) / len(g), g[0])):
            place = tuple(sum(axis) // len(group) for axis in zip(*[ids[n] for n in group], strict=True))
            hidden = sum(visual_ND[n] for n in group) / len(group)
            left.append((hidden, place, sum(sizes[n] for n in group), group[0]))
        return left

    return loop


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), iterations=st.integers(1, 12), seed=st.integers(0, 50))
def test_every_number_of_clusters(grid, data, iterations, seed):
    count = data.draw(st.integers(1, grid.tokens))
    method = build("k_means", keep_tokens=count, iterations=iterations)
    kept = check_against_loop(method, loop_with(iterations), grid, seed=seed)
    assert torch.equal(kept.sizes_BM.sum(1), images_of(grid, seed=seed)[1].sizes_BN.sum(1))
    assert bool((kept.positions_ABM[0].diff(dim=1) >= 0).all())


def test_several_axes_of_positions():
    check_against_loop(build("k_means", stride=4), loop_with(10), Grid(5, 7), axes=3)


@pytest.mark.parametrize("kinds", [1, 2, 5])
@pytest.mark.parametrize("count", [3, 9, 23])
def test_equal_tokens_leave_no_cluster_empty(kinds, count):
    """Whole numbers, so that distances are exact; most starts are equal, and the first one takes all their tokens."""
    grid = Grid(6, 4)
    generator = torch.Generator().manual_seed(kinds)
    palette = torch.randint(-3, 4, (kinds, 6), generator=generator).float()
    visual_BND = palette[torch.randint(0, kinds, (3, grid.tokens), generator=generator)]
    method = build("k_means", keep_tokens=count, iterations=1)
    check_against_loop(method, loop_with(1), grid, visual_BND=visual_BND)


def test_it_finds_groups_that_are_there():
    """Four far groups, mixed, with a start in each: every cluster is a group, whose mean place orders it."""
    group_N = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 3, 1, 1, 2, 0, 2, 3, 0, 1, 3, 2, 2, 1, 3, 0])
    assert group_N[[0, 6, 12, 18]].tolist() == [0, 1, 2, 3]
    visual_BND = 10 * torch.eye(6)[group_N] + torch.randn(2, 24, 6, generator=torch.Generator().manual_seed(0)) / 100
    context = images_of(Grid(4, 6), images=2, sizes=False)[1]
    kept = build("k_means", keep_tokens=4).compress(visual_BND, Grid(4, 6), context)
    places = [(group_N == group).nonzero().flatten() for group in range(4)]
    order = sorted(range(4), key=lambda group: places[group].double().mean().item())
    expected_BMD = torch.stack([visual_BND[:, places[group]].mean(1) for group in order], 1)
    assert torch.allclose(kept.hidden_BMD, expected_BMD, atol=1e-5)
