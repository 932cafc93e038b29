"""InternVL (`InternVLForConditionalGeneration`): tiles of images and frames of videos, each a square of tokens."""

from __future__ import annotations

from orchestrator.compression.families.images import ImagesFamily


class InternVLFamily(ImagesFamily):
    """Every entry of `pixel_values` is one unit; frames of a video have the placeholder of images."""

    projector_name = "multi_modal_projector"

    @property
    def patches_per_side(self) -> int:
        """One over `downsample_ratio`."""
        return round(1 / self.model.config.downsample_ratio)
