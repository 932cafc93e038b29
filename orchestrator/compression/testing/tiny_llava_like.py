"""Tiny random models built like LLaVA: VipLLaVA, Video-LLaVA, LLaVA-NeXT, LLaVA-OneVision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from orchestrator.compression.testing.tiny import Row, TinyFamily
from orchestrator.compression.testing.tiny_images import (
    IMAGE,
    PAD,
    TEXT_SIZES,
    VIDEO,
    VISION_SIZES,
    enlarge,
    generator_of,
    pixels,
    text_batch,
)
from orchestrator.spec.components import Grid

_TILE = 24  # pixels; patches of 8
_FRAMES = 2
# Size in pixels (height, width) and number of tiles, the base tile included.
_SIZES = {"image": ((32, 48), 5), "small": ((48, 10), 3)}
_PINPOINTS = [[24, 48], [48, 24], [48, 48]]
# Named otherwise in transformers before 5.23.
_VIP_LAYERS = "vision_feature_layer" if hasattr(VipLlavaConfig(), "vision_feature_layer") else "vision_feature_layers"
_VIDEO_LLAVA_NAMES = inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
_VIDEO_LLAVA_PIXELS = "pixel_values" if "pixel_values" in _VIDEO_LLAVA_NAMES else "pixel_values_images"


def _vision(kind: Any = CLIPVisionConfig) -> dict[str, Any]:
    config: dict[str, Any] = kind(**VISION_SIZES, image_size=_TILE, patch_size=8).to_dict()
    return config


def _builder(config_class: Any, model_class: Any, text: Any, vision: Any, **options: Any) -> Any:
    def build(attention: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = config_class(
            vision_config=_vision(vision),
            text_config=text(**TEXT_SIZES).to_dict(),
            attn_implementation=attention,
            **options,
        )
        config.pad_token_id = PAD
        return enlarge(model_class(config))

    return build


def _batcher(
    tokens: Mapping[str, Sequence[int]], add: Callable[[dict[str, Any], list[str], torch.Generator], None]
) -> Callable[[Sequence[Row], str, int, int], dict[str, Tensor]]:
    def batch(rows: Sequence[Row], padding: str, seed: int, answer: int) -> dict[str, Tensor]:
        generator = generator_of(seed)
        made, kinds = text_batch(rows, tokens, padding, generator, answer)
        flat = [kind for row in kinds for kind in row]
        add(made, [kind for kind in flat if kind != "video"], generator)
        videos = flat.count("video")
        if videos:
            made["pixel_values_videos"] = pixels(videos, _FRAMES, 3, _TILE, _TILE, generator=generator)
        return made

    return batch


def _fixed(batch: dict[str, Any], images: list[str], generator: torch.Generator) -> None:
    if images:
        batch["pixel_values"] = pixels(len(images), 3, _TILE, _TILE, generator=generator)


def _fixed_of_video_llava(batch: dict[str, Any], images: list[str], generator: torch.Generator) -> None:
    if images:
        batch[_VIDEO_LLAVA_PIXELS] = pixels(len(images), 3, _TILE, _TILE, generator=generator)


def _tiled(batch: dict[str, Any], images: list[str], generator: torch.Generator) -> None:
    if not images:
        return
    most = max(_SIZES[kind][1] for kind in images)
    batch["pixel_values"] = pixels(len(images), most, 3, _TILE, _TILE, generator=generator)
    batch["image_sizes"] = torch.tensor([_SIZES[kind][0] for kind in images])


VIPLLAVA = TinyFamily(
    "vipllava",
    _builder(
        VipLlavaConfig,
        VipLlavaForConditionalGeneration,
        LlamaConfig,
        CLIPVisionConfig,
        image_token_id=IMAGE,
        **{_VIP_LAYERS: [-1, -2, 1]},
    ),
    _batcher({"image": [IMAGE] * 9}, _fixed),
    {"image": (Grid(3, 3),)},
)

VIDEO_LLAVA = TinyFamily(
    "video_llava",
    _builder(
        VideoLlavaConfig,
        VideoLlavaForConditionalGeneration,
        LlamaConfig,
        CLIPVisionConfig,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    ),
    _batcher({"image": [IMAGE] * 9, "video": [VIDEO] * 10 * _FRAMES}, _fixed_of_video_llava),
    {"image": (Grid(3, 3),), "video": (Grid(1, 1), Grid(3, 3)) * _FRAMES},  # a frame's CLS token stays
)

LLAVA_NEXT = TinyFamily(
    "llava_next",
    _builder(
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlamaConfig,
        CLIPVisionConfig,
        image_token_id=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
    ),
    _batcher({"image": [IMAGE] * (9 + 4 * 7), "small": [IMAGE] * (9 + 6 * 2)}, _tiled),
    {"image": (Grid(3, 3), Grid(4, 7)), "small": (Grid(3, 3), Grid(6, 2))},
)

LLAVA_ONEVISION = TinyFamily(
    "llava_onevision",
    _builder(
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    ),
    _batcher(
        {"image": [IMAGE] * (9 + 3 * 6), "small": [IMAGE] * (9 + 6 * 2), "video": [VIDEO] * (4 * _FRAMES + 1)}, _tiled
    ),
    {
        "image": (Grid(3, 3), Grid(3, 6)),  # 4 x 6 tokens are more than two tiles hold, so scaled to 3 x 5
        "small": (Grid(3, 3), Grid(6, 2)),
        "video": (Grid(2, 2),) * _FRAMES + (Grid(1, 1),),
    },
)
