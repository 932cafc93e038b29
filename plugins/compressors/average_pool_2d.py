"""`average_pool_2d`: adaptive 2-D average pooling over the token grid, in the decoder or before it (DeCo)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.spec.components import BlockCompressorSpec, Grid

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.compression.protocol import Context, Kept


class AveragePool2dSpec(BlockCompressorSpec):
    """h' x w' windows over an image's rows and columns of tokens are averaged.

    With `layer: projector` this is DeCo (arXiv:2405.20985 section 3.2: adaptive average pooling of the patches, then
    the projector). Its output grid is square for a square input; here it takes the shape nearest to the grid's.
    `stride` S asks for ceil(tokens / S) tokens and keeps the product of an h' and a w' that is nearest to it:
    on 24 x 24 a stride of 4 gives 12 x 12, of 8 gives 8 x 9.

    Attributes:
        positions: Position id of a pooled token: the mean of its window rounded down, the window's first (its upper
            left), or ids renumbered without gaps (text after the image moves up).
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.average_pool_2d:AveragePool2d"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector")

    kind: Literal["average_pool_2d"] = "average_pool_2d"
    positions: Literal["mean", "first", "renumber"] = "mean"


class AveragePool2d:
    """Averages the windows of torch's adaptive pooling; neighbours overlap by a token where the sides do not divide."""

    def __init__(self, spec: AveragePool2dSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: Grid, context: Context) -> Kept:
        """See `orchestrator.compression.protocol.Compressor`; sums are taken in float32, every token weighs the same.

        Raises:
            ValueError: the amount is no block of this grid.
        """
        from orchestrator.compression.protocol import Kept
        from orchestrator.compression.windows import windows_over

        kept = self.spec.kept_grid(grid)
        windows = windows_over(grid, kept, visual_BND.device)
        if self.spec.positions == "first":
            positions_ABM = context.positions_ABN[:, :, windows.first_M]
        else:
            positions_ABM = windows.mean_positions(context.positions_ABN)
        return Kept(
            pool(visual_BND, grid, kept),
            positions_ABM,
            windows.sizes(context.sizes_BN),
            sources_BM=windows.first_M.expand(len(visual_BND), -1),
            grid=kept,
            renumber=self.spec.positions == "renumber",
        )


def pool(visual_BND: Tensor, grid: Grid, kept: Grid) -> Tensor:
    """Means over adaptive windows, B x N x D to B x M x D.

    Written out because torch's own adaptive pooling wants channels first and adds gradients on a GPU in any order.
    """
    if grid.height % kept.height == 0 and grid.width % kept.width == 0:
        height, width = grid.height // kept.height, grid.width // kept.width
        return visual_BND.unflatten(1, (kept.height, height, kept.width, width)).mean((2, 4)).flatten(1, 2)
    from orchestrator.compression.merging import at_least_float32, full_precision

    wide_BhwD = at_least_float32(visual_BND).unflatten(1, (grid.height, grid.width))
    rows_Hh = _means(grid.height, kept.height, wide_BhwD)
    columns_Ww = _means(grid.width, kept.width, wide_BhwD)
    with full_precision(visual_BND.device):
        pooled_BhWD = columns_Ww @ wide_BhwD
        pooled_BHWD = (rows_Hh @ pooled_BhWD.flatten(2)).unflatten(2, pooled_BhWD.shape[2:])
    return pooled_BHWD.flatten(1, 2).to(visual_BND.dtype)


def _means(tokens: int, windows: int, like: Tensor) -> Tensor:
    """The matrix, windows x tokens, that averages the windows along one axis."""
    import torch

    from orchestrator.compression.windows import window_bounds

    first_M, end_M = window_bounds(tokens, windows, like.device)
    place_N = torch.arange(tokens, device=like.device)
    inside_MN = (place_N >= first_M[:, None]) & (place_N < end_M[:, None])
    return inside_MN.to(like.dtype) / (end_M - first_M)[:, None]
