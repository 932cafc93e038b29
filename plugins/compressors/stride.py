"""`stride`: keeps visual tokens at even distances and drops the others; the plainest control there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class StrideSpec(plugin.CompressorSpec):
    """Keeps every `stride`-th visual token of an image, in raster order; or as many, evenly spaced."""

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.stride:Stride"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector", "tower")

    kind: Literal["stride"] = "stride"


class Stride:
    """Keeps the first token of each window; kept tokens keep their position ids."""

    def __init__(self, spec: StrideSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`.

        Raises:
            ValueError: more tokens are asked for than there are.
        """
        import torch

        tokens = visual_BND.shape[1]
        if self.spec.stride is not None:
            index_M = torch.arange(0, tokens, self.spec.stride, device=visual_BND.device)
        else:
            index_M = plugin.evenly_spaced(tokens, self.spec.kept_tokens(grid), visual_BND.device)
        return plugin.take(visual_BND, index_M, context)
