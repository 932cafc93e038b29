"""`pyramid_drop`: a share of the visual tokens stays at each of several depths (PyramidDrop, arXiv:2410.17247)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator_plugins.compressors.fastv import FastV

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class PyramidDropSpec(plugin.CompressorSpec):
    """Ranks visual tokens by what the last prompt token pays them, keeps the first, numbers positions again.

    The paper (section 3.2, CVPR 2025) drops at the ends of stages of the decoder and keeps lambda = 1/2 each time:
    a list of three points, `{kind: pyramid_drop, layer: L, keep_ratio: 1/2}` with L = 8, 16, 24 of 32 layers. The score
    is the attention inside the last layer of the stage, K-1 (one row computed anew, mean over heads; in training the
    mean over the tokens before the answers). What is left is numbered without gaps, text included.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.pyramid_drop:PyramidDrop"
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    kind: Literal["pyramid_drop"] = "pyramid_drop"


class PyramidDrop(FastV):
    """FastV's choice, then positions without gaps."""

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; position ids of the whole row are numbered again.

        Raises:
            ValueError: more tokens are asked for than there are, or the context brings no attention.
        """
        kept = super().compress(visual_BND, grid, context)
        # Where nothing was dropped ids stay as they are: those of M-RoPE have gaps of their own.
        return replace(kept, renumber=kept.hidden_BMD.shape[1] < visual_BND.shape[1])
