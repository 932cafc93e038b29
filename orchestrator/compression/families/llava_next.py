"""LLaVA-NeXT, LLaVA-OneVision, Granite 4 Vision: a base tile, then the tiles of any resolution as one grid; video."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from orchestrator.compression.families.images import (
    ImagesFamily,
    Units,
    flat_features,
    pair,
    ready_features,
    sizes_of_images,
)
from orchestrator.spec.components import Grid

_NEWLINE = Grid(1, 1)


class LlavaNextFamily(ImagesFamily):
    """The base tile is one unit, the packed rest another; the newline the model adds is the last token of its rows."""

    sized = True
    one_size = False

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the tiled images, by `image_sizes` and the resolutions the config lists."""
        return [self.tiled_units(size) for size in sizes_of_images(inputs)]

    def tiled_units(self, size: tuple[int, int]) -> Units:
        """Return the units of an image of `size` (height, width) pixels."""
        height, width = self.packed(size)
        return self.usual_grid, Grid(height, width + 1)

    def packed(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the packed tiles without newlines, by the model's own functions."""
        config = self.model.config
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, self.image_size[0])
        # Tokens of no width: only the shape is asked for.
        tokens = torch.empty(0, int(rows) * self.usual_grid.height, int(columns) * self.usual_grid.width)
        return pair(unpad_image(tokens, size).shape[1:])

    def empty_image(self) -> dict[str, Any]:
        """Return a blank image of one tile's size and as many tiles as the model expects of it."""
        config = self.model.config
        tiles = image_size_to_num_patches(self.image_size, config.image_grid_pinpoints, self.image_size[0])
        pixels = self.blank(1, tiles, config.vision_config.num_channels, *self.image_size)
        return {"pixel_values": pixels, "image_sizes": [list(self.image_size)]}


class Granite4VisionFamily(LlavaNextFamily):
    """Tiles as in LLaVA-NeXT, sampled down by a Q-Former; features of several kinds are added before several layers."""

    sized = False
    encodes_in_forward = True
    deep_options = ("vision_mask", "deepstack_features")

    @property
    def usual_grid(self) -> Grid:
        """The grid of a tile, by the config's `downsample_rate`."""
        grid, rate = super().usual_grid, Fraction(self.model.config.downsample_rate)
        return Grid(int(grid.height * rate), int(grid.width * rate))

    @property
    def first_layer(self) -> int:
        """The layer after the last one that features are added before."""
        config = self.model.config
        deep = [layer for _, layer in config.deepstack_layer_map]
        return int(max([*deep, *config.spatial_target_layers])) + 1

    def idle_features(self) -> Tensor:
        """Return the features of every kind that a layer gets: of several of one layer, the last."""
        output = self.model.model.get_image_features(**self.empty_image(), return_dict=True)
        return torch.cat([one for features in dict(output.deepstack_features).values() for one in features])


class LlavaNextVideoFamily(LlavaNextFamily):
    """Images as in LLaVA-NeXT; the frames of a video are pooled, without newlines."""

    two_towers = True  # the newline is of images alone: in a batch of videos ZeRO stages would move it differently

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the frames, pooled by `spatial_pool_stride`; what it does not divide is cut off."""
        pixels, features = inputs.get("pixel_values_videos"), ready_features(inputs, "video")
        stride = int(self.model.config.spatial_pool_stride)
        frame = Grid(self.usual_grid.height // stride, self.usual_grid.width // stride)
        if pixels is not None:
            return [(frame,) * pixels.shape[1]] * len(pixels)
        return [(frame,) * len(one) for one in features] if features is not None else []

    def idle_video_features(self) -> Tensor:
        """Return the features of a video of one blank frame, which a pooler of its own may learn to pool."""
        pixels = self.blank(1, 1, self.model.config.vision_config.num_channels, *self.image_size)
        return flat_features(self.inner.get_video_features(pixels))


class LlavaOnevisionFamily(LlavaNextFamily):
    """A row's only image is tiled, one of several is a single tile; a video is its frames. Newlines end all three."""

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the images by `image_sizes`, and by `batch_num_images` where it says which of them are tiled."""
        sizes, features = sizes_of_images(inputs), ready_features(inputs, "image")
        counts = inputs.get("batch_num_images")
        if features is not None:  # their number decides, and `generate` gives no counts with them
            tiled = [len(one) != self.usual_grid.tokens + 1 for one in features]
        elif counts is not None:
            tiled = [count == 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]
        else:
            tiled = [True] * len(sizes)
        tiles = zip(sizes, tiled, strict=True)
        return [self.tiled_units(size) if one else (self.usual_grid, _NEWLINE) for size, one in tiles]

    def packed(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the same as LLaVA-NeXT, scaled down where they hold more than the N tiles of `anyres_max_N`."""
        height, width = super().packed(size)
        most = int(self.model.config.vision_aspect_ratio.rpartition("_")[2])
        ratio = math.sqrt(height * width / (most * self.usual_grid.height**2))
        if ratio > 1.1:
            return int(height // ratio), int(width // ratio)
        return height, width

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the frames, each pooled by two, then one newline."""
        pixels, features = inputs.get("pixel_values_videos"), ready_features(inputs, "video")
        frame = Grid(math.ceil(self.usual_grid.height / 2), math.ceil(self.usual_grid.width / 2))
        if pixels is not None:
            return [(frame,) * pixels.shape[1] + (_NEWLINE,)] * len(pixels)
        if features is None:
            return []
        return [(frame,) * ((len(one) - 1) // frame.tokens) + (_NEWLINE,) for one in features]
