"""Tensor operations that methods share: choices by comparison, means of members, cosines, windows over a grid.

**Choices.** Scores that are equal in exact arithmetic differ in their last bits from kernel to kernel (instruction set,
threads, batch shape), so a plain `topk` or `argmax` chooses by the machine. Here every choice has one *anchor* (the
best score, or the last of the best few), whose value is the same on all machines up to rounding; a score within the
tolerance of the anchor ties with it, and of those that tie the first in order is taken. Nothing is rounded to a grid,
whose edges would be ties of their own, and near scores do not chain: what is chosen is never worse than the best by
more than twice the tolerance.

Guaranteed: scores whose differences are either below `TOLERANCE - e` or above `TOLERANCE + e` (relative to the scale)
give the same choice whatever errors below e / 2 they carry. float32 scores err by about 1e-6, those from float64
products (`cosines`) by about 1e-7 or less. Not guaranteed: scores that differ from the anchor by the tolerance itself,
to within rounding; and inputs (hidden states, keys, attention) that themselves differ between two machines by more than
the tolerance, as those of bfloat16 layers do.

**Sums** over members are matrix products and not `index_add`: its order on a GPU is not fixed, and a method that
selects by what was merged before must select the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from orchestrator.spec.components import Grid

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


def window_bounds(tokens: int, windows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first and end (half open) of each window along one axis: floor(i n / m) and ceil((i + 1) n / m).

    Where `windows` does not divide `tokens`, neighbours overlap by one token.
    """
    number_M = torch.arange(windows, device=device)
    return number_M * tokens // windows, ((number_M + 1) * tokens + windows - 1) // windows


@dataclass(frozen=True)
class Windows:
    """M = h' w' windows over N = h w tokens, both in raster order.

    Attributes:
        tokens_MW: Tokens of each window, padded with 0.
        inside_MW: False at that padding.
        owners_N: The window each token counts for: the last of those that hold it along each axis.
    """

    tokens_MW: Tensor
    inside_MW: Tensor
    owners_N: Tensor

    @property
    def first_M(self) -> Tensor:
        """The first token of each window; no two windows share it."""
        return self.tokens_MW[:, 0]

    def mean_positions(self, positions_ABN: Tensor) -> Tensor:
        """Return the mean position id of each window, rounded down; whole-number arithmetic."""
        sums_ABM = (positions_ABN[:, :, self.tokens_MW] * self.inside_MW).sum(3)
        return sums_ABM // self.inside_MW.sum(1)

    def sizes(self, sizes_BN: Tensor) -> Tensor:
        """Return the sizes of the windows; each token counts once, so that their sum stays."""
        sizes_BM = sizes_BN.new_zeros(len(sizes_BN), len(self.tokens_MW))
        return sizes_BM.scatter_add_(1, self.owners_N.expand_as(sizes_BN), sizes_BN)


def windows_over(grid: Grid, kept: Grid, device: torch.device) -> Windows:
    """Return the windows of `kept.height` x `kept.width` over `grid`."""
    rows_hR, inside_hR = _members(grid.height, kept.height, device)
    columns_wC, inside_wC = _members(grid.width, kept.width, device)
    tokens_MW = (rows_hR[:, None, :, None] * grid.width + columns_wC[None, :, None, :]).flatten(2).flatten(0, 1)
    inside_MW = (inside_hR[:, None, :, None] & inside_wC[None, :, None, :]).flatten(2).flatten(0, 1)
    row_h, column_w = _owners(grid.height, kept.height, device), _owners(grid.width, kept.width, device)
    owners_N = (row_h[:, None] * kept.width + column_w).flatten()
    return Windows(torch.where(inside_MW, tokens_MW, 0), inside_MW, owners_N)


