"""Tiny random models of every family, by `model_type`: what the contract kit runs over."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import nn

from orchestrator.compression.testing.tiny import (
    IMAGE,
    PAD,
    SEPARATOR,
    SIZES,
    TEXT_SIZES,
    VIDEO,
    VISION_SIZES,
    Draw,
    TinyFamily,
    batcher,
    builder,
)
from orchestrator.spec.components import Grid

_TEXT = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config, "mistral": hf.MistralConfig}
_NINE = [IMAGE] * 9
_THREE = {"image": (Grid(3, 3),)}


def _square(side: int) -> Callable[[Draw], None]:
    """Add the pixels of square images."""
    return partial(_add_square, side=side, name="pixel_values")


def _add_square(draw: Draw, side: int, name: str) -> None:
    images = sum(kind != "video" for kind in draw.flat)
    if images:
        draw.inputs[name] = draw.pixels(images, 3, side, side)


# LLaVA with a CLIP tower, its text model of several types, and with a Pixtral tower (images of any size).
_CLIP = hf.CLIPVisionConfig(**VISION_SIZES, image_size=24, patch_size=8).to_dict()


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
    options = {"num_hidden_layers": layers, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": PAD}
    config = _TEXT[text](**(SIZES | options | text_options))
    return builder(hf.LlavaForConditionalGeneration, _CLIP, config, image_token_id=IMAGE)(attention, seed)


_PIXTRAL_SIZES = {"image": (24, 32), "small": (16, 16)}  # pixels; patches of 8


def _sized(draw: Draw, sizes: dict[str, tuple[int, int]]) -> None:
    """Add the pixels of images of several sizes, padded to 24 x 32, and the sizes."""
    if draw.flat:
        draw.inputs["pixel_values"] = draw.pixels(len(draw.flat), 3, 24, 32)
        draw.inputs["image_sizes"] = torch.tensor([sizes[kind] for kind in draw.flat])


LLAVA_PIXTRAL = TinyFamily(
    "llava",
    builder(
        hf.LlavaForConditionalGeneration,
        hf.PixtralVisionConfig(**VISION_SIZES, image_size=32, patch_size=8),
        hf.LlamaConfig(**TEXT_SIZES),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",  # it has no CLS token
        vision_feature_layer=-1,
    ),
    # As Pixtral's processor has it: a token of its own ends each row of patches.
    batcher(
        {
            kind: ([IMAGE] * (width // 8) + [SEPARATOR]) * (height // 8)
            for kind, (height, width) in _PIXTRAL_SIZES.items()
        },
        partial(_sized, sizes=_PIXTRAL_SIZES),
    ),
    {"image": (Grid(3, 4),), "small": (Grid(2, 2),)},
)

# Built like LLaVA: VipLLaVA, Video-LLaVA, LLaVA-NeXT, LLaVA-OneVision. Two names were others before transformers 5.23.
_VIP = "vision_feature_layer" if hasattr(hf.VipLlavaConfig(), "vision_feature_layer") else "vision_feature_layers"
_VIDEO_LLAVA = inspect.signature(hf.VideoLlavaForConditionalGeneration.forward).parameters
_VIDEO_LLAVA_PIXELS = "pixel_values" if "pixel_values" in _VIDEO_LLAVA else "pixel_values_images"
_FRAMES = 2
# Size in pixels (height, width) and number of tiles, the base tile included.
_TILED = {"image": ((32, 48), 5), "small": ((48, 10), 3)}
_PINPOINTS = [[24, 48], [48, 24], [48, 48]]


def _frames(draw: Draw) -> None:
    if videos := draw.flat.count("video"):
        draw.inputs["pixel_values_videos"] = draw.pixels(videos, _FRAMES, 3, 24, 24)


def _tiles_of_sizes(draw: Draw) -> None:
    images = [kind for kind in draw.flat if kind != "video"]
    if images:
        draw.inputs["pixel_values"] = draw.pixels(len(images), max(_TILED[kind][1] for kind in images), 3, 24, 24)
        draw.inputs["image_sizes"] = torch.tensor([_TILED[kind][0] for kind in images])


# Tiles that are images of their own: InternVL, Idefics3, SmolVLM. 6 x 6 patches, four of them one token. SmolVLM before
# transformers 5.23 wants tokens in multiples of `patch_size`.
_SIDE = 18
_TILE_VISION = VISION_SIZES | {"image_size": _SIDE, "patch_size": 3}
_TILES = {"image": 3, "small": 1, "video": 2}
_APART = {kind: [SEPARATOR, *_NINE] * count for kind, count in _TILES.items()}
_TILE_UNITS = {kind: (Grid(3, 3),) * count for kind, count in _TILES.items()}


def _tiles_in_one_run(draw: Draw) -> None:
    if tiles := sum(_TILES[kind] for kind in draw.flat):
        draw.inputs["pixel_values"] = draw.pixels(tiles, 3, _SIDE, _SIDE)


def _tiles_by_row(draw: Draw) -> None:
    tiles = [sum(_TILES[kind] for kind in row) for row in draw.kinds]
    if any(tiles):
        draw.inputs["pixel_values"] = draw.pixels(len(tiles), max(tiles), 3, _SIDE, _SIDE)
        for row, count in enumerate(tiles):  # the processor pads with images of zeros
            draw.inputs["pixel_values"][row, count:] = 0


def _idefics(model_class: Any) -> Callable[[str, int], nn.Module]:
    text = hf.LlamaConfig(**TEXT_SIZES)
    return builder(model_class, _TILE_VISION, text, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD)


# Mistral 3: patches of 4 pixels, 2 x 2 of them one token.
_MISTRAL_UNITS = {"image": (Grid(3, 4),), "small": (Grid(2, 2),)}

# Qwen: images and videos of any size, position ids of three axes. Temporal patches, height and width in patches; 2 x 2
# patches are merged into a token.
_THW = {"image": (1, 6, 8), "small": (1, 4, 4), "video": (2, 4, 6)}
_QWEN_UNITS = {"image": (Grid(3, 4),), "small": (Grid(2, 2),), "video": (Grid(2, 3), Grid(2, 3))}
_FRAME = [SEPARATOR, *[VIDEO] * 6, SEPARATOR]  # vision_start, placeholders, vision_end
_QWEN_TOKENS = {"image": [SEPARATOR, *[IMAGE] * 12, SEPARATOR], "small": [SEPARATOR, *[IMAGE] * 4, SEPARATOR]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN_SIZES = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
_QWEN_3_VISION = _QWEN_SIZES | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}


def _qwen(model_type: str, model_class: Any, vision: dict[str, Any], **text: Any) -> TinyFamily:
    marks = {"vision_start_token_id": SEPARATOR, "vision_end_token_id": SEPARATOR, "video_token_id": VIDEO}
    values = {**TEXT_SIZES, "rope_parameters": _ROPE, **text}
    build = builder(model_class, _QWEN_VISION | vision, values, image_token_id=IMAGE, **marks)
    third = "qwen3" in model_type
    # Qwen2-VL writes a video as one run, Qwen3-VL each frame with its time stamp before it.
    video = [7, 8, *_FRAME, 7, 9, *_FRAME] if third else [SEPARATOR, *[VIDEO] * 12, SEPARATOR]
    batch = batcher(_QWEN_TOKENS | {"video": video}, _patches)
    return TinyFamily(model_type, build, batch, _QWEN_UNITS, first_layer=int(third))


def _patches(draw: Draw) -> None:
    ids = draw.inputs["input_ids"]
    draw.inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for pixel_name, grid_name, is_video in (
        ("pixel_values", "image_grid_thw", False),
        ("pixel_values_videos", "video_grid_thw", True),
    ):
        thw = torch.tensor([_THW[kind] for kind in draw.flat if (kind == "video") == is_video])
        if len(thw):
            draw.inputs[grid_name] = thw
            draw.inputs[pixel_name] = draw.pixels(int(thw.prod(-1).sum()), 3 * 2 * 4 * 4)


# PaliGemma (1 and 2) and Gemma 3: images that see themselves both ways, and sliding windows shorter than an image, so
# that they cut within images and between image and answer.
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA = {**TEXT_SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}


def _siglip(side: int) -> Any:
    return hf.SiglipVisionConfig(**VISION_SIZES, image_size=side, patch_size=8, vision_use_head=False)


def _paligemma(text: Any, **more: Any) -> TinyFamily:
    sizes = {"projection_dim": 32, "hidden_size": 32, "vocab_size": TEXT_SIZES["vocab_size"]}
    model_class = hf.PaliGemmaForConditionalGeneration
    build = builder(model_class, _siglip(24), text, image_token_index=IMAGE, **sizes)
    return TinyFamily("paligemma", build, batcher({"image": _NINE}, _suffix, _square(24)), _THREE, **more)


def _suffix(draw: Draw) -> None:
    """Mark the answer as the suffix, of type 1; all before it, padding too, is of type 0."""
    mask_BN = draw.inputs["attention_mask"]
    after_BN = mask_BN.flip(1).cumsum(1).flip(1)
    draw.inputs["token_type_ids"] = ((after_BN <= draw.answer) & mask_BN.bool()).long()


def _gemma_types(draw: Draw) -> None:
    draw.inputs["token_type_ids"] = (draw.inputs["input_ids"] == IMAGE).long()


def _gemma_projection(model: Any) -> None:
    with torch.no_grad():  # the model starts it at zero
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.1)


PALIGEMMA_2 = _paligemma(
    hf.Gemma2Config(
        **_GEMMA,
        layer_types=[_SLIDING, _FULL, _SLIDING, _FULL],
        attn_logit_softcapping=20.0,
        final_logit_softcapping=5.0,
    ),
    attentions=("eager",),  # Gemma 2 has no sdpa
)

TINY: dict[str, TinyFamily] = {
    "llava": TinyFamily(
        "llava",
        lambda attention, seed: tiny_llava(attention, seed=seed),
        batcher({"image": _NINE}, _square(24)),
        _THREE,
    ),
    "llava_next": TinyFamily(
        "llava_next",
        builder(
            hf.LlavaNextForConditionalGeneration,
            _CLIP,
            hf.LlamaConfig(**TEXT_SIZES),
            image_token_id=IMAGE,
            image_grid_pinpoints=_PINPOINTS,
        ),
        batcher({"image": [IMAGE] * (9 + 4 * 7), "small": [IMAGE] * (9 + 6 * 2)}, _tiles_of_sizes),
        {"image": (Grid(3, 3), Grid(4, 7)), "small": (Grid(3, 3), Grid(6, 2))},
    ),
    "llava_onevision": TinyFamily(
        "llava_onevision",
        builder(
            hf.LlavaOnevisionForConditionalGeneration,
            hf.SiglipVisionConfig(**VISION_SIZES, image_size=24, patch_size=8),
            hf.Qwen2Config(**TEXT_SIZES),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=_PINPOINTS,
            vision_aspect_ratio="anyres_max_2",
        ),
        batcher(
            {"image": [IMAGE] * (9 + 3 * 6), "small": [IMAGE] * (9 + 6 * 2), "video": [VIDEO] * (4 * _FRAMES + 1)},
            _tiles_of_sizes,
            _frames,
        ),
        {
            "image": (Grid(3, 3), Grid(3, 6)),  # 4 x 6 tokens are more than two tiles hold, so scaled to 3 x 5
            "small": (Grid(3, 3), Grid(6, 2)),
            "video": (Grid(2, 2),) * _FRAMES + (Grid(1, 1),),
        },
    ),
    "video_llava": TinyFamily(
        "video_llava",
        builder(
            hf.VideoLlavaForConditionalGeneration,
            _CLIP,
            hf.LlamaConfig(**TEXT_SIZES),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
        ),
        batcher(
            {"image": _NINE, "video": [VIDEO] * 10 * _FRAMES},
            partial(_add_square, side=24, name=_VIDEO_LLAVA_PIXELS),
            _frames,
        ),
        {"image": (Grid(3, 3),), "video": (Grid(1, 1), Grid(3, 3)) * _FRAMES},  # a frame's CLS token stays
    ),
    "vipllava": TinyFamily(
        "vipllava",
        builder(
            hf.VipLlavaForConditionalGeneration,
            _CLIP,
            hf.LlamaConfig(**TEXT_SIZES),
            image_token_id=IMAGE,
            **{_VIP: [-1, -2, 1]},
        ),
        batcher({"image": _NINE}, _square(24)),
        _THREE,
    ),
    "internvl": TinyFamily(
        "internvl",
        builder(
            hf.InternVLForConditionalGeneration,
            {**_TILE_VISION, "model_type": "internvl_vision"},
            hf.Qwen2Config(**TEXT_SIZES),
            image_token_id=IMAGE,
            image_seq_length=9,
            tie_word_embeddings=False,
        ),
        # Tiles of an image in one run, frames of a video apart.
        batcher({"image": _NINE * 3, "small": _NINE, "video": _APART["video"]}, _tiles_in_one_run),
        _TILE_UNITS,
    ),
    "idefics3": TinyFamily(
        "idefics3",
        _idefics(hf.Idefics3ForConditionalGeneration),
        batcher(_APART, _tiles_by_row),
        {kind: _TILE_UNITS[kind] for kind in ("image", "small")},
    ),
    "smolvlm": TinyFamily(
        "smolvlm", _idefics(hf.SmolVLMForConditionalGeneration), batcher(_APART, _tiles_by_row), _TILE_UNITS
    ),
    "mistral3": TinyFamily(
        "mistral3",
        builder(
            hf.Mistral3ForConditionalGeneration,
            hf.PixtralVisionConfig(**VISION_SIZES, image_size=32, patch_size=4),
            hf.MistralConfig(**TEXT_SIZES),
            image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        batcher(
            {kind: ([IMAGE] * grid.width + [SEPARATOR]) * grid.height for kind, (grid,) in _MISTRAL_UNITS.items()},
            partial(_sized, sizes={kind: (8 * g.height, 8 * g.width) for kind, (g,) in _MISTRAL_UNITS.items()}),
        ),
        _MISTRAL_UNITS,
    ),
    "qwen2_vl": _qwen(
        "qwen2_vl", hf.Qwen2VLForConditionalGeneration, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    ),
    "qwen2_5_vl": _qwen(
        "qwen2_5_vl",
        hf.Qwen2_5_VLForConditionalGeneration,
        _QWEN_SIZES | {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    ),
    "qwen3_vl": _qwen("qwen3_vl", hf.Qwen3VLForConditionalGeneration, _QWEN_3_VISION, head_dim=8),
    "qwen3_vl_moe": _qwen(
        "qwen3_vl_moe", hf.Qwen3VLMoeForConditionalGeneration, _QWEN_3_VISION, head_dim=8, **_EXPERTS
    ),
    "paligemma": _paligemma(hf.GemmaConfig(**TEXT_SIZES, head_dim=8)),
    "gemma3": TinyFamily(
        "gemma3",
        builder(
            hf.Gemma3ForConditionalGeneration,
            _siglip(48),
            hf.Gemma3TextConfig(**_GEMMA, layer_types=[_SLIDING, _FULL, _SLIDING, _SLIDING]),
            after=_gemma_projection,
            mm_tokens_per_image=9,
            image_token_index=IMAGE,
            boi_token_index=SEPARATOR,
            eoi_token_index=SEPARATOR,
        ),
        # Placeholders between a token that begins and one that ends an image; type 1 at placeholders.
        batcher({"image": [SEPARATOR, *_NINE, SEPARATOR]}, _gemma_types, _square(48)),
        _THREE,
    ),
}
