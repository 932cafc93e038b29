"""Idefics3 and SmolVLM: tiles of an image (frames of a video) as images of their own, text between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from orchestrator.compression.families.images import ImagesFamily, Units, pair, ready_features
from orchestrator.spec.components import Grid


class Idefics3Family(ImagesFamily):
    """Every tile is one unit. `pixel_values` are padded to the row with most tiles, so placeholders count them."""

    language_name = "text_model"

    def _tile(self, inputs: Mapping[str, Any]) -> Grid:
        pixels, config = inputs.get("pixel_values"), self.model.config
        sizes = self.image_size if pixels is None else pixels.shape[-2:]
        patches = zip(sizes, pair(config.vision_config.patch_size), strict=True)
        height, width = (size // patch // config.scale_factor for size, patch in patches)
        return Grid(int(height), int(width))

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """As many tiles as placeholders ask for: which of the pixels are padding stands in their values."""
        if inputs.get("pixel_values") is None and ready_features(inputs, "image") is None:
            return []
        tile = self._tile(inputs)
        return [(tile,)] * (int(self.visual_BN(inputs["input_ids"]).sum()) // tile.tokens)

    def units_unseen(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """Return the tiles of the usual size."""
        tile = self._tile(inputs)
        return [tile] * (num_placeholders // tile.tokens)

    def empty_image(self) -> dict[str, Any]:
        """Return one tile of one row."""
        return {"pixel_values": self.blank(1, 1, self.model.config.vision_config.num_channels, *self.image_size)}

    @property
    def projector(self) -> nn.Module:
        """The connector's map, behind its unshuffling."""
        projector: nn.Module = self.model.model.connector.modality_projection
        return projector

    @property
    def vision_width(self) -> int:
        """Patches that were put together lie side by side."""
        config = self.model.config
        return int(config.vision_config.hidden_size * config.scale_factor**2)
