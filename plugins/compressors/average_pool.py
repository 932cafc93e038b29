"""`average_pool`: the paper's compressor, 1-D average pooling of neighbouring visual tokens (LLaVolta section 3.1)."""

from __future__ import annotations

from typing import ClassVar, Literal

from orchestrator.spec.components import CompressorSpec, Grid, amount_to_keep


class AveragePoolSpec(CompressorSpec):
    """Windows of `stride` neighbouring visual tokens of one image, in raster order, are averaged.

    Attributes:
        positions: Position id of a pooled token: the mean of its window rounded down, the window's first, or
            ids renumbered without gaps (text after the image moves up).
        size_bias: Adds the log of a pooled token's window size to its attention logits.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.average_pool:AveragePool"

    kind: Literal["average_pool"] = "average_pool"
    positions: Literal["mean", "first", "renumber"] = "mean"

    def kept_tokens(self, grid: Grid) -> int:
        """ceil(tokens / stride), or the number of windows asked for."""
        if self.stride is not None:
            return -(-grid.tokens // self.stride)
        return amount_to_keep(self, grid.tokens)
