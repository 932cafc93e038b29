"""Tiny random models whose tiles are images of their own: InternVL, Idefics3, SmolVLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    Qwen2Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

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

_SIDE = 18
# 6 x 6 patches, four of them one token. SmolVLM before 5.23 wants tokens in multiples of `patch_size`.
_VISION = VISION_SIZES | {"image_size": _SIDE, "patch_size": 3}
_TILES = {"image": 3, "small": 1, "video": 2}
_PLACEHOLDERS = [IMAGE] * 9
_APART = {kind: [SEPARATOR, *_PLACEHOLDERS] * count for kind, count in _TILES.items()}
# Tiles of an image in one run, frames of a video apart.
_IN_ONE_RUN = {kind: _PLACEHOLDERS * _TILES[kind] for kind in ("image", "small")} | {"video": _APART["video"]}
_UNITS = {kind: (Grid(3, 3),) * count for kind, count in _TILES.items()}

Batcher = Callable[[Sequence[Row], str, int, int], dict[str, Tensor]]


def _build_internvl(attention: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config={**_VISION, "model_type": "internvl_vision"},
        text_config=Qwen2Config(**TEXT_SIZES).to_dict(),
        image_token_id=IMAGE,
        image_seq_length=9,
        attn_implementation=attention,
        tie_word_embeddings=False,
    )
    config.pad_token_id = PAD
    return enlarge(InternVLForConditionalGeneration(config))


def _batch_internvl(rows: Sequence[Row], padding: str, seed: int, answer: int) -> dict[str, Tensor]:
    generator = generator_of(seed)
    batch, kinds = text_batch(rows, _IN_ONE_RUN, padding, generator, answer)
    tiles = sum(_TILES[kind] for row in kinds for kind in row)
    if tiles:
        batch["pixel_values"] = pixels(tiles, 3, _SIDE, _SIDE, generator=generator)
    return batch


def _builder(config_class: Any, model_class: Any) -> Callable[[str, int], nn.Module]:
    def build(attention: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = config_class(
            vision_config=_VISION,
            text_config=LlamaConfig(**TEXT_SIZES).to_dict(),
            image_token_id=IMAGE,
            scale_factor=2,
            attn_implementation=attention,
            pad_token_id=PAD,
        )
        return enlarge(model_class(config))

    return build


def _batch_idefics3(rows: Sequence[Row], padding: str, seed: int, answer: int) -> dict[str, Tensor]:
    generator = generator_of(seed)
    batch, kinds = text_batch(rows, _APART, padding, generator, answer)
    tiles = [sum(_TILES[kind] for kind in row) for row in kinds]
    if any(tiles):
        batch["pixel_values"] = pixels(len(rows), max(tiles), 3, _SIDE, _SIDE, generator=generator)
        for row, count in enumerate(tiles):  # the processor pads with images of zeros
            batch["pixel_values"][row, count:] = 0
    return batch


INTERNVL = TinyFamily("internvl", _build_internvl, _batch_internvl, _UNITS)
IDEFICS3 = TinyFamily(
    "idefics3",
    _builder(Idefics3Config, Idefics3ForConditionalGeneration),
    _batch_idefics3,
    {kind: _UNITS[kind] for kind in ("image", "small")},
)
SMOLVLM = TinyFamily("smolvlm", _builder(SmolVLMConfig, SmolVLMForConditionalGeneration), _batch_idefics3, _UNITS)
