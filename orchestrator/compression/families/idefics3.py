"""Idefics3 and SmolVLM: tiles of an image (frames of a video) as images of their own, text between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.compression.families.images import ImagesFamily, Units, ready_features


class Idefics3Family(ImagesFamily):
    """Every tile is one unit. `pixel_values` are padded to the row with most tiles, so placeholders count them."""

    language_name = "text_model"
    projector_name = "connector.modality_projection"
    pixels_by_row = True

    @property
    def patches_per_side(self) -> int:
        """The connector's `scale_factor`."""
        return int(self.model.config.scale_factor)

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return as many tiles as placeholders ask for: which of the pixels are padding stands in their values."""
        pixels = inputs.get("pixel_values")
        if pixels is None and ready_features(inputs, "image") is None:
            return []
        tile = self.usual_grid if pixels is None else self.grid_of(*pixels.shape[-2:])
        return [(tile,)] * (int(self.visual_BN(inputs["input_ids"]).sum()) // tile.tokens)

    def empty_image(self) -> dict[str, Any]:
        """Return one tile of one row."""
        return {"pixel_values": self.blank(1, 1, self.model.config.vision_config.num_channels, *self.image_size)}
