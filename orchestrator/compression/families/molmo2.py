"""Molmo 2: an image in low and in high resolution, each a grid; all visual tokens of a row see one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.compression.families.images import ImagesFamily, Units, ready_features
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid


class Molmo2Family(ImagesFamily):
    """Patches are pooled by indices that the processor gives; a batch holds images or videos, of one placeholder."""

    one_size = False
    encodes_in_forward = True
    sizes_name = "image_grids"
    remakes_masks = True

    @property
    def token_ids(self) -> tuple[int | None, int | None]:
        """The placeholder of images, which is that of videos too."""
        return super().token_ids[0], None

    def block_ids_BN(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return one block, the tokens of `mm_token_type_ids` 1: of all images, with those that begin and end rows."""
        types_BN, cache = inputs.get("mm_token_type_ids"), inputs.get("past_key_values")
        features = [inputs.get(name) for name in ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")]
        is_later = cache is not None and cache.is_initialized and all(one is None for one in features)
        return None if types_BN is None or is_later else torch.where(types_BN == 1, 0, -1)

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the grids of low and high resolution by `image_grids`.

        Raises:
            UsageError: images come encoded, without these.
        """
        grids = inputs.get("image_grids")
        if grids is None and any(ready_features(inputs, kind) is not None for kind in ("image", "video")):
            raise UsageError("compression: the grids of the images are not known; pass image_grids (video_grids)")
        found = [] if grids is None else torch.as_tensor(grids).tolist()
        return [(Grid(low_h, low_w), Grid(high_h, high_w)) for low_h, low_w, high_h, high_w in found]

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the frames by `video_grids`."""
        grids = inputs.get("video_grids")
        found = [] if grids is None else torch.as_tensor(grids).tolist()
        return [(Grid(height, width),) * frames for frames, height, width in found]

    def empty_image(self) -> dict[str, Any]:
        """Return a blank crop, of which one patch is a token."""
        vision = self.model.config.vision_config
        height, width = vision.image_size
        patches = (height // vision.patch_size) * (width // vision.patch_size)
        pixels = self.blank(1, patches, vision.num_channels * vision.patch_size**2)
        return {
            "pixel_values": pixels,
            "image_token_pooling": torch.zeros(1, 1, dtype=torch.long, device=pixels.device),
            "image_grids": torch.tensor([[1, 1, 0, 0]], device=pixels.device),
        }
