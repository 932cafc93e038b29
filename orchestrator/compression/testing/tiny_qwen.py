"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size, position ids of three axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from orchestrator.compression.testing.tiny import Row, TinyFamily
from orchestrator.compression.testing.tiny_images import (
    IMAGE,
    SEPARATOR,
    TEXT_SIZES,
    VIDEO,
    enlarge,
    generator_of,
    pixels,
    text_batch,
)
from orchestrator.spec.components import Grid

# Temporal patches, height and width in patches; 2 x 2 patches are merged into a token.
_THW = {"image": (1, 6, 8), "small": (1, 4, 4), "video": (2, 4, 6)}
_UNITS = {"image": (Grid(3, 4),), "small": (Grid(2, 2),), "video": (Grid(2, 3), Grid(2, 3))}
_FRAME = [SEPARATOR, *[VIDEO] * 6, SEPARATOR]  # vision_start, placeholders, vision_end
_TOKENS = {"image": [SEPARATOR, *[IMAGE] * 12, SEPARATOR], "small": [SEPARATOR, *[IMAGE] * 4, SEPARATOR]}
# Qwen2-VL writes a video as one run, Qwen3-VL each frame with its time stamp before it.
_ONE_RUN = _TOKENS | {"video": [SEPARATOR, *[VIDEO] * 12, SEPARATOR]}
_TIME_STAMPS = _TOKENS | {"video": [7, 8, *_FRAME, 7, 9, *_FRAME]}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _config(config_class: type, vision: Mapping[str, Any], text: Mapping[str, Any], attention: str) -> Any:
    return config_class(
        vision_config={**_VISION, **vision},
        text_config={**TEXT_SIZES, "rope_parameters": _ROPE, **text},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=SEPARATOR,
        vision_end_token_id=SEPARATOR,
        attn_implementation=attention,
    )


def _build_2(attention: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = _config(Qwen2VLConfig, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, {}, attention)
    return enlarge(Qwen2VLForConditionalGeneration(config))


def _build_2_5(attention: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    vision = sizes | {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = _config(Qwen2_5_VLConfig, vision, {}, attention)
    return enlarge(Qwen2_5_VLForConditionalGeneration(config))


def _vision_3() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    return sizes | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}


def _build_3(attention: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = _config(Qwen3VLConfig, _vision_3(), {"head_dim": 8}, attention)
    return enlarge(Qwen3VLForConditionalGeneration(config))


def _build_3_moe(attention: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    config = _config(Qwen3VLMoeConfig, _vision_3(), {"head_dim": 8, **experts}, attention)
    return enlarge(Qwen3VLMoeForConditionalGeneration(config))


def _batch(
    tokens: Mapping[str, Sequence[int]], rows: Sequence[Row], padding: str, seed: int, answer: int
) -> dict[str, Tensor]:
    generator = generator_of(seed)
    batch, kinds = text_batch(rows, tokens, padding, generator, answer)
    ids = batch["input_ids"]
    batch["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for pixel_name, grid_name, is_video in (
        ("pixel_values", "image_grid_thw", False),
        ("pixel_values_videos", "video_grid_thw", True),
    ):
        thw = torch.tensor([_THW[kind] for row in kinds for kind in row if (kind == "video") == is_video])
        if len(thw):
            batch[grid_name] = thw
            batch[pixel_name] = pixels(int(thw.prod(-1).sum()), 3 * 2 * 4 * 4, generator=generator)
    return batch


QWEN2_VL = TinyFamily("qwen2_vl", _build_2, partial(_batch, _ONE_RUN), _UNITS)
QWEN2_5_VL = TinyFamily("qwen2_5_vl", _build_2_5, partial(_batch, _ONE_RUN), _UNITS)
QWEN3_VL = TinyFamily("qwen3_vl", _build_3, partial(_batch, _TIME_STAMPS), _UNITS, first_layer=1)
QWEN3_VL_MOE = TinyFamily("qwen3_vl_moe", _build_3_moe, partial(_batch, _TIME_STAMPS), _UNITS, first_layer=1)
