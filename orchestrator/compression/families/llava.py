"""LLaVA 1.5, VipLLaVA and Video-LLaVA: every image a fixed grid, or by `image_sizes` (Pixtral); a video is frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from orchestrator.compression.families.base import Tower
from orchestrator.compression.families.images import (
    ImagesFamily,
    Units,
    flat_features,
    pair,
    ready_features,
    size_of,
    sizes_of_images,
)
from orchestrator.spec.components import Grid
from orchestrator.spec.model_facts import PLAIN_TOWERS


class LlavaFamily(ImagesFamily):
    """Images are runs of `image_token_id`; their number of tokens follows from the pixels and the patch size."""

    sized = True
    projector_name: ClassVar[str | None] = "multi_modal_projector"

    def grid_of(self, height_pixels: int, width_pixels: int) -> Grid:
        """Return the grid of an image, from its size in pixels; one row where the CLS token is among its tokens."""
        grid = super().grid_of(height_pixels, width_pixels)
        return Grid(1, grid.tokens + 1) if self.keeps_cls() else grid

    def keeps_cls(self) -> bool:
        """Return whether the CLS token of the vision tower is a visual token too."""
        config = self.model.config
        strategy = getattr(config, "vision_feature_select_strategy", "default")  # VipLLaVA always leaves it out
        return strategy == "full" and "clip" in config.vision_config.model_type

    @property
    def feature_layers(self) -> list[int]:
        """The vision tower's hidden states that the projector takes."""
        config: Any = self.model.config
        layers = (
            config.vision_feature_layer if hasattr(config, "vision_feature_layer") else config.vision_feature_layers
        )
        return list(layers) if isinstance(layers, (list, tuple)) else [int(layers)]

    def cls_attention(self) -> Any:
        """Return that of the last tower layer whose output is used, where one tower serves all and is a CLIP."""
        config, tower = self.model.config, getattr(self.model.model, "vision_tower", None)
        if tower is None or config.vision_config.model_type != "clip_vision_model":
            return None
        layers = getattr(tower, "vision_model", tower).encoder.layers
        # Hidden state 0 is what enters the first layer; state n is what layer n - 1 gives.
        states = [state % (len(layers) + 1) for state in self.feature_layers]
        return layers[max(states) - 1].self_attn if max(states) else None

    @property
    def tower(self) -> Tower:
        """A CLIP or SigLIP of which each patch is one visual token; all used layers lie behind the points.

        Raises:
            UsageError: the tower is another one, or gives other tokens than its patches.
        """
        config, kind = self.model.config, self.model.config.vision_config.model_type
        front = int(kind == "clip_vision_model")
        drops = getattr(config, "vision_feature_select_strategy", "default") == "default"
        if self.tower_refusal or kind not in PLAIN_TOWERS or bool(front) != drops:
            raise self.no_tower_points()
        tower = self.model.model.vision_tower
        encoder = getattr(tower, "vision_model", tower).encoder
        states = len(encoder.layers) + 1
        return Tower(encoder, front, min(state % states for state in self.feature_layers))

    @property
    def vision_width(self) -> int | None:
        """Features of several tower layers lie side by side."""
        width = super().vision_width
        return None if width is None else width * len(self.feature_layers)

    @property
    def resizable_tower(self) -> nn.Module | None:
        """CLIP and SigLIP interpolate their position embeddings; the CLS token is no patch."""
        if self.model.config.vision_config.model_type not in PLAIN_TOWERS or self.keeps_cls():
            return None
        tower: nn.Module = self.model.model.vision_tower
        return tower

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return one unit for each image, by `image_sizes`, the shape of `pixel_values`, or ready features."""
        pixels, features = inputs.get("pixel_values"), ready_features(inputs, "image")
        if inputs.get("image_sizes") is None:
            if pixels is not None:
                return [(self.grid_of(pixels.shape[-2], pixels.shape[-1]),)] * len(pixels)
            usual = self.usual_grid
            if features is not None and all(len(one) == usual.tokens and size_of(one) is None for one in features):
                return [(usual,)] * len(features)
        return [(self.grid_of(*size),) for size in sizes_of_images(inputs)]

    def empty_image(self) -> dict[str, Any]:
        """Return one image; of a single patch where the vision tower takes any size."""
        vision = self.model.config.vision_config
        size = pair(vision.patch_size) if vision.model_type == "pixtral" else self.image_size
        return {"pixel_values": self.blank(1, vision.num_channels, *size)}


class VideoLlavaFamily(LlavaFamily):
    """Images as in LLaVA; a frame of a video is its CLS token, alone, and then the grid of its patches."""

    sized = False
    two_towers = True
    projector_name: ClassVar[str | None] = None  # images pass it before videos, not in the order of the rows

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units by the shape of the pixels, called `pixel_values_images` before transformers 5.23."""
        older = inputs.get("pixel_values_images")
        if older is not None:
            inputs = {**inputs, "pixel_values": older}
        return super().image_units(inputs)

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the frames of each video; ready features do not separate videos, so each frame counts as one."""
        pixels, features = inputs.get("pixel_values_videos"), ready_features(inputs, "video")
        if pixels is not None:
            return [self._frame(pixels.shape[-2], pixels.shape[-1]) * pixels.shape[1]] * len(pixels)
        return [self._frame(*self.image_size)] * (len(features) if features is not None else 0)

    def _frame(self, height_pixels: int, width_pixels: int) -> Units:
        return Grid(1, 1), ImagesFamily.grid_of(self, height_pixels, width_pixels)

    @property
    def resizable_tower(self) -> None:
        """There are two."""
        return None

    def idle_features(self) -> Tensor:
        """Return the features of a blank image; the tower of videos is another one."""
        return flat_features(self.model.model.get_image_features(self.empty_image()["pixel_values"]))

    def idle_video_features(self) -> Tensor:
        """Return the features of a video of one blank frame."""
        pixels = self.empty_image()["pixel_values"].unsqueeze(1)
        return flat_features(self.model.model.get_video_features(pixels))
