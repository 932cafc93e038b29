"""PaliGemma 1 and 2 (`PaliGemmaForConditionalGeneration`): fixed grids; the prefix sees itself both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.families.base import Family
from orchestrator.spec.components import Grid


class PaliGemmaFamily(Family):
    """Every image is the tower's whole grid; `token_type_ids` 0 marks the prefix (images and prompt)."""

    def find_language_model(self) -> nn.Module:
        """`model.language_model`."""
        language_model = getattr(getattr(self.model, "model", None), "language_model", None)
        if not isinstance(language_model, nn.Module):
            raise self.cannot_serve("it has no model.language_model")
        return language_model

    def visual_BN(self, input_ids_BN: Tensor) -> Tensor:
        """True at `image_token_id`."""
        mask_BN: Tensor = input_ids_BN == self.model.config.image_token_id
        return mask_BN

    def _grid(self) -> Grid:
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return Grid(side, side)

    def grids(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """As many whole grids as there are placeholders for."""
        grid = self._grid()
        return [grid] * (num_placeholders // grid.tokens)

    def num_visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Images times tokens."""
        pixels = inputs.get("pixel_values")
        ready = (inputs.get("mm_encoder_outputs") or {}).get("image")
        images = len(pixels) if pixels is not None else len(ready.pooler_output) if ready is not None else 0
        return images * self._grid().tokens

    def block_ids_BN(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """One block, the prefix; only where the model itself makes one (given `token_type_ids`, in the first pass)."""
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

    def idle_features(self) -> Tensor:
        """Features of one black image."""
        vision: Any = self.model.config.vision_config
        parameter = next(self.model.parameters())
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        pixels = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
        features: Tensor = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        return features
