"""`max_norm`: keeps the visual tokens of largest norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class MaxNormSpec(plugin.CompressorSpec):
    """Keeps the tokens of an image whose hidden states have the largest L2 norm, in raster order."""

    implementation: ClassVar[str] = "llavolta_max_norm:MaxNorm"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector")

    kind: Literal["max_norm"] = "max_norm"

    def kept_tokens(self, grid: plugin.Grid) -> int:
        """ceil(tokens / stride), or the number or share asked for."""
        return plugin.amount_to_keep(self, grid.tokens)


class MaxNorm:
    """All images of one grid at once; of equal norms the first."""

    def __init__(self, spec: MaxNormSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`."""

        norms_BN = visual_BND.detach().float().norm(dim=2)
        return plugin.take(visual_BND, plugin.top_tokens(norms_BN, self.spec.kept_tokens(grid)), context)
