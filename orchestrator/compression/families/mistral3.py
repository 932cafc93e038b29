"""Mistral 3 and LightOn OCR: images of any size, in Mistral 3 a break token after each row of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.compression.families.images import ImagesFamily, Units, sizes_of_images


class Mistral3Family(ImagesFamily):
    """An image is one unit of merged patches; break tokens, where there are any, are text between its rows."""

    sized = True
    one_size = False

    @property
    def patches_per_side(self) -> int:
        """The config's `spatial_merge_size`."""
        return int(self.model.config.spatial_merge_size)

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the grids of the images by `image_sizes`."""
        return [(self.grid_of(*size),) for size in sizes_of_images(inputs)]

    def empty_image(self) -> dict[str, Any]:
        """Return an image of two tokens: the model takes the only token of an image for something else."""
        vision = self.model.config.vision_config
        side = vision.patch_size * self.patches_per_side
        return {"pixel_values": self.blank(1, vision.num_channels, side, 2 * side), "image_sizes": [(side, 2 * side)]}
