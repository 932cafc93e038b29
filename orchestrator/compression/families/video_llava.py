"""Video-LLaVA (`VideoLlavaForConditionalGeneration`): images as in LLaVA; a video is frames with CLS tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from orchestrator.compression.families.images import Units, flat_features, ready_features
from orchestrator.compression.families.llava import LlavaFamily
from orchestrator.spec.components import Grid


class VideoLlavaFamily(LlavaFamily):
    """A frame is its CLS token, alone, and then the grid of its patches."""

    sized = False

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """From the shape of the pixels, which were called `pixel_values_images` before transformers 5.23."""
        older = inputs.get("pixel_values_images")
        if older is not None:
            inputs = {**inputs, "pixel_values": older}
        return super().image_units(inputs)

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Frames of each video; ready features do not tell videos apart, so each of their frames stands for one."""
        pixels, features = inputs.get("pixel_values_videos"), ready_features(inputs, "video")
        if pixels is not None:
            return [self._frame(pixels.shape[-2], pixels.shape[-1]) * pixels.shape[1]] * len(pixels)
        return [self._frame(*self.image_size)] * (len(features) if features is not None else 0)

    def _frame(self, height_pixels: int, width_pixels: int) -> Units:
        patch = self.model.config.vision_config.patch_size
        return Grid(1, 1), Grid(height_pixels // patch, width_pixels // patch)

    @property
    def projector(self) -> None:
        """Images and videos pass it one after the other, not in the order of the rows."""
        return None

    @property
    def vision_width(self) -> None:
        """None without `projector`."""
        return None

    @property
    def resizable_tower(self) -> None:
        """There are two."""
        return None

    def idle_features(self) -> Tensor:
        """Return the features of a blank image; the tower of videos is another one."""
        return flat_features(self.model.model.get_image_features(self.empty_image()["pixel_values"]))
