"""InternVL (`InternVLForConditionalGeneration`): tiles of images and frames of videos, each a square of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from orchestrator.compression.families.images import ImagesFamily, Units, pair, ready_features
from orchestrator.spec.components import Grid


class InternVLFamily(ImagesFamily):
    """Every entry of `pixel_values` is one unit; frames of a video have the placeholder of images."""

    def _tile(self, height_pixels: int, width_pixels: int) -> Grid:
        config = self.model.config
        patches = zip((height_pixels, width_pixels), pair(config.vision_config.patch_size), strict=True)
        height, width = (int(pixels // patch * config.downsample_ratio) for pixels, patch in patches)
        return Grid(height, width)

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """From the shape of the pixels, or the number of ready features."""
        pixels, features = inputs.get("pixel_values"), ready_features(inputs, "image")
        if pixels is not None:
            return [(self._tile(*pixels.shape[-2:]),)] * len(pixels)
        return [(self._tile(*self.image_size),)] * (len(features) if features is not None else 0)

    def units_unseen(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """Return the tiles of the usual size."""
        tile = self._tile(*self.image_size)
        return [tile] * (num_placeholders // tile.tokens)

    @property
    def projector(self) -> nn.Module:
        """It maps the unshuffled features token by token."""
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    @property
    def vision_width(self) -> int:
        """Patches that were put together lie side by side."""
        config = self.model.config
        return int(config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2)
