"""`average_pool_2d`: adaptive 2-D average pooling over the token grid, in the decoder or before it (DeCo)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class AveragePool2dSpec(plugin.BlockCompressorSpec):
    """h' x w' windows over an image's rows and columns of tokens are averaged.

    With `layer: projector` this is DeCo (arXiv:2405.20985, its method: adaptive average pooling of the patches, then
    the projector). Its output grid is square for a square input; here it takes the shape nearest to the grid's.
    `stride` S asks for ceil(tokens / S) tokens and keeps the product of an h' and a w' that is nearest to it:
    on 24 x 24 a stride of 4 gives 12 x 12, of 8 gives 8 x 9.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.average_pool_2d:AveragePool2d"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector", "tower")

    kind: Literal["average_pool_2d"] = "average_pool_2d"
    positions: Literal["mean", "first", "renumber"] = "mean"
    """Position id of a pooled token: the mean of its window rounded down, the window's first (upper left), or
    `renumber`: ids without gaps, so that text after the image moves up.
    """


class AveragePool2d:
    """Averages the windows of torch's adaptive pooling; neighbours overlap by a token where the sides do not divide."""

    def __init__(self, spec: AveragePool2dSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; sums are taken in float32, every token weighs the same.

        Raises:
            ValueError: the amount is no block of this grid.
        """
        kept = self.spec.kept_grid(grid)
        means_BMD = plugin.along_both_axes(visual_BND, grid, kept, window_means)
        result = plugin.take_windows(means_BMD, grid, kept, context)
        if self.spec.positions == "first":
            first_M = plugin.windows_over(grid, kept, visual_BND.device).first_M
            result = replace(result, positions_ABM=context.positions_ABN[:, :, first_M])
        return replace(result, renumber=self.spec.positions == "renumber")


def window_means(tokens: int, windows: int) -> Tensor:
    """Return the matrix, windows x tokens, that averages adaptive windows along one axis.

    Written out because torch's own adaptive pooling wants channels first and adds gradients on a GPU in any order.
    """
    import torch

    first_M, end_M = plugin.window_bounds(tokens, windows, torch.device("cpu"))
    place_N = torch.arange(tokens)
    inside_MN = (place_N >= first_M[:, None]) & (place_N < end_M[:, None])
    return inside_MN.double() / (end_M - first_M)[:, None]
