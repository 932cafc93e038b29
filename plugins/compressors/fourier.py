"""`fourier`: keeps the low frequencies of the token grid (Fourier Compressor, arXiv:2508.06038 section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class FourierSpec(plugin.BlockCompressorSpec):
    """A 2-D DCT over the token grid, channel by channel; the lowest h' x w' frequencies; inverted at that size.

    An ideal low-pass resize without parameters. `stride` S asks for ceil(tokens / S) tokens and keeps the product of
    an h' and a w' that is nearest to it (24 x 24 at a stride of 4: 12 x 12). A token's position id is the mean,
    rounded down, of the window of tokens that it lies over.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.fourier:Fourier"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector", "tower")

    kind: Literal["fourier"] = "fourier"


class Fourier:
    """Transform, cut and inverse of one axis are one m x n matrix, so that an image costs two small products."""

    def __init__(self, spec: FourierSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; computed in float32 at least.

        Raises:
            ValueError: the amount is no block of this grid.
        """
        kept = self.spec.kept_grid(grid)
        return plugin.take_windows(plugin.along_both_axes(visual_BND, grid, kept, low_pass), grid, kept, context)


def low_pass(tokens: int, kept: int) -> Tensor:
    """Return the matrix, kept x tokens, that leaves the lowest `kept` frequencies of an axis: sqrt(m / n) C_m^T
    C_n[:m].

    C_n is the orthonormal DCT-II, C_n[k, i] = sqrt((1 or 2) / n) cos(pi k (2 i + 1) / (2 n)) with 1 at k = 0; the
    factor makes up for the shorter axis, so that a constant stays what it is.
    """
    return _dct(kept, kept).mT @ _dct(tokens, kept) * (kept / tokens) ** 0.5


def _dct(tokens: int, frequencies: int) -> Tensor:
    """Return the first rows of the orthonormal DCT-II."""
    import torch

    number_K = torch.arange(frequencies, dtype=torch.float64)
    place_N = torch.arange(tokens, dtype=torch.float64)
    waves_KN = torch.cos(torch.pi / (2 * tokens) * number_K[:, None] * (2 * place_N + 1))
    weight_K = torch.where(number_K == 0, 1 / tokens, 2 / tokens).sqrt()
    return weight_K[:, None] * waves_KN
