"""`late_injection`: layers below a depth see text alone, then the image joins (HiDrop, arXiv:2602.23699)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class LateInjectionSpec(plugin.CompressorSpec):
    """Below `layer` the decoder sees text alone; before it the visual tokens join, with their own position ids.

    HiDrop's late injection: what joins is what the projector gave (layer 8 of 32), after points at the projector and at
    layer 0, untouched by the layers below. At layer 0 nothing changes. Points between would have no image to act on.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.late_injection:LateInjection"
    enters_late: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False
    takes_amount: ClassVar[bool] = False

    kind: Literal["late_injection"] = "late_injection"

    def kept_tokens(self, grid: plugin.Grid) -> int:
        """Return all tokens."""
        return grid.tokens


class LateInjection:
    """Lets in what has waited, as it is."""

    def __init__(self, spec: LateInjectionSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; every token is kept."""
        import torch

        return plugin.take(visual_BND, torch.arange(grid.tokens, device=visual_BND.device), context)
