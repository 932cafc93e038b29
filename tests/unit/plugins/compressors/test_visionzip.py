"""visionzip: against a plain loop over images, targets and members."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from method_checks import GRIDS, build, check_against_loop, first_largest, images_of, top_of

from orchestrator.spec.components import Grid


def looked_at(grid, images=3, ties=False):
    """CLS attention and keys of images."""
    generator = torch.Generator().manual_seed(grid.tokens)
    attention_BN = torch.rand(images, grid.tokens, generator=generator)
    keys_BND = torch.randn(images, grid.tokens, 5, generator=generator)
    if ties:
        attention_BN, keys_BND = (attention_BN * 3).floor(), keys_BND.sign() * torch.tensor([1.0, 1, 0, 0, 0])
    return attention_BN, keys_BND


class Told:
    """A method that is told what the CLS token saw; image by image in the plain loop."""

    def __init__(self, method, grid, ties=False):
        self.spec, self.method = method.spec, method
        self.attention_BN, self.keys_BND = looked_at(grid, ties=ties)
        self.image = 0

    def compress(self, visual_BND, grid, context):
        context = dataclasses.replace(context, cls_attention_BN=self.attention_BN, cls_keys_BND=self.keys_BND)
        kept = self.method.compress(visual_BND, grid, context)
        assert kept.grid is None  # the mechanism knows: the same where all are kept, else one row
        return dataclasses.replace(kept, grid=self.spec.kept_grid(grid))

    def loop(self, visual_ND, positions, sizes, kept):
        scores, keys_ND = self.attention_BN[self.image].tolist(), self.keys_BND[self.image]
        self.image += 1
        contextual = round(self.spec.contextual_ratio * kept)
        dominant = top_of(scores, kept - contextual)
        others = [token for token in range(len(scores)) if token not in dominant]
        step = max(1, len(others) // max(1, contextual))
        targets = [others[number * step] for number in range(contextual)]
        members = {target: [] for target in targets}
        for token in others:
            if targets and token not in targets:
                alike = [
                    float(torch.cosine_similarity(keys_ND[token].double(), keys_ND[target].double(), dim=0))
                    for target in targets
                ]
                members[targets[first_largest(alike, scale=1)]].append(token)
        left = []
        for token in sorted(dominant + targets):
            own = members.get(token, [])
            hidden, size = visual_ND[token], sizes[token] + sum(sizes[member] for member in own)
            if own and self.spec.merge == "published":
                hidden = hidden + sum(visual_ND[member] for member in own) / len(own)
            elif own:
                hidden = (hidden + sum(visual_ND[member] for member in own)) / (1 + len(own))
            left.append((hidden, positions[token], size, token))
        return left


@pytest.mark.parametrize("merge", ["published", "mean"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_left_is_what_the_loop_makes(grid, ties, merge):
    for share in ("10/64", "1/2", "1"):
        for count in {1, grid.tokens, -(-grid.tokens // 2), -(-grid.tokens // 3)}:
            method = build("visionzip", keep_tokens=count, contextual_ratio=share, merge=merge)
            told = Told(method, grid, ties)
            kept = check_against_loop(told, told.loop, grid)
            assert kept.hidden_BMD.shape[1] == count


def test_the_papers_split():
    method = build("visionzip", keep_tokens=64)
    assert method.spec.contextual_ratio == Fraction(10, 64)
    assert round(method.spec.contextual_ratio * 64) == 10


def test_every_token_is_counted_once():
    grid = Grid(6, 4)
    visual_BND, context = images_of(grid)
    told = Told(build("visionzip", keep_tokens=8, contextual_ratio="1/4"), grid)
    kept = told.compress(visual_BND, grid, context)
    assert torch.equal(kept.sizes_BM.sum(1), context.sizes_BN.sum(1))


def test_faults():
    grid = Grid(3, 3)
    visual_BND, context = images_of(grid)
    with pytest.raises(ValueError, match="keep_tokens 10 is more than the image's 9 tokens"):
        Told(build("visionzip", keep_tokens=10), grid).compress(visual_BND, grid, context)
    with pytest.raises(ValueError, match="CLS attention is not known"):
        build("visionzip", keep_tokens=4).compress(visual_BND, grid, context)
