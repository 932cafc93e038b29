"""PaliGemma 1 and 2 (`PaliGemmaForConditionalGeneration`): fixed grids; the prefix sees itself both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.families.images import ImagesFamily, Units, ready_features
from orchestrator.spec.components import Grid


class PaliGemmaFamily(ImagesFamily):
    """Every image is the tower's whole grid; `token_type_ids` 0 marks the prefix (images and prompt)."""

    def _grid(self) -> Grid:
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return Grid(side, side)

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return one grid for each entry of `pixel_values`, or of ready features."""
        pixels, features = inputs.get("pixel_values"), ready_features(inputs, "image")
        images = pixels if pixels is not None else features
        return [(self._grid(),)] * (len(images) if images is not None else 0)

    def units_unseen(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """As many whole grids as there are placeholders for."""
        grid = self._grid()
        return [grid] * (num_placeholders // grid.tokens)

    def block_ids_BN(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return one block, the prefix; only where the model itself makes one (given `token_type_ids`, in the first
        pass).
        """
        types_BN, cache = inputs.get("token_type_ids"), inputs.get("past_key_values")
        is_later = cache is not None and cache.is_initialized and inputs.get("pixel_values") is None
        if types_BN is None or is_later:
            return None
        return torch.where(types_BN == 0, 0, -1)

    @property
    def remakes_masks(self) -> bool:
        """From `token_type_ids`."""
        return True

    @property
    def window_cuts_blocks(self) -> bool:
        """PaliGemma 2 opens the prefix in sliding layers too."""
        return False

    @property
    def projector(self) -> nn.Module | None:
        """One linear layer, token by token."""
        found: nn.Module = self.model.model.multi_modal_projector
        return found

    @property
    def vision_width(self) -> int | None:
        """Width of the tower."""
        return int(self.model.config.vision_config.hidden_size)
