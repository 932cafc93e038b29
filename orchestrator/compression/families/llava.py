"""LLaVA 1.5 and relatives (`LlavaForConditionalGeneration`): every image a fixed grid, or `image_sizes` (Pixtral)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.families.base import Family
from orchestrator.spec.components import Grid


class LlavaFamily(Family):
    """Images are runs of `image_token_id`; their number of tokens follows from the pixels and the patch size."""

    def find_language_model(self) -> nn.Module:
        """`model.language_model`."""
        inner = getattr(self.model, "model", None)
        language_model = getattr(inner, "language_model", None)
        if not isinstance(language_model, nn.Module):
            raise self.cannot_serve("it has no model.language_model")
        if getattr(self.model.config, "image_token_id", None) is None:
            raise self.cannot_serve("its config has no image_token_id")
        return language_model

    def visual_BN(self, input_ids_BN: Tensor) -> Tensor:
        """True at `image_token_id`."""
        mask_BN: Tensor = input_ids_BN == self.model.config.image_token_id
        return mask_BN

    def _grid(self, height_pixels: int, width_pixels: int) -> Grid:
        vision = self.model.config.vision_config
        grid = Grid(height_pixels // vision.patch_size, width_pixels // vision.patch_size)
        if self._keeps_cls():
            return Grid(1, grid.tokens + 1)
        return grid

    def _keeps_cls(self) -> bool:
        config: Any = self.model.config
        return config.vision_feature_select_strategy == "full" and "clip" in config.vision_config.model_type

    def _default_grid(self) -> Grid:
        size = self.model.config.vision_config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return self._grid(int(height), int(width))

    def grids(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """From `image_sizes`, the shape of `pixel_values`, ready features, or the config."""
        pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
        if sizes is not None:
            return [self._grid(int(height), int(width)) for height, width in torch.as_tensor(sizes).tolist()]
        if pixels is not None:
            return [self._grid(pixels.shape[-2], pixels.shape[-1])] * len(pixels)
        grid = self._default_grid()
        ready = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if ready is not None:
            features = ready.pooler_output
            return [grid if len(one) == grid.tokens else Grid(1, len(one)) for one in features]
        return [grid] * (num_placeholders // grid.tokens)

    def num_visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Images times tokens."""
        if inputs.get("pixel_values") is None and not (inputs.get("mm_encoder_outputs") or {}).get("image"):
            return 0
        return sum(grid.tokens for grid in self.grids(inputs, 0))

    def idle_features(self) -> Tensor:
        """Features of one black image."""
        vision: Any = self.model.config.vision_config
        size = vision.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        parameter = next(self.model.parameters())
        pixels = torch.zeros(1, vision.num_channels, height, width, device=parameter.device, dtype=parameter.dtype)
        features = self.model.model.get_image_features(pixel_values=pixels).pooler_output
        return torch.cat(list(features))
