"""InternVL, Aya Vision, Cohere2 Vision, Ovis2: tiles of images and frames of videos, each a square of tokens."""

from __future__ import annotations

from orchestrator.compression.families.images import ImagesFamily


class InternVLFamily(ImagesFamily):
    """Every entry of `pixel_values` is one unit; frames of a video have the placeholder of images."""

    projector_name = "multi_modal_projector"

    @property
    def patches_per_side(self) -> int:
        """One over `downsample_ratio`."""
        return round(1 / self.model.config.downsample_ratio)


class AyaVisionFamily(ImagesFamily):
    """Every entry of `pixel_values` is one unit; the projector itself merges neighbours (Cohere2 Vision: the same)."""

    @property
    def patches_per_side(self) -> int:
        """The config's `downsample_factor`."""
        return int(self.model.config.downsample_factor)


class Ovis2Family(ImagesFamily):
    """Every entry of `pixel_values` is one unit of soft tokens; indicators around it are text of their own ids."""

    @property
    def patches_per_side(self) -> int:
        """The tower's `hidden_stride`."""
        return int(self.model.config.vision_config.hidden_stride)
