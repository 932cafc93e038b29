"""LFM2-VL: images and tiles of any size as rows of patches, `spatial_shapes` beside them; a hybrid decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.compression.families.images import ImagesFamily, Units, ready_features
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid


class Lfm2VlFamily(ImagesFamily):
    """Every row of `pixel_values` is one unit, by its `spatial_shapes`; the projector merges neighbours."""

    one_size = False
    encodes_in_forward = True
    sizes_name = "spatial_shapes"

    @property
    def patches_per_side(self) -> int:
        """The config's `downsample_factor`."""
        return int(self.model.config.downsample_factor)

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units by `spatial_shapes`.

        Raises:
            UsageError: images come encoded, without these.
        """
        shapes, side = inputs.get("spatial_shapes"), self.patches_per_side
        if shapes is not None:
            return [(Grid(height // side, width // side),) for height, width in torch.as_tensor(shapes).tolist()]
        if inputs.get("pixel_values") is None and ready_features(inputs, "image") is None:
            return []
        raise UsageError("compression: the sizes of the images are not known; pass spatial_shapes")

    def empty_image(self) -> dict[str, Any]:
        """Return a blank image of one token."""
        vision, side = self.model.config.vision_config, self.patches_per_side
        pixels = self.blank(1, side * side, vision.num_channels * vision.patch_size**2)
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long, device=pixels.device),
            "spatial_shapes": torch.full((1, 2), side, device=pixels.device),
        }
