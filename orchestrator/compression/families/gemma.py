"""PaliGemma (1 and 2) and Gemma 3: images of one grid, which see themselves both ways; sliding and full layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orchestrator.compression.families.base import Tower
from orchestrator.compression.families.images import ImagesFamily
from orchestrator.spec.components import Grid


class PaliGemmaFamily(ImagesFamily):
    """Every image is the tower's complete grid; `token_type_ids` 0 marks the prefix (images and prompt)."""

    projector_name: ClassVar[str | None] = "multi_modal_projector"
    remakes_masks = True
    window_cuts_blocks = False  # PaliGemma 2 opens the prefix in sliding layers too

    @property
    def tower(self) -> Tower:
        """The SigLIP, whose last layer's patches are the visual tokens.

        Raises:
            UsageError: it is another tower.
        """
        if self.tower_refusal or self.model.config.vision_config.model_type != "siglip_vision_model":
            raise self.no_tower_points()
        tower = self.model.model.vision_tower
        encoder = getattr(tower, "vision_model", tower).encoder
        return Tower(encoder, 0, len(encoder.layers))

    def block_ids_BN(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return one block, the prefix; only where the model itself makes one (given `token_type_ids`, in the first
        pass).
        """
        types_BN, cache = inputs.get("token_type_ids"), inputs.get("past_key_values")
        is_later = cache is not None and cache.is_initialized and inputs.get("pixel_values") is None
        if types_BN is None or is_later:
            return None
        return torch.where(types_BN == 0, 0, -1)


class Gemma3Family(PaliGemmaFamily):
    """Every image (or crop of pan and scan) is a square of `mm_tokens_per_image` tokens, all of which see one another.

    The top model makes masks of the full length; those of a segment are made anew from `token_type_ids`, which travel
    with the tokens as numbers of blocks.
    """

    projector_name: ClassVar[str | None] = None  # it pools the grid, so not token by token
    window_cuts_blocks = True

    def find_language_model(self) -> nn.Module:
        """Return `model.language_model`."""
        if getattr(self.model.config.get_text_config(), "use_bidirectional_attention", False):
            raise self.cannot_serve("its text sees itself both ways (use_bidirectional_attention)")
        return super().find_language_model()

    def grid_of(self, height_pixels: int, width_pixels: int) -> Grid:
        """Return the square of `mm_tokens_per_image`, whatever the pixels."""
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
