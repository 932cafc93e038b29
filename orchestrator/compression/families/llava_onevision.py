"""LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`): tiles as in LLaVA-NeXT, several images, and video."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.compression.families.images import Units, ready_features, sizes_of_images
from orchestrator.compression.families.llava_next import LlavaNextFamily
from orchestrator.spec.components import Grid

_NEWLINE = Grid(1, 1)


class LlavaOnevisionFamily(LlavaNextFamily):
    """A row's only image is tiled, one of several is a single tile; a video is its frames. Newlines end all three."""

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """From `image_sizes`, and `batch_num_images` where it says which images are tiled."""
        sizes, features = sizes_of_images(inputs), ready_features(inputs, "image")
        counts = inputs.get("batch_num_images")
        if features is not None:  # they tell, and `generate` gives no counts with them
            tiled = [len(one) != self.tile.tokens + 1 for one in features]
        elif counts is not None:
            tiled = [count == 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]
        else:
            tiled = [True] * len(sizes)
        tiles = zip(sizes, tiled, strict=True)
        return [self.tiled_units(size) if one else (self.tile, _NEWLINE) for size, one in tiles]

    def packed(self, size: tuple[int, int]) -> tuple[int, int]:
        """As in LLaVA-NeXT, scaled down where they hold more than the N tiles of `anyres_max_N`."""
        height, width = super().packed(size)
        most = int(self.model.config.vision_aspect_ratio.rpartition("_")[2])
        ratio = math.sqrt(height * width / (most * self.tile.height**2))
        if ratio > 1.1:
            return int(height // ratio), int(width // ratio)
        return height, width

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the frames, each pooled by two, then one newline."""
        pixels, features = inputs.get("pixel_values_videos"), ready_features(inputs, "video")
        frame = Grid(math.ceil(self.tile.height / 2), math.ceil(self.tile.width / 2))
        if pixels is not None:
            return [(frame,) * pixels.shape[1] + (_NEWLINE,)] * len(pixels)
        if features is None:
            return []
        return [(frame,) * ((len(one) - 1) // frame.tokens) + (_NEWLINE,) for one in features]
