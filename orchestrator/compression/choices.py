"""Choices by comparison: the largest, the smallest, the best few; ties, within a stated tolerance, to the first.

Scores that are equal in exact arithmetic differ in their last bits from kernel to kernel (instruction set, threads,
batch shape), so a plain `topk` or `argmax` chooses by the machine. Here every choice has one *anchor* (the best score,
or the last of the best few), whose value is the same on all machines up to rounding; a score within the tolerance of
the anchor ties with it, and of those that tie the first in order is taken. Nothing is rounded to a grid, whose edges
would be ties of their own, and near scores do not chain: what is chosen is never worse than the best by more than twice
the tolerance.

Guaranteed: scores whose differences are either below `TOLERANCE - e` or above `TOLERANCE + e` (relative to the scale)
give the same choice whatever errors below e / 2 they carry. float32 scores err by about 1e-6, those from float64
products (`merging.cosines`) by about 1e-7 or less. Not guaranteed: scores that differ from the anchor by the tolerance
itself, to within rounding; and inputs (hidden states, keys, attention) that themselves differ between two machines by
more than the tolerance, as those of bfloat16 layers do.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

TOLERANCE: Final = 1e-5
"""Scores that differ by no more than this share of their scale are equal."""


def argmax(scores: Tensor, scale: float | Tensor | None = None) -> Tensor:
    """Return the place of the largest score along the last axis; of equal ones the first.

    Args:
        scores: Scores, computed in float32 at least; lower precision is compared in float32.
        scale: What scores are measured by: 1 for cosines, whose errors do not shrink with them; a tensor that
            broadcasts against `scores` with a last axis of 1; None = the largest score itself.
    """
    scores = _comparable(scores)
    best = scores.amax(-1, keepdim=True)
    return (scores >= best - _margin(best, scale)).byte().argmax(-1)


def argmin(scores: Tensor, scale: float | Tensor | None = None) -> Tensor:
    """Return the place of the smallest score along the last axis; of equal ones the first. See `argmax`."""
    return argmax(-scores, scale)


def is_top(scores_BN: Tensor, kept: int | Tensor, scale: float | Tensor | None = None) -> Tensor:
    """Return True at the `kept` highest scores of each row, B x N; of those that equal the lowest of them the first.

    Args:
        scores_BN: Scores.
        kept: How many of each row, 0 to N: a number, or B x 1.
        scale: As for `argmax`; None = the lowest of the highest scores.
    """
    scores_BN = _comparable(scores_BN)
    kept_B1 = torch.as_tensor(kept, device=scores_BN.device).expand(len(scores_BN), 1)
    falling_BN = scores_BN.sort(dim=1, descending=True).values
    last_B1 = falling_BN.gather(1, (kept_B1 - 1).clamp(min=0))
    margin_B1 = _margin(last_B1, scale)
    above_BN = (scores_BN > last_B1 + margin_B1) & (kept_B1 > 0)
    equal_BN = (scores_BN >= last_B1 - margin_B1) & ~above_BN
    room_B1 = kept_B1 - above_BN.sum(1, keepdim=True)
    return above_BN | (equal_BN & (equal_BN.cumsum(1) <= room_B1))


def top_tokens(scores_BN: Tensor, kept: int, scale: float | Tensor | None = None) -> Tensor:
    """Return the `kept` highest scores of each row as rising indices (B x kept); of equal scores the first. See
    `is_top`.
    """
    return places_of(is_top(scores_BN, kept, scale), kept)


def ranked(scores_BN: Tensor, count: int, scale: float | Tensor | None = None) -> Tensor:
    """Return the places of the `count` highest scores of each row, B x count, best first; made for a few.

    Each is the largest of those not yet taken; of equal ones the first.
    """
    scores_BN = _comparable(scores_BN)
    found = []
    for _ in range(min(count, scores_BN.shape[1])):
        found.append(argmax(scores_BN, scale).unsqueeze(1))
        scores_BN = scores_BN.scatter(1, found[-1], -torch.inf)
    return torch.cat(found, 1) if found else scores_BN.new_empty(len(scores_BN), 0, dtype=torch.long)


def places_of(chosen_BN: Tensor, count: int) -> Tensor:
    """Return the places of the True ones, `count` in each row, rising (a mask as an index would wait for the GPU)."""
    places_N = torch.arange(chosen_BN.shape[1], device=chosen_BN.device)
    return torch.where(chosen_BN, places_N, chosen_BN.shape[1]).sort(dim=1).values[:, :count]


def _comparable(scores: Tensor) -> Tensor:
    return scores.detach().to(torch.promote_types(scores.dtype, torch.float32))


def _margin(anchor: Tensor, scale: float | Tensor | None) -> Tensor:
    """Return the tolerance around an anchor; none around an infinite one."""
    margin = TOLERANCE * (anchor.abs() if scale is None else torch.ones_like(anchor) * scale)
    return torch.where(anchor.isfinite(), margin, 0)
