"""Counts the tokens of micro-batches: visual ones summed over decoder layers, as the compressor leaves them, and text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from orchestrator import registry
from orchestrator.spec.components import Grid


class TokenCounter:
    """Counts by the compressors' own `kept_tokens`, from `input_ids` alone.

    Args:
        config: The model's config.
    """

    def __init__(self, config: Any) -> None:
        text_config = config.get_text_config()
        self.num_layers: int = text_config.num_hidden_layers
        self._image_token: int = config.image_token_id
        self._by_points: dict[str, dict[int, int]] = {}

    def count(self, tensors: dict[str, torch.Tensor], points: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """Visual layer-tokens and text tokens of a micro-batch, both summed over its samples."""
        is_visual_BT = tensors["input_ids"] == self._image_token
        visual = int(is_visual_BT.sum())
        text = int(tensors["attention_mask"].sum()) - visual
        if not visual:
            return 0.0, float(text)
        images = len(tensors["pixel_values"])
        return float(images * self._layer_tokens(visual // images, points)), float(text)

    def _layer_tokens(self, image_tokens: int, points: Sequence[dict[str, Any]]) -> int:
        known = self._by_points.setdefault(repr(points), {})
        if image_tokens not in known:
            known[image_tokens] = visual_layer_tokens(image_tokens, points, self.num_layers)
        return known[image_tokens]


def visual_layer_tokens(image_tokens: int, points: Sequence[dict[str, Any]], num_layers: int) -> int:
    """Visual tokens of one image summed over the decoder's layers, `sum_l n_l`.

    Each point acts on what the one before left.
    """
    specs = [registry.spec_class(registry.COMPRESSORS, point["kind"]).model_validate(point) for point in points]
    at_layer: dict[int, list[Any]] = {}
    for spec in specs:
        layer = 0 if spec.layer == "projector" else spec.layer_index(num_layers)
        at_layer.setdefault(layer, []).append(spec)
    total, grid = 0, _square(image_tokens)
    for layer in range(num_layers):
        for spec in at_layer.get(layer, []):
            grid = Grid(1, spec.kept_tokens(grid))
        total += grid.tokens
    return total


def _square(tokens: int) -> Grid:
    side = math.isqrt(tokens)
    return Grid(side, side) if side * side == tokens else Grid(1, tokens)
