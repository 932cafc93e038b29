"""fastv and pyramid_drop: the most attended tokens stay, in order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from method_checks import GRIDS, build, images_of

from orchestrator.spec.components import Grid


def asked(grid, images=3, seed=0, ties=False):
    """Images with random attention; with `ties` of few values, so that many tokens are equal."""
    visual_BND, context = images_of(grid, images=images, axes=3, seed=seed)
    generator = torch.Generator().manual_seed(7 + seed)
    scores_BN = torch.rand(images, grid.tokens, generator=generator)
    if ties:
        scores_BN = (scores_BN * 3).floor() / 3
    return visual_BND, dataclasses.replace(context, attention_BN=scores_BN)


@pytest.mark.parametrize("kind", ["fastv", "pyramid_drop"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_highest_scores_stay_in_order(kind, ties, grid):
    for amount in ({"stride": 2}, {"keep_ratio": "1/3"}, {"keep_tokens": 1}, {"keep_tokens": grid.tokens}):
        method = build(kind, **amount)
        visual_BND, context = asked(grid, ties=ties)
        kept = method.compress(visual_BND, grid, context)
        count = method.spec.kept_tokens(grid)
        for image in range(3):
            scores = context.attention_BN[image].tolist()
            ranked = sorted(range(grid.tokens), key=lambda token, s=scores: (-s[token], token))
            wanted = sorted(ranked[:count])
            assert kept.sources_BM[image].tolist() == wanted
            assert torch.equal(kept.hidden_BMD[image], visual_BND[image, wanted])
            assert torch.equal(kept.positions_ABM[:, image], context.positions_ABN[:, image, wanted])
            assert torch.equal(kept.sizes_BM[image], context.sizes_BN[image, wanted])
        assert kept.renumber == (kind == "pyramid_drop" and count < grid.tokens)


@pytest.mark.parametrize("kind", ["fastv", "pyramid_drop"])
def test_unknown_attention_and_too_many_tokens_are_faults(kind):
    visual_BND, context = images_of(Grid(3, 3))
    with pytest.raises(ValueError, match="attention of the layer before"):
        build(kind, stride=2).compress(visual_BND, Grid(3, 3), context)
    with pytest.raises(ValueError, match="keep_tokens 10 is more than the image's 9 tokens"):
        build(kind, keep_tokens=10).compress(*[asked(Grid(3, 3))[0], Grid(3, 3), asked(Grid(3, 3))[1]])


def test_three_points_of_the_paper_halve_three_times():
    spec, tokens = build("pyramid_drop", keep_ratio="1/2").spec, 576
    left = [tokens := spec.kept_tokens(Grid(1, tokens)) for _ in range(3)]
    assert left == [288, 144, 72]
