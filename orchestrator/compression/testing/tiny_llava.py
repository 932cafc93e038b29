"""Tiny random LLaVA (CLIP tower) and LLaVA with a Pixtral tower (images of any size)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Config,
)

from orchestrator.compression.testing.tiny import Row, TinyFamily
from orchestrator.compression.testing.tiny_images import (
    IMAGE,
    PAD,
    SEPARATOR,
    SIZES,
    TEXT_SIZES,
    VISION_SIZES,
    enlarge,
    generator_of,
    pixels,
    text_batch,
)
from orchestrator.spec.components import Grid

_TEXT = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
_PIXTRAL = {"image": (24, 32), "small": (16, 16)}  # pixels; patches of 8


def tiny_llava(
    attention: str = "eager", text: str = "llama", layers: int = 4, seed: int = 0, **text_options: Any
) -> nn.Module:
    """Return a random LLaVA of 3 x 3 visual tokens per image.

    Args:
        attention: Attention implementation.
        text: Type of the language model: `llama`, `qwen2` or `mistral`.
        layers: Decoder layers.
        seed: Seed of the weights.
        **text_options: Further values of the language model's config.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(**VISION_SIZES, image_size=24, patch_size=8)
    options = {"num_hidden_layers": layers, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": PAD}
    return _model(vision, _TEXT[text](**(SIZES | options | text_options)), attention)


def _model(vision: Any, text: Any, attention: str, **options: Any) -> nn.Module:
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=IMAGE,
        attn_implementation=attention,
        **options,
    )
    config.pad_token_id = PAD
    return enlarge(LlavaForConditionalGeneration(config))


def _build(attention: str, seed: int) -> nn.Module:
    return tiny_llava(attention, seed=seed)


def _batch(rows: Sequence[Row], padding: str, seed: int, answer: int) -> dict[str, Tensor]:
    generator = generator_of(seed)
    batch, kinds = text_batch(rows, {"image": [IMAGE] * 9}, padding, generator, answer)
    images = sum(map(len, kinds))
    if images:
        batch["pixel_values"] = pixels(images, 3, 24, 24, generator=generator)
    return batch


def _build_pixtral(attention: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    vision = PixtralVisionConfig(**VISION_SIZES, image_size=32, patch_size=8)
    options = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}  # it has no CLS token
    return _model(vision, LlamaConfig(**TEXT_SIZES), attention, **options)


def _batch_pixtral(rows: Sequence[Row], padding: str, seed: int, answer: int) -> dict[str, Tensor]:
    generator = generator_of(seed)
    # As Pixtral's processor has it: a token of its own ends each row of patches.
    tokens = {
        kind: ([IMAGE] * (width // 8) + [SEPARATOR]) * (height // 8) for kind, (height, width) in _PIXTRAL.items()
    }
    batch, kinds = text_batch(rows, tokens, padding, generator, answer)
    sizes = [_PIXTRAL[kind] for row in kinds for kind in row]
    if sizes:
        batch["pixel_values"] = pixels(len(sizes), 3, 24, 32, generator=generator)
        batch["image_sizes"] = torch.tensor(sizes)
    return batch


LLAVA = TinyFamily("llava", _build, _batch, {"image": (Grid(3, 3),)})
LLAVA_PIXTRAL = TinyFamily("llava", _build_pixtral, _batch_pixtral, {"image": (Grid(3, 4),), "small": (Grid(2, 2),)})
