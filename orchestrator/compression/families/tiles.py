"""Tiles of images and frames of videos as images of their own: InternVL, Aya Vision, Llama 4, GOT-OCR 2 and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.families.images import ImagesFamily, Units, flat_features, pair, ready_features
from orchestrator.spec.components import Grid


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

    def idle_features(self) -> Tensor:
        """Return the features of a blank image and of the indicators, which are made with them."""
        output = self.inner.get_image_features(**self.empty_image())
        return torch.cat([flat_features(output), output.visual_indicator_features.flatten(0, -2)])


class Llama4Family(ImagesFamily):
    """Every entry of `pixel_values` is one unit; tower, projector and a causal LM stand side by side in the top model.

    Some layers attend within chunks of `attention_chunk_size` tokens, counted in the tokens that are left.
    """

    projector_name = "multi_modal_projector"
    encodes_in_forward = True

    def find_language_model(self) -> nn.Module:
        """Return the decoder inside the causal LM."""
        decoder: nn.Module = self.outer_language_model.get_submodule("model")
        return decoder

    @property
    def outer_language_model(self) -> nn.Module:
        """The causal LM."""
        return super().find_language_model()

    @property
    def patches_per_side(self) -> int:
        """One over the tower's `pixel_shuffle_ratio`."""
        return round(1 / self.model.config.vision_config.pixel_shuffle_ratio)

    @property
    def vision_width(self) -> int:
        """Width of what the tower's own adapter gives."""
        return int(self.model.config.vision_config.vision_output_dim)

    def idle_features(self) -> Tensor:
        """Return the features of a blank image; the projector is called beside `get_image_features`."""
        features: Tensor = self.model.multi_modal_projector(
            self.model.vision_model(**self.empty_image()).last_hidden_state
        )
        return features.flatten(0, -2)


class GotOcr2Family(ImagesFamily):
    """Every entry of `pixel_values` is one unit; two convolutions of stride 2 merge neighbours, the last ones too."""

    def grid_of(self, height_pixels: int, width_pixels: int) -> Grid:
        """Return the grid of an image; what four patches do not divide is rounded up."""
        height, width = pair(self.model.config.vision_config.patch_size)
        return Grid(-(-height_pixels // height // 4), -(-width_pixels // width // 4))


class Step3p7Family(GotOcr2Family):
    """An image is its local views, each one unit, and then the whole."""

    encodes_in_forward = True

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units of each image by `num_local_patches`."""
        counts, whole = inputs.get("num_local_patches"), super().image_units(inputs)
        if counts is None or inputs.get("pixel_values_local") is None:
            return whole
        view = self.grid_of(*inputs["pixel_values_local"].shape[-2:])
        return [(view,) * count + units for count, units in zip(torch.as_tensor(counts).tolist(), whole, strict=True)]


class AriaFamily(ImagesFamily):
    """Every entry of `pixel_values` is one unit of as many queries as the config has for its patches, in one row."""

    def grid_of(self, height_pixels: int, width_pixels: int) -> Grid:
        """Return the queries by `projector_patch_to_query_dict`."""
        return Grid(
            1, self.model.config.projector_patch_to_query_dict[super().grid_of(height_pixels, width_pixels).tokens]
        )

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return one unit for each entry of `pixel_values`, or of ready features."""
        features = ready_features(inputs, "image")
        return super().image_units(inputs) if features is None else [(Grid(1, len(one)),) for one in features]
