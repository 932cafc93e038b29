"""`early_exit`: from a depth on the decoder sees text alone (HiDrop, arXiv:2602.23699)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class EarlyExitSpec(plugin.CompressorSpec):
    """From `layer` on the decoder sees text alone: all visual tokens leave, and the text keeps its position ids.

    HiDrop's early exit (layer 24 of 32): by then the text has taken what it needs. It is a variant's last point; the
    logits of visual tokens are NaN.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.early_exit:EarlyExit"
    keeps_none: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False
    takes_amount: ClassVar[bool] = False

    kind: Literal["early_exit"] = "early_exit"

    def kept_tokens(self, grid: plugin.Grid) -> int:
        """Return 0."""
        return 0


class EarlyExit:
    """Keeps nothing."""

    def __init__(self, spec: EarlyExitSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; no token is kept."""
        import torch

        return plugin.take(visual_BND, torch.arange(0, device=visual_BND.device), context)
