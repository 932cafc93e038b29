"""`downsample`: the image itself made smaller, the control any method must beat (VTC-Bench, arXiv:2510.07143)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class DownsampleSpec(plugin.BlockCompressorSpec):
    """The image is resized (bilinear, antialiased) so that the vision tower gives h' x w' tokens (section 3.2).

    The tower interpolates its position embeddings to the smaller grid; tower, projector and decoder all get cheaper.
    It acts on pixels, so `layer` is `projector`. A token's position id is the mean of those of the tokens it covers,
    rounded down.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.downsample:Downsample"
    points: ClassVar[tuple[str, ...]] = ("projector",)
    needs: ClassVar[tuple[str, ...]] = ("pixels",)

    kind: Literal["downsample"] = "downsample"


class Downsample:
    """Pixels before the tower; ids and sizes after it."""

    def __init__(self, spec: DownsampleSpec) -> None:
        self.spec = spec

    def resize(self, pixels_BCHW: Tensor, grid: plugin.Grid) -> Tensor:
        """Return the images at the size whose patches form the grid to keep; as they are where all tokens are kept.

        Args:
            pixels_BCHW: Images of which the tower makes tokens of `grid`, a token a patch.
            grid: That grid.

        Raises:
            ValueError: the amount is no block of this grid.
        """
        from torch.nn import functional

        kept = self.spec.kept_grid(grid)
        if kept == grid:
            return pixels_BCHW
        height, width = pixels_BCHW.shape[-2] // grid.height, pixels_BCHW.shape[-1] // grid.width
        size = (kept.height * height, kept.width * width)
        smaller_BCHW = functional.interpolate(pixels_BCHW.float(), size, mode="bilinear", antialias=True)
        return smaller_BCHW.to(pixels_BCHW.dtype)

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """Return the features of the smaller images, B x M x D, with ids, sizes and sources of M windows of `grid`."""
        return plugin.take_windows(visual_BND, grid, self.spec.kept_grid(grid), context)
