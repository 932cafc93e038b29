"""`frame_pool`: a video's frames averaged to fewer (PLLaVA's pooling along time, arXiv:2404.16994)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class FramePoolSpec(plugin.CompressorSpec):
    """T frames become `frames`, each the mean of a window of neighbouring frames, place by place.

    The windows are those of adaptive average pooling along time (PLLaVA, section 3.3; its pooling of rows and columns
    is `average_pool_2d` after this point): frame i takes floor(i T / frames) to ceil((i + 1) T / frames). Position ids
    are the windows' means rounded down; pooled tokens stand at their window's first frame. A video of no more frames,
    and an image, stay as they are.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.frame_pool:FramePool"
    across_frames: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False
    takes_amount: ClassVar[bool] = False

    kind: Literal["frame_pool"] = "frame_pool"
    frames: plugin.Count = 1
    """Frames left of a video; 1 averages all of them (PLLaVA: 16)."""

    def kept_tokens(self, grid: plugin.Grid) -> int:
        """Return the tokens of the frames left."""
        return self.kept_grid(grid).tokens

    def kept_grid(self, grid: plugin.Grid) -> plugin.Grid:
        """Return the frames left, one below the other."""
        frames = min(self.frames, grid.frames)
        return plugin.Grid(grid.height // grid.frames * frames, grid.width, frames)


class FramePool:
    """Averages frames; sums are taken in float32."""

    def __init__(self, spec: FramePoolSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; a video's frames follow one another in its tokens."""

        kept, each = self.spec.kept_grid(grid), grid.tokens // grid.frames
        windows = plugin.windows_over(plugin.Grid(grid.frames, each), plugin.Grid(kept.frames, each), visual_BND.device)
        wide_BMWD = plugin.at_least_float32(visual_BND)[:, windows.tokens_MW] * windows.inside_MW.unsqueeze(-1)
        count_M1 = windows.inside_MW.sum(1, keepdim=True)
        return plugin.Kept(
            (wide_BMWD.sum(2) / count_M1).to(visual_BND.dtype),
            windows.mean_positions(context.positions_ABN),
            windows.sizes(context.sizes_BN),
            sources_BM=windows.first_M.expand(len(visual_BND), -1),
            grid=kept,
            in_place=True,
        )
