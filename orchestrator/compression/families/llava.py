"""LLaVA 1.5 and relatives (`LlavaForConditionalGeneration`): every image a fixed grid, or `image_sizes` (Pixtral)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from orchestrator.compression.families.images import ImagesFamily, Units, pair, ready_features, size_of, sizes_of_images
from orchestrator.spec.components import Grid

_RESIZABLE = ("clip_vision_model", "siglip_vision_model")


class LlavaFamily(ImagesFamily):
    """Images are runs of `image_token_id`; their number of tokens follows from the pixels and the patch size."""

    sized = True

    def grid_of(self, height_pixels: int, width_pixels: int) -> Grid:
        """Return the grid of an image, from its size in pixels."""
        height, width = pair(self.model.config.vision_config.patch_size)
        grid = Grid(height_pixels // height, width_pixels // width)
        if self.keeps_cls():
            return Grid(1, grid.tokens + 1)
        return grid

    def keeps_cls(self) -> bool:
        """Return whether the CLS token of the vision tower is a visual token too."""
        config: Any = self.model.config
        return config.vision_feature_select_strategy == "full" and "clip" in config.vision_config.model_type

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
    def projector(self) -> nn.Module | None:
        """It maps features token by token, and gives one for every placeholder."""
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    @property
    def vision_width(self) -> int | None:
        """Features of several tower layers lie side by side."""
        return int(self.model.config.vision_config.hidden_size) * len(self.feature_layers)

    @property
    def resizable_tower(self) -> nn.Module | None:
        """CLIP and SigLIP interpolate their position embeddings; the CLS token is no patch."""
        if self.model.config.vision_config.model_type not in _RESIZABLE or self.keeps_cls():
            return None
        tower: nn.Module = self.model.model.vision_tower
        return tower

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """From `image_sizes`, the shape of `pixel_values`, or ready features; one unit for each image."""
        pixels, features = inputs.get("pixel_values"), ready_features(inputs, "image")
        if inputs.get("image_sizes") is None:
            if pixels is not None:
                return [(self.grid_of(pixels.shape[-2], pixels.shape[-1]),)] * len(pixels)
            usual = self.grid_of(*self.image_size)
            if features is not None and all(len(one) == usual.tokens and size_of(one) is None for one in features):
                return [(usual,)] * len(features)
        return [(self.grid_of(*size),) for size in sizes_of_images(inputs)]

    def units_unseen(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """Return the images of the usual size."""
        usual = self.grid_of(*self.image_size)
        return [usual] * (num_placeholders // usual.tokens)

    def empty_image(self) -> dict[str, Any]:
        """Return one image; of a single patch where the vision tower takes any size."""
        vision = self.model.config.vision_config
        size = pair(vision.patch_size) if vision.model_type == "pixtral" else self.image_size
        return {"pixel_values": self.blank(1, vision.num_channels, *size)}