def along_both_axes(visual_BND: Tensor, grid: Grid, kept: Grid, matrix: Callable[[int, int], Tensor]) -> Tensor:
    """Map rows and columns of a grid linearly to fewer, in float32 at least; an axis that keeps its length is left.

    Args:
        visual_BND: Tokens in raster order.
        grid: Their grid.
        kept: The grid they become.
        matrix: `matrix(tokens, kept)` makes the map of one axis, kept x tokens, on the host.

    Returns:
        B x M x D, of the tokens' dtype.
    """
    wide_BhwD = at_least_float32(visual_BND).unflatten(1, (grid.height, grid.width))
    with full_precision(visual_BND.device):
        if kept.width < grid.width:
            wide_BhwD = matrix(grid.width, kept.width).to(wide_BhwD) @ wide_BhwD
        if kept.height < grid.height:
            rows_Hh = matrix(grid.height, kept.height).to(wide_BhwD)
            wide_BhwD = (rows_Hh @ wide_BhwD.flatten(2)).unflatten(2, wide_BhwD.shape[2:])
    return wide_BhwD.flatten(1, 2).to(visual_BND.dtype)


def _members(tokens: int, windows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first_M, end_M = window_bounds(tokens, windows, device)
    longest = -(-tokens // windows) + (1 if tokens % windows else 0)  # no window is longer
    members_MW = first_M[:, None] + torch.arange(longest, device=device)
    return members_MW, members_MW < end_M[:, None]


def _owners(tokens: int, windows: int, device: torch.device) -> Tensor:
    return ((torch.arange(tokens, device=device) + 1) * windows - 1) // tokens


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off, so that float32 products stay float32."""
    with torch.autocast(device.type, enabled=False):
        yield


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 where its own precision is lower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def tokens_at(hidden_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Return the tokens at some places of each image or row: B x M x D."""
    return hidden_BND.gather(1, index_BM.unsqueeze(2).expand(-1, -1, hidden_BND.shape[2]))


def merge(visual_BND: Tensor, slots_BN: Tensor, kept: int, weights_BN: Tensor | None = None) -> Tensor:
    """Return the weighted mean of the tokens of each slot, summed in float32 at least; gradients flow to the tokens.

    Args:
        visual_BND: Tokens.
        slots_BN: The slot that each token goes to, 0 to `kept` - 1; every slot has a member.
        kept: Number of slots M.
        weights_BN: A positive weight for each token; None = all alike.

    Returns:
        Means, B x M x D, of the tokens' dtype.
    """
    wide_BND = at_least_float32(visual_BND)
    if weights_BN is None:
        weights_BN = torch.ones_like(slots_BN)
    shares_BMN = wide_BND.new_zeros(len(slots_BN), kept, slots_BN.shape[1])
    shares_BMN.scatter_(1, slots_BN.unsqueeze(1), weights_BN.to(wide_BND.dtype).unsqueeze(1))
    with full_precision(visual_BND.device):
        sums_BMD = shares_BMN @ wide_BND
    return (sums_BMD / shares_BMN.sum(2, keepdim=True)).to(visual_BND.dtype)


def sum_members(values_XBN: Tensor, slots_BN: Tensor, kept: int) -> Tensor:
    """Sum integers over the members of each slot; exact.

    Args:
        values_XBN: Whole numbers, with any leading axes or none.
        slots_BN: The slot of each token, 0 to `kept` - 1.
        kept: Number of slots M.
    """
    sums = values_XBN.new_zeros(*values_XBN.shape[:-1], kept)
    return sums.scatter_add_(-1, slots_BN.expand_as(values_XBN), values_XBN)


def cosines(first_BND: Tensor, second_BMD: Tensor) -> Tensor:
    """Return the cosine of every token with every other, B x N x M, in float64; 0 with a token that is all zero.

    Products of float32 would be fewer bits on a GPU where TF32 is allowed; compare with `argmax` and a scale of 1.
    """
    with full_precision(first_BND.device):
        return normalize(first_BND.double(), dim=-1) @ normalize(second_BMD.double(), dim=-1).mT


def distances(first_BND: Tensor, second_BMD: Tensor) -> Tensor:
    """Return the L2 distance of every token to every other, B x N x M, in float64.

    Distances and not their squares: an error of the tokens moves them by no more than itself.
    """
    first_BND, second_BMD = first_BND.double(), second_BMD.double()
    lengths_BNM = first_BND.square().sum(2, keepdim=True) + second_BMD.square().sum(2).unsqueeze(1)
    with full_precision(first_BND.device):
        return torch.baddbmm(lengths_BNM, first_BND, second_BMD.mT, alpha=-2).clamp(min=0).sqrt()
