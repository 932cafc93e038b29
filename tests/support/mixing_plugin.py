"""A learned compressor for the tests, by path: windows are averaged and mixed by a linear layer; or nothing happens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from orchestrator.spec.components import CompressorSpec, amount_to_keep


class MixingSpec(CompressorSpec):
    """`variety` names another module; `neutral` keeps all tokens as they are, and the module learns nothing."""

    implementation: ClassVar[str] = f"{__name__}:Mixing"
    learns: ClassVar[bool] = True

    kind: Literal["mixing"] = "mixing"
    variety: int = 0
    neutral: bool = False

    def kept_tokens(self, grid: Any) -> int:
        return grid.tokens if self.neutral else amount_to_keep(self, grid.tokens)


class Mixing:
    """Mean of a window plus a linear layer of it."""

    def __init__(self, spec: MixingSpec) -> None:
        self.spec = spec

    def create_module(self, width: int) -> Any:
        from torch import nn

        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def compress(self, visual_BND: Any, grid: Any, context: Any) -> Any:
        import torch

        from orchestrator.compression import take

        tokens, kept = visual_BND.shape[1], self.spec.kept_tokens(grid)
        first_BM = (torch.arange(kept) * tokens // kept).expand(len(visual_BND), -1)
        found = take(visual_BND, first_BM, context)
        means_BMD = visual_BND.unflatten(1, (kept, -1)).mean(2)
        mixed_BMD = context.module(means_BMD)
        hidden_BMD = found.hidden_BMD + 0.0 * mixed_BMD if self.spec.neutral else means_BMD + mixed_BMD
        return type(found)(hidden_BMD, found.positions_ABM, found.sizes_BM, found.sources_BM)
