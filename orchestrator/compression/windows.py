"""Adaptive windows over a token grid: h' x w' windows over h x w tokens, as torch's adaptive pooling cuts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.compression.merging import at_least_float32, full_precision
from orchestrator.spec.components import Grid


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
