"""A compressor that keeps all tokens and remembers what it was told."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from orchestrator.compression.protocol import take
from orchestrator.spec.components import CompressorSpec


class LayerWitnessSpec(CompressorSpec):
    """Asks for what the layer before saw."""

    implementation: ClassVar[str] = "witness:Witness"
    needs: ClassVar[tuple[str, ...]] = ("queries", "keys")
    kind: Literal["layer_witness"] = "layer_witness"
    stride: int = 1

    def kept_tokens(self, grid):
        return grid.tokens


class TowerWitnessSpec(LayerWitnessSpec):
    """Asks for what the vision tower's CLS token saw."""

    needs: ClassVar[tuple[str, ...]] = ("cls",)


class NobodySpec(LayerWitnessSpec):
    """Asks for nothing."""

    needs: ClassVar[tuple[str, ...]] = ()


class Witness:
    """What it was told stays in `told` until `forget`."""

    told: ClassVar[list] = []

    def __init__(self, spec):
        self.spec = spec

    @classmethod
    def forget(cls):
        cls.told.clear()

    def compress(self, visual_BND, grid, context):
        self.told.append(context)
        every_N = torch.arange(visual_BND.shape[1], device=visual_BND.device)
        return take(visual_BND, every_N.expand(len(visual_BND), -1), context)
