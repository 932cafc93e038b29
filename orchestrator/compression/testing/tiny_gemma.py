"""Tiny random PaliGemma (1 and 2) and Gemma 3: images that see themselves both ways, sliding windows that matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from orchestrator.compression.testing.tiny import Row, TinyFamily
from orchestrator.compression.testing.tiny_images import (
    IMAGE,
    SEPARATOR,
    TEXT_SIZES,
    VISION_SIZES,
    enlarge,
    generator_of,
    pixels,
    text_batch,
)
from orchestrator.spec.components import Grid

# Shorter than an image, so that it cuts within images and between image and answer.
_WINDOW = 7
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _paligemma(text: Any, attention: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION_SIZES, image_size=24, patch_size=8, vision_use_head=False).to_dict(),
        text_config=text.to_dict(),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=TEXT_SIZES["vocab_size"],
        attn_implementation=attention,
    )
    return enlarge(PaliGemmaForConditionalGeneration(config))


def _build_1(attention: str, seed: int) -> nn.Module:
    return _paligemma(GemmaConfig(**TEXT_SIZES, head_dim=8), attention, seed)


def _build_2(attention: str, seed: int) -> nn.Module:
    text = Gemma2Config(
        **TEXT_SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=_WINDOW,
        layer_types=[_SLIDING, _FULL, _SLIDING, _FULL],
        attn_logit_softcapping=20.0,
        final_logit_softcapping=5.0,
    )
    return _paligemma(text, attention, seed)


def _build_gemma3(attention: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    text = Gemma3TextConfig(
        **TEXT_SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=_WINDOW,
        layer_types=[_SLIDING, _FULL, _SLIDING, _SLIDING],
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION_SIZES, image_size=48, patch_size=8, vision_use_head=False).to_dict(),
        text_config=text.to_dict(),
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=SEPARATOR,
        eoi_token_index=SEPARATOR,
        attn_implementation=attention,
    )
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # the model starts it at zero
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.1)
    return enlarge(model)


def _batch_paligemma(rows: Sequence[Row], padding: str, seed: int, answer: int) -> dict[str, Tensor]:
    """Return the answer is the suffix, of type 1; all before it, padding too, of type 0."""
    generator = generator_of(seed)
    batch, kinds = text_batch(rows, {"image": [IMAGE] * 9}, padding, generator, answer)
    after_BN = batch["attention_mask"].flip(1).cumsum(1).flip(1)
    batch["token_type_ids"] = ((after_BN <= answer) & batch["attention_mask"].bool()).long()
    return _with_pixels(batch, kinds, 24, generator)


def _batch_gemma3(rows: Sequence[Row], padding: str, seed: int, answer: int) -> dict[str, Tensor]:
    """Return the placeholders between a token that begins and one that ends an image; type 1 at placeholders."""
    generator = generator_of(seed)
    batch, kinds = text_batch(rows, {"image": [SEPARATOR, *[IMAGE] * 9, SEPARATOR]}, padding, generator, answer)
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    return _with_pixels(batch, kinds, 48, generator)


def _with_pixels(
    batch: dict[str, Any], kinds: Sequence[Sequence[str]], side: int, generator: torch.Generator
) -> dict[str, Tensor]:
    images = sum(map(len, kinds))
    if images:
        batch["pixel_values"] = pixels(images, 3, side, side, generator=generator)
    return batch


_UNITS = {"image": (Grid(3, 3),)}
PALIGEMMA = TinyFamily("paligemma", _build_1, _batch_paligemma, _UNITS)
PALIGEMMA_2 = TinyFamily("paligemma", _build_2, _batch_paligemma, _UNITS, attentions=("eager",))  # Gemma 2 has no sdpa
GEMMA_3 = TinyFamily("gemma3", _build_gemma3, _batch_gemma3, _UNITS)
