"""Tiny random Mistral 3: a Pixtral tower, merged patches, a break token after each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

from orchestrator.compression.testing.tiny import Row, TinyFamily
from orchestrator.compression.testing.tiny_images import (
    IMAGE,
    PAD,
    SEPARATOR,
    TEXT_SIZES,
    VISION_SIZES,
    enlarge,
    generator_of,
    pixels,
    text_batch,
)
from orchestrator.spec.components import Grid

_UNITS = {"image": (Grid(3, 4),), "small": (Grid(2, 2),)}  # patches of 4 pixels, 2 x 2 of them one token
_TOKENS = {kind: ([IMAGE] * grid.width + [SEPARATOR]) * grid.height for kind, (grid,) in _UNITS.items()}


def _build(attention: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    vision = PixtralVisionConfig(**VISION_SIZES, image_size=32, patch_size=4)
    config = Mistral3Config(
        vision_config=vision.to_dict(),
        text_config=MistralConfig(**TEXT_SIZES).to_dict(),
        image_token_id=IMAGE,
        spatial_merge_size=2,
        attn_implementation=attention,
    )
    config.pad_token_id = PAD
    return enlarge(Mistral3ForConditionalGeneration(config))


def _batch(rows: Sequence[Row], padding: str, seed: int, answer: int) -> dict[str, Tensor]:
    generator = generator_of(seed)
    batch, kinds = text_batch(rows, _TOKENS, padding, generator, answer)
    sizes = [[8 * grid.height, 8 * grid.width] for row in kinds for kind in row for grid in _UNITS[kind]]
    if sizes:
        batch["pixel_values"] = pixels(len(sizes), 3, 24, 32, generator=generator)
        batch["image_sizes"] = torch.tensor(sizes)
    return batch


MISTRAL3 = TinyFamily("mistral3", _build, _batch, _UNITS)
