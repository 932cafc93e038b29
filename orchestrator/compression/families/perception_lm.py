"""Perception LM: tiles of an image and frames of a video, each a square of tokens; a tower of timm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.compression.families.images import ImagesFamily, Units, pair, ready_features
from orchestrator.spec.components import Grid


class PerceptionLMFamily(ImagesFamily):
    """Every tile of an image (the image as a whole is the first) and every frame of a video is one unit."""

    @property
    def patches_per_side(self) -> int:
        """The config's `projector_pooling_ratio`."""
        return int(self.model.config.projector_pooling_ratio)

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels (height, width) that the tower is made for; its config leaves them to timm."""
        return pair(self.inner.vision_tower.timm_model.patch_embed.img_size)

    def grid_of(self, height_pixels: int, width_pixels: int) -> Grid:
        """Return the grid of a tile or frame; the patch size stands in the tower."""
        height, width = pair(self.inner.vision_tower.timm_model.patch_embed.patch_size)
        side = self.patches_per_side
        return Grid(height_pixels // height // side, width_pixels // width // side)

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the tiles of each image; ready features do not say which tiles are of one image."""
        return self._units(inputs, "image", inputs.get("pixel_values"))

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the frames of each video; ready features do not separate videos, so each frame counts as one."""
        return self._units(inputs, "video", inputs.get("pixel_values_videos"))

    def _units(self, inputs: Mapping[str, Any], kind: str, pixels: Any) -> list[Units]:
        if pixels is not None:
            return [(self.grid_of(*pixels.shape[-2:]),) * pixels.shape[1]] * len(pixels)
        features = ready_features(inputs, kind)
        if features is None:
            return []
        side = math.isqrt(features.shape[1])
        return [(Grid(side, side),)] * len(features)

    def empty_image(self) -> dict[str, Any]:
        """Return a blank image of one tile."""
        return {"pixel_values": self.blank(1, 1, 3, *self.image_size)}
