"""Gemma 3 (`Gemma3ForConditionalGeneration`): pooled grids that see themselves both ways; sliding and full layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.families.paligemma import PaliGemmaFamily
from orchestrator.spec.components import Grid


class Gemma3Family(PaliGemmaFamily):
    """Every image (or crop of pan and scan) is a square of `mm_tokens_per_image` tokens, all of which see one another.

    The top model makes masks of the full length; those of a segment are made anew from `token_type_ids`, which travel
    with the tokens as numbers of blocks.
    """

    def find_language_model(self) -> nn.Module:
        """Return `model.language_model`."""
        if getattr(self.model.config.get_text_config(), "use_bidirectional_attention", False):
            raise self.cannot_serve("its text sees itself both ways (use_bidirectional_attention)")
        return super().find_language_model()

    def _grid(self) -> Grid:
        side = math.isqrt(self.model.config.mm_tokens_per_image)
        return Grid(side, side)

    def block_ids_BN(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the runs of `token_type_ids` 1, numbered from 0 in each row; without these the model is causal."""
        types_BN = inputs.get("token_type_ids")
        if types_BN is None:
            return None
        image_BN = types_BN == 1
        starts_BN = image_BN & ~nn.functional.pad(image_BN, (1, 0), value=False)[:, :-1]
        return torch.where(image_BN, starts_BN.long().cumsum(1) - 1, -1)

    @property
    def window_cuts_blocks(self) -> bool:
        """A sliding layer's window holds within an image too."""
        return True

    @property
    def projector(self) -> nn.Module | None:
        """None: it pools the grid, so not token by token."""
        return None

    @property
    def vision_width(self) -> int | None:
        """None, as there is no projector that maps token by token."""
        return None
