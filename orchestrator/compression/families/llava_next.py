"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`): a base tile, then the tiles of any resolution as one grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from orchestrator.compression.families.images import ImagesFamily, Units, pair, sizes_of_images
from orchestrator.spec.components import Grid


class LlavaNextFamily(ImagesFamily):
    """The base tile is one unit, the packed rest another; the newline the model adds is the last token of its rows."""

    sized = True

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """From `image_sizes` and the resolutions the config lists."""
        return [self.tiled_units(size) for size in sizes_of_images(inputs)]

    @property
    def tile(self) -> Grid:
        """The grid of one tile."""
        vision = self.model.config.vision_config
        return Grid(*(size // vision.patch_size for size in self.image_size))

    def tiled_units(self, size: tuple[int, int]) -> Units:
        """Return the units of an image of `size` (height, width) pixels."""
        height, width = self.packed(size)
        return self.tile, Grid(height, width + 1)

    def packed(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the packed tiles without newlines, by the model's own functions."""
        config = self.model.config
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, self.image_size[0])
        # Tokens of no width: only the shape is asked for.
        tokens = torch.empty(0, int(rows) * self.tile.height, int(columns) * self.tile.width)
        return pair(unpad_image(tokens, size).shape[1:])

    def empty_image(self) -> dict[str, Any]:
        """Return a blank image of one tile's size and as many tiles as the model expects of it."""
        config = self.model.config
        tiles = image_size_to_num_patches(self.image_size, config.image_grid_pinpoints, self.image_size[0])
        pixels = self.blank(1, tiles, config.vision_config.num_channels, *self.image_size)
        return {"pixel_values": pixels, "image_sizes": [list(self.image_size)]}
