"""`registers`: learned tokens after each image carry it on once its visual tokens go (Victor, arXiv:2410.14072)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator_plugins.compressors.isolator import build_table
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor, nn


class RegistersSpec(plugin.CompressorSpec):
    """`keep_tokens` learned registers stand after each image's visual tokens; before `layer` the visual tokens go.

    As in Victor (arXiv:2410.14072 section 3): layers below `layer` summarise the image into the registers. A register
    is a token like any other: registers take the position ids after the image's last, and the ids of what follows the
    image in its row move up by their number. Between the two places another point must leave the registers alone.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.registers:Registers"
    learns: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False

    kind: Literal["registers"] = "registers"

    @model_validator(mode="after")
    def _fits(self) -> RegistersSpec:
        if self.stride or self.keep_ratio:
            raise PydanticCustomError("amount", "the number of registers is a shape of the module: give keep_tokens")
        if self.layer == 0 or (
            isinstance(self.layer, str) and self.layer.endswith("%") and not plugin.parse_share(self.layer)
        ):
            raise PydanticCustomError("layer", "registers enter at layer 0; visual tokens go before layer 1 or later")
        return self

    def tokens_before(self, grid: plugin.Grid) -> int:
        """Return the image's tokens and its registers."""
        return grid.tokens + self.kept_tokens(grid)

    def module_shape(self) -> dict[str, Any]:
        """Return the number of registers."""
        return {"registers": self.keep_tokens}


class Registers:
    """Appends the registers at the decoder's input and leaves nothing else at its layer."""

    def __init__(self, spec: RegistersSpec) -> None:
        self.spec = spec

    def create_module(self, width: int) -> nn.Module:
        """Return the registers, `keep_tokens` x width."""
        return build_table("registers", self.spec.keep_tokens or 0, width)  # never 0: the spec has no other amount

    def enter(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """Return the visual tokens, then the registers; see `plugin.Compressor`.

        Raises:
            ValueError: there are more registers than visual tokens.
        """
        import torch

        assert context.module is not None
        images, tokens = visual_BND.shape[:2]
        count = self.spec.kept_tokens(grid)
        last_AB1 = context.positions_ABN.amax(2, keepdim=True)
        if len(last_AB1) >= 3:  # M-RoPE: text continues from the highest of time, height and width
            last_AB1 = torch.cat([last_AB1[:-3], last_AB1[-3:].amax(0, keepdim=True).expand(3, -1, -1)])
        new_M = torch.arange(1, count + 1, device=visual_BND.device)
        token_N = torch.arange(tokens, device=visual_BND.device)
        return plugin.Kept(
            torch.cat([visual_BND, context.module(images).to(visual_BND.dtype)], dim=1),
            torch.cat([context.positions_ABN, last_AB1 + new_M], dim=2),
            torch.cat([context.sizes_BN, context.sizes_BN.new_ones(images, count)], dim=1),
            sources_BM=torch.cat([token_N, torch.full_like(new_M, -1)]).expand(images, -1),
        )

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """Return the registers alone.

        Raises:
            ValueError: there are fewer tokens than registers.
        """
        import torch

        tokens = visual_BND.shape[1]
        index_M = torch.arange(tokens - self.spec.kept_tokens(grid), tokens, device=visual_BND.device)
        return plugin.take(visual_BND, index_M, context)
