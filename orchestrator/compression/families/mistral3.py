"""Mistral 3 (`Mistral3ForConditionalGeneration`): images of any size, a break token after each row of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.compression.families.images import ImagesFamily, Units, sizes_of_images
from orchestrator.spec.components import Grid


class Mistral3Family(ImagesFamily):
    """An image is one unit of merged patches; break tokens are text between its rows."""

    sized = True

    @property
    def _token_pixels(self) -> int:
        """Pixels along a side that become one token."""
        config = self.model.config
        return int(config.vision_config.patch_size * config.spatial_merge_size)

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """From `image_sizes`."""
        side = self._token_pixels
        return [(Grid(height // side, width // side),) for height, width in sizes_of_images(inputs)]

    def empty_image(self) -> dict[str, Any]:
        """Return an image of two tokens: the model takes the only token of an image for something else."""
        side = self._token_pixels
        pixels = self.blank(1, self.model.config.vision_config.num_channels, side, 2 * side)
        return {"pixel_values": pixels, "image_sizes": [(side, 2 * side)]}
