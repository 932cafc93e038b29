"""Qwen3-VL (`Qwen3VLForConditionalGeneration`, and with experts): visual features enter the first layers too.

DeepStack (Meng et al., 2024, section 3): features of intermediate layers of the tower are added to the visual tokens
after the first decoder layers; as many as there are such features, all visual tokens must be there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orchestrator.compression.families.qwen2_vl import Qwen2VLFamily

_DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")


class Qwen3VLFamily(Qwen2VLFamily):
    """Frames of a video are runs of their own, with a time stamp in text before each."""

    @property
    def first_layer(self) -> int:
        """The layer after the last one that DeepStack adds to."""
        return len(self.model.config.vision_config.deepstack_visual_indexes)

    def segment_options(self, options: dict[str, Any], first: int) -> dict[str, Any]:
        """DeepStack's features go to the first segment alone: a slice's layers are counted from 0 again."""
        if first == 0:
            return options
        return {name: value for name, value in options.items() if name not in _DEEPSTACK}

    def idle_features(self) -> Tensor:
        """With those for DeepStack, whose mergers must be run by every rank too."""
        output = self.model.model.get_image_features(**self.empty_image(), return_dict=True)
        deep = [feature for level in output.deepstack_features for feature in level]
        return torch.cat([*output.pooler_output, *deep])
