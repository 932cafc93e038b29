"""Tiny random models of every family, by `model_type`: what the contract kit runs over."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
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
    tiny,
)
from orchestrator.spec.components import Grid

_SLIDING, _FULL = "sliding_attention", "full_attention"
_TEXT = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config, "mistral": hf.MistralConfig}
_NINE = [IMAGE] * 9
_THREE = {"image": (Grid(3, 3),)}


def _square(draw: Draw, side: int = 24, name: str = "pixel_values") -> None:
    """Add the pixels of square images."""
    images = sum(kind != "video" for kind in draw.flat)
    if images:
        draw.inputs[name] = draw.pixels(images, 3, side, side)


# LLaVA with a CLIP tower, its text model of several types, and with a Pixtral tower (images of any size).
# Three layers, so that points may act before two of them where the second-last hidden state is used.
_CLIP = hf.CLIPVisionConfig(**VISION_SIZES | {"num_hidden_layers": 3}, image_size=24, patch_size=8).to_dict()


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


LLAVA_PIXTRAL = tiny(
    hf.LlavaForConditionalGeneration,
    hf.PixtralVisionConfig(**VISION_SIZES, image_size=32, patch_size=8),
    hf.LlamaConfig,
    # As Pixtral's processor has it: a token of its own ends each row of patches.
    {kind: ([IMAGE] * (width // 8) + [SEPARATOR]) * (height // 8) for kind, (height, width) in _PIXTRAL_SIZES.items()},
    partial(_sized, sizes=_PIXTRAL_SIZES),
    units={"image": (Grid(3, 4),), "small": (Grid(2, 2),)},
    image_token_id=IMAGE,
    vision_feature_select_strategy="full",  # it has no CLS token
    vision_feature_layer=-1,
)

# Built like LLaVA: VipLLaVA, Video-LLaVA, LLaVA-NeXT, LLaVA-OneVision. Two names were others before transformers 5.23.
_VIP_LAYERS = (
    "vision_feature_layer" if hasattr(hf.VipLlavaConfig(), "vision_feature_layer") else "vision_feature_layers"
)
_VIP: dict[str, Any] = {_VIP_LAYERS: [-1, -2, 2]}
_VIDEO_LLAVA = inspect.signature(hf.VideoLlavaForConditionalGeneration.forward).parameters
_VIDEO_LLAVA_PIXELS = "pixel_values" if "pixel_values" in _VIDEO_LLAVA else "pixel_values_images"
_FRAMES = 2
# Size in pixels (height, width) and number of tiles, the base tile included.
_TILED = {"image": ((32, 48), 5), "small": ((48, 10), 3)}
_PINPOINTS = [[24, 48], [48, 24], [48, 48]]


_QFORMER = {
    "model_type": "blip_2_qformer",
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "cross_attention_frequency": 1,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


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
_APART_IMAGES = {kind: _APART[kind] for kind in ("image", "small")}
_TILE_IMAGES = {kind: _TILE_UNITS[kind] for kind in ("image", "small")}


def _tiles_in_one_run(draw: Draw, side: int = _SIDE) -> None:
    if tiles := sum(_TILES[kind] for kind in draw.flat):
        draw.inputs["pixel_values"] = draw.pixels(tiles, 3, side, side)


def _tiles_by_row(draw: Draw) -> None:
    tiles = [sum(_TILES[kind] for kind in row) for row in draw.kinds]
    if any(tiles):
        draw.inputs["pixel_values"] = draw.pixels(len(tiles), max(tiles), 3, _SIDE, _SIDE)
        for row, count in enumerate(tiles):  # the processor pads with images of zeros
            draw.inputs["pixel_values"][row, count:] = 0


def _idefics(model_class: Any, kinds: Sequence[str]) -> TinyFamily:
    units = {kind: _TILE_UNITS[kind] for kind in kinds}
    config: dict[str, Any] = {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": PAD}
    return tiny(model_class, _TILE_VISION, hf.LlamaConfig, _APART, _tiles_by_row, units=units, **config)


# Mistral 3: patches of 4 pixels, 2 x 2 of them one token.
_MISTRAL_UNITS = {"image": (Grid(3, 4),), "small": (Grid(2, 2),)}

# Qwen: images and videos of any size, position ids of three axes. Temporal patches, height and width in patches; 2 x 2
# patches are merged into a token.
_THW = {"image": (1, 6, 8), "small": (1, 4, 4), "video": (2, 4, 6)}
_QWEN_UNITS = {"image": (Grid(3, 4),), "small": (Grid(2, 2),), "video": (Grid(2, 3), Grid(2, 3, frame=1))}
_FRAME = [SEPARATOR, *[VIDEO] * 6, SEPARATOR]  # vision_start, placeholders, vision_end
_QWEN_TOKENS = {"image": [SEPARATOR, *[IMAGE] * 12, SEPARATOR], "small": [SEPARATOR, *[IMAGE] * 4, SEPARATOR]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN_SIZES = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
_QWEN_3_VISION = _QWEN_SIZES | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}


def _qwen(
    model_class: Any, vision: dict[str, Any], third: bool = False, config: Any = None, add: Any = None, **text: Any
) -> TinyFamily:
    # Qwen2-VL writes a video as one run, Qwen3-VL each frame with its time stamp before it.
    video = [7, 8, *_FRAME, 7, 9, *_FRAME] if third else [SEPARATOR, *[VIDEO] * 12, SEPARATOR]
    return tiny(
        model_class,
        _QWEN_VISION | vision,
        {**TEXT_SIZES, "rope_parameters": _ROPE, **text},
        _QWEN_TOKENS | {"video": video},
        add or _patches,
        units=_QWEN_UNITS,
        first_layer=len(vision.get("deepstack_visual_indexes", ())),
        vision_start_token_id=SEPARATOR,
        vision_end_token_id=SEPARATOR,
        **(config or {"image_token_id": IMAGE, "video_token_id": VIDEO}),
    )


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


# Qwen 3.5: layers of linear attention between those of softmax attention.
_LINEAR: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": _ROPE | {"partial_rotary_factor": 1.0},
}

# The thinkers of Qwen-Omni: vision as in Qwen-VL, a tower of audio beside it.
_AUDIO = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16, "output_dim": 32}
_OMNI: dict[str, Any] = {"audio_config": _AUDIO | {"num_mel_bins": 8, "downsample_hidden_size": 8}}
_OMNI_2 = _OMNI | {"image_token_index": IMAGE, "video_token_index": VIDEO, "audio_token_index": 60}
_OMNI_3 = _OMNI | {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 60}


def _patches_by_seconds(draw: Draw) -> None:
    _patches(draw)
    del draw.inputs["mm_token_type_ids"]
    draw.inputs["video_second_per_grid"] = torch.full((draw.flat.count("video"),), 0.08)


# GLM-4V: frames of a video have the placeholder of images, so a batch holds images or videos.
_GLM_VIDEO = [7, 8, SEPARATOR, *[IMAGE] * 6, SEPARATOR, 7, 9, SEPARATOR, *[IMAGE] * 6, SEPARATOR]


def _patches_of_frames(draw: Draw) -> None:
    _patches(draw)
    draw.inputs["mm_token_type_ids"] *= 2  # each an image's, by its placeholder


def _glm(model_class: Any, video: bool = False, **text: Any) -> TinyFamily:
    tokens, units = _QWEN_TOKENS, {kind: _QWEN_UNITS[kind] for kind in ("image", "small")}
    if video:
        tokens, units = {"video": _GLM_VIDEO}, {"video": _QWEN_UNITS["video"]}
    return tiny(
        model_class,
        _QWEN_VISION | _QWEN_SIZES | {"image_size": 24},
        {**TEXT_SIZES, "rope_parameters": _ROPE | {"partial_rotary_factor": 1.0}, **text},
        tokens,
        _patches_of_frames if video else _patches,
        units=units,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


GLM4V_VIDEO = _glm(hf.Glm4vForConditionalGeneration, video=True)
_GLM_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "head_dim": 8,
}

# VideoLLaMA3: how many patches along a side make a token comes with each image and video.
_VIDEO_LLAMA_MERGES = {"image": 1, "small": 1, "video": 2}
_VIDEO_LLAMA_THW = {"image": (1, 3, 4), "small": (1, 2, 2), "video": (2, 4, 6)}


def _patches_and_merges(draw: Draw) -> None:
    for kind, pixel_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        found = [one for one in draw.flat if (one == "video") == (kind == "video")]
        if found:
            thw = torch.tensor([_VIDEO_LLAMA_THW[one] for one in found])
            draw.inputs[f"{kind}_grid_thw"] = thw
            draw.inputs[f"{kind}_merge_sizes"] = torch.tensor([_VIDEO_LLAMA_MERGES[one] for one in found])
            draw.inputs[pixel_name] = draw.pixels(int(thw.prod(-1).sum()), 3 * 4 * 4)


# LFM2-VL: rows of patches, padded; 2 x 2 patches are one token.
_LFM_SHAPES = {"image": (6, 8), "small": (4, 4)}


def _rows_of_patches(draw: Draw) -> None:
    if not draw.flat:
        return
    shapes = [_LFM_SHAPES[kind] for kind in draw.flat]
    most = max(height * width for height, width in shapes)
    draw.inputs["pixel_values"] = draw.pixels(len(shapes), most, 3 * 4 * 4)
    draw.inputs["spatial_shapes"] = torch.tensor(shapes)
    patches = torch.tensor([height * width for height, width in shapes])
    draw.inputs["pixel_attention_mask"] = (torch.arange(most) < patches[:, None]).long()


# Molmo 2: an image in low resolution, then in high; what begins, divides and ends it sees the image both ways, too. By
# kind the grid in high resolution and the crops (36 patches each); the frames of a video are crops, too.
_MOLMO_LOW = Grid(3, 3)
_MOLMO_HIGH = {"image": (Grid(3, 4), 2), "small": (Grid(2, 2), 1)}


def _marked(*grids: Grid) -> list[int]:
    return [token for grid in grids for token in [SEPARATOR, *([IMAGE] * grid.width + [SEPARATOR]) * grid.height]]


def _pooled_patches(draw: Draw, kind_name: str = "image") -> None:
    """Add crops, and which four patches become each token."""
    ids = draw.inputs["input_ids"]
    draw.inputs["mm_token_type_ids"] = ((ids == IMAGE) | (ids == SEPARATOR)).long()
    crops, pooled = 0, []
    for kind in draw.flat:
        second, more = (_MOLMO_LOW, _FRAMES - 1) if kind_name == "video" else _MOLMO_HIGH[kind]
        for first, grid in zip((0, 36), (_MOLMO_LOW, second), strict=True):
            pooled.append(36 * crops + first + torch.arange(4 * grid.tokens).view(-1, 4))
        crops += 1 + more
    if not crops:
        return
    if kind_name == "video":
        draw.inputs["video_grids"] = torch.tensor([[_FRAMES, 3, 3]] * len(draw.flat))
    else:
        high = [_MOLMO_HIGH[kind][0] for kind in draw.flat]
        draw.inputs["image_grids"] = torch.tensor([[3, 3, grid.height, grid.width] for grid in high])
    ending = "s_videos" if kind_name == "video" else "s"
    draw.inputs[f"{kind_name}_token_pooling"] = torch.cat(pooled)
    draw.inputs[f"pixel_value{ending}"] = draw.pixels(crops, 36, 3 * 4 * 4)


def _molmo(video: bool = False) -> TinyFamily:
    heads: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
    images = {kind: (_MOLMO_LOW, grid) for kind, (grid, _) in _MOLMO_HIGH.items()}
    frames = {"image": tuple(Grid(3, 3, frame=frame) for frame in range(_FRAMES))}
    units = frames if video else images
    return tiny(
        hf.Molmo2ForConditionalGeneration,
        {**VISION_SIZES, **heads, "image_size": [24, 24], "patch_size": 4},
        {**TEXT_SIZES, "head_dim": 8, "additional_vocab_size": 4, "rope_parameters": _PLAIN_ROPE},
        {kind: _marked(*grids) for kind, grids in units.items()},
        partial(_pooled_patches, kind_name="video" if video else "image"),
        units=units,
        adapter_config={**SIZES, **heads, "vision_feature_layer": [-1, -2], "text_hidden_size": 32},
        image_patch_id=IMAGE,
    )


_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MOLMO2_VIDEO = _molmo(video=True)

# PaliGemma (1 and 2) and Gemma 3: images that see themselves both ways, and sliding windows shorter than an image, so
# that they cut within images and between image and answer.
_GEMMA = {**TEXT_SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}


_GEMMA_4: dict[str, Any] = {
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 7,
    "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 5.0,
}


def _siglip(side: int) -> Any:
    return hf.SiglipVisionConfig(**VISION_SIZES, image_size=side, patch_size=8, vision_use_head=False)


def _paligemma(text: Any, **more: Any) -> TinyFamily:
    sizes: dict[str, Any] = {"projection_dim": 32, "hidden_size": 32, "vocab_size": TEXT_SIZES["vocab_size"]}
    return tiny(
        hf.PaliGemmaForConditionalGeneration,
        _siglip(24),
        text,
        {"image": _NINE},
        _suffix,
        _square,
        units=_THREE,
        image_token_index=IMAGE,
        **sizes,
        **more,
    )


def _suffix(draw: Draw) -> None:
    """Mark the answer as the suffix, of type 1; all before it, padding too, is of type 0."""
    mask_BN = draw.inputs["attention_mask"]
    after_BN = mask_BN.flip(1).cumsum(1).flip(1)
    draw.inputs["token_type_ids"] = ((after_BN <= draw.answer) & mask_BN.bool()).long()


def _gemma_types(draw: Draw) -> None:
    draw.inputs["token_type_ids"] = (draw.inputs["input_ids"] == IMAGE).long()


# Gemma 4: patches with their places; 2 x 2 of them are one token.
_PLACES = {"image": (6, 8), "small": (4, 4), "video": (4, 4)}


def _placed(draw: Draw) -> None:
    """Add patches, padded to 48, and their places (x, y) in images and in the frames of videos."""
    ids = draw.inputs["input_ids"]
    draw.inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    images, videos = ([kind for kind in draw.flat if (kind == "video") == one] for one in (False, True))
    for pixel_name, place_name, kinds in (
        ("pixel_values", "image_position_ids", images),
        ("pixel_values_videos", "video_position_ids", [kind for kind in videos for _ in range(_FRAMES)]),
    ):
        if kinds:
            places = torch.full((len(kinds), 48, 2), -1)
            for number, kind in enumerate(kinds):
                height, width = _PLACES[kind]
                places[number, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(
                    1
                )
            draw.inputs[place_name] = places
            draw.inputs[pixel_name] = draw.pixels(len(kinds), 48, 3 * 4 * 4)
    if videos:
        draw.inputs["num_frames_per_video"] = torch.full((len(videos),), _FRAMES)


def _gemma_4(**text: Any) -> TinyFamily:
    return tiny(
        hf.Gemma4ForConditionalGeneration,
        {**VISION_SIZES, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2},
        {**TEXT_SIZES, **_GEMMA_4, **text},
        {
            "image": [SEPARATOR, *[IMAGE] * 12, SEPARATOR],
            "small": [SEPARATOR, *[IMAGE] * 4, SEPARATOR],
            "video": [7, *[VIDEO] * 4, 8, *[VIDEO] * 4],  # a time stamp before each frame
        },
        _placed,
        units={
            "image": (Grid(3, 4),),
            "small": (Grid(2, 2),),
            "video": tuple(Grid(2, 2, frame=frame) for frame in range(_FRAMES)),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=60,
    )


GEMMA_4_CAUSAL = _gemma_4(  # as the smaller ones are, with the experts and the one projection of the larger
    use_bidirectional_attention=None,
    enable_moe_block=True,
    num_experts=4,
    top_k_experts=2,
    moe_intermediate_size=24,
    attention_k_eq_v=True,
)


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


# GOT-OCR 2: a SAM tower, then two convolutions of stride 2.
_GOT_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 36,
    "patch_size": 4,
    "window_size": 5,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "initializer_range": 0.02,
}


def _got_ocr(config: Any) -> TinyFamily:
    return tiny(
        _of_config(hf.GotOcr2ForConditionalGeneration, config),
        _GOT_VISION,
        hf.Qwen2Config,
        {kind: _NINE * _TILES[kind] for kind in ("image", "small")},
        partial(_tiles_in_one_run, side=36),
        units=_TILE_IMAGES,
        image_token_index=IMAGE,
        attentions=("eager",),  # it has no sdpa
        image_seq_length=9,
        tie_word_embeddings=False,
    )


def _of_config(model_class: Any, config: Any) -> Any:
    """Return a model class as it is built from another class of config (as `AutoModel` does for some types)."""
    return type(model_class.__name__, (model_class,), {"config_class": config, "__module__": model_class.__module__})


# Step 3.7: an image as local views and then the whole.
def _views(draw: Draw) -> None:
    if draw.flat:
        counts = [2 if kind == "image" else 0 for kind in draw.flat]
        draw.inputs["pixel_values"] = draw.pixels(len(draw.flat), 3, 48, 48)
        draw.inputs["num_local_patches"] = counts
        if any(counts):
            draw.inputs["pixel_values_local"] = draw.pixels(sum(counts), 3, 24, 24)


def _aria_queries(model: Any) -> None:
    with torch.no_grad():  # the model starts them at zero
        model.model.multi_modal_projector.query.normal_(std=0.1)


# ERNIE 4.5 VL: experts for visual tokens, and for those that begin and end them; patches of one frame each.
def _patches_and_experts(draw: Draw) -> None:
    _patches(draw)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in draw.inputs:
            draw.inputs[name] = draw.inputs[name][:, :48]
    ids = draw.inputs["input_ids"]
    draw.inputs["moe_mm_token_type_ids"] = draw.inputs["mm_token_type_ids"] | (ids == SEPARATOR).int()


def _tiles_of_images(draw: Draw) -> None:
    """Add images, each of two tiles: those of a batch have one number of them."""
    if images := sum(kind != "video" for kind in draw.flat):
        draw.inputs["pixel_values"] = draw.pixels(images, 2, 3, 24, 24)


PERCEPTION_LM = tiny(  # not in TINY, since its tower needs timm
    hf.PerceptionLMForConditionalGeneration,
    {
        "model_type": "timm_wrapper",
        "architecture": "vit_pe_core_tiny_patch16_384",
        "do_pooling": False,
        "model_args": {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "img_size": [24, 24],
            "patch_size": 4,
            "ref_feat_shape": [6, 6],
            "global_pool": "",
        },
    },
    hf.LlamaConfig,
    {"image": _NINE * 2, "video": [VIDEO] * 9 * _FRAMES},
    _tiles_of_images,
    _frames,
    units={
        "image": (Grid(3, 3),) * 2,
        "video": tuple(Grid(3, 3, frame=frame) for frame in range(_FRAMES)),
    },
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    projector_pooling_ratio=2,
)

_FAMILIES = (
    TinyFamily(
        "llava",
        lambda attention, seed: tiny_llava(attention, seed=seed),
        batcher({"image": _NINE}, _square),
        _THREE,
    ),
    tiny(
        hf.LlavaNextForConditionalGeneration,
        _CLIP,
        hf.LlamaConfig,
        {"image": [IMAGE] * (9 + 4 * 7), "small": [IMAGE] * (9 + 6 * 2)},
        _tiles_of_sizes,
        units={"image": (Grid(3, 3), Grid(4, 7)), "small": (Grid(3, 3), Grid(6, 2))},
        image_token_id=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
    ),
    tiny(
        hf.Granite4VisionForConditionalGeneration,
        hf.CLIPVisionConfig(**VISION_SIZES | {"hidden_size": 64}, image_size=24, patch_size=4).to_dict(),
        {**TEXT_SIZES, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        {"image": [IMAGE] * (9 + 4 * 7), "small": [IMAGE] * (9 + 6 * 2)},
        _tiles_of_sizes,
        units={"image": (Grid(3, 3), Grid(4, 7)), "small": (Grid(3, 3), Grid(6, 2))},
        first_layer=2,
        image_token_index=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[0, 0, 1, 1],
        projector_dropout=0.0,
        qformer_config=_QFORMER,
    ),
    tiny(
        hf.LlavaNextVideoForConditionalGeneration,
        _CLIP,
        hf.LlamaConfig,
        {"image": [IMAGE] * (9 + 4 * 7), "small": [IMAGE] * (9 + 6 * 2), "video": [VIDEO] * _FRAMES},
        _tiles_of_sizes,
        _frames,
        units={
            "image": (Grid(3, 3), Grid(4, 7)),
            "small": (Grid(3, 3), Grid(6, 2)),
            "video": tuple(Grid(1, 1, frame=frame) for frame in range(_FRAMES)),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
    ),
    tiny(
        hf.LlavaOnevisionForConditionalGeneration,
        hf.SiglipVisionConfig(**VISION_SIZES, image_size=24, patch_size=8),
        hf.Qwen2Config,
        {"image": [IMAGE] * (9 + 3 * 6), "small": [IMAGE] * (9 + 6 * 2), "video": [VIDEO] * (4 * _FRAMES + 1)},
        _tiles_of_sizes,
        _frames,
        units={
            "image": (Grid(3, 3), Grid(3, 6)),  # 4 x 6 tokens are more than two tiles hold, so scaled to 3 x 5
            "small": (Grid(3, 3), Grid(6, 2)),
            "video": (*(Grid(2, 2, frame=frame) for frame in range(_FRAMES)), Grid(1, 1)),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    ),
    tiny(
        hf.VideoLlavaForConditionalGeneration,
        _CLIP,
        hf.LlamaConfig,
        {"image": _NINE, "video": [VIDEO] * 10 * _FRAMES},
        partial(_square, name=_VIDEO_LLAVA_PIXELS),
        _frames,
        units={  # a frame's CLS token stays
            "image": (Grid(3, 3),),
            "video": tuple(grid for frame in range(_FRAMES) for grid in (Grid(1, 1), Grid(3, 3, frame=frame))),
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    ),
    tiny(
        hf.VipLlavaForConditionalGeneration,
        _CLIP,
        hf.LlamaConfig,
        {"image": _NINE},
        _square,
        units=_THREE,
        image_token_id=IMAGE,
        **_VIP,
    ),
    tiny(
        hf.InternVLForConditionalGeneration,
        {**_TILE_VISION, "model_type": "internvl_vision"},
        hf.Qwen2Config,
        {"image": _NINE * 3, "small": _NINE, "video": _APART["video"]},  # an image in one run, frames apart
        _tiles_in_one_run,
        units=_TILE_UNITS,
        image_token_id=IMAGE,
        image_seq_length=9,
        tie_word_embeddings=False,
    ),
    tiny(
        hf.AyaVisionForConditionalGeneration,
        hf.SiglipVisionConfig(**VISION_SIZES, image_size=24, patch_size=4, vision_use_head=False),
        hf.Cohere2Config(**TEXT_SIZES, sliding_window=7, layer_types=[_SLIDING, _FULL, _SLIDING, _SLIDING]),
        _APART_IMAGES,
        partial(_tiles_in_one_run, side=24),
        units=_TILE_IMAGES,
        image_token_index=IMAGE,
        alignment_intermediate_size=48,
    ),
    tiny(
        hf.Cohere2VisionForConditionalGeneration,
        hf.SiglipVisionConfig(**VISION_SIZES, image_size=24, patch_size=4, vision_use_head=False),
        hf.Cohere2Config(**TEXT_SIZES, sliding_window=7, layer_types=[_SLIDING, _FULL, _SLIDING, _SLIDING]),
        _APART_IMAGES,
        partial(_tiles_in_one_run, side=24),
        units=_TILE_IMAGES,
        image_token_id=IMAGE,
        alignment_intermediate_size=48,
    ),
    tiny(
        hf.Ovis2ForConditionalGeneration,
        {**VISION_SIZES, "image_size": 24, "patch_size": 4, "hidden_stride": 2, "vocab_size": 40},
        hf.Qwen2Config,
        _APART_IMAGES,
        partial(_tiles_in_one_run, side=24),
        units=_TILE_IMAGES,
        image_token_id=IMAGE,
        visual_indicator_token_ids=[SEPARATOR] * 5,
        hidden_size=32,
        vocab_size=TEXT_SIZES["vocab_size"],
    ),
    _idefics(hf.Idefics3ForConditionalGeneration, ("image", "small")),
    _idefics(hf.SmolVLMForConditionalGeneration, ("image", "small", "video")),
    tiny(
        hf.Mistral3ForConditionalGeneration,
        hf.PixtralVisionConfig(**VISION_SIZES, image_size=32, patch_size=4),
        hf.MistralConfig,
        {kind: ([IMAGE] * grid.width + [SEPARATOR]) * grid.height for kind, (grid,) in _MISTRAL_UNITS.items()},
        partial(_sized, sizes={kind: (8 * g.height, 8 * g.width) for kind, (g,) in _MISTRAL_UNITS.items()}),
        units=_MISTRAL_UNITS,
        image_token_id=IMAGE,
        spatial_merge_size=2,
    ),
    _qwen(hf.Qwen2VLForConditionalGeneration, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}),
    _qwen(
        hf.Qwen2_5_VLForConditionalGeneration,
        _QWEN_SIZES | {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    ),
    _qwen(hf.Qwen3VLForConditionalGeneration, _QWEN_3_VISION, third=True, head_dim=8),
    _qwen(hf.Qwen3VLMoeForConditionalGeneration, _QWEN_3_VISION, third=True, head_dim=8, **_EXPERTS),
    _qwen(hf.Qwen3_5ForConditionalGeneration, _QWEN_SIZES | {"num_position_embeddings": 64}, third=True, **_LINEAR),
    _qwen(
        hf.Qwen3_5MoeForConditionalGeneration,
        _QWEN_SIZES | {"num_position_embeddings": 64},
        third=True,
        **_LINEAR,
        **_EXPERTS,
        shared_expert_intermediate_size=24,
    ),
    _qwen(
        hf.Qwen2_5OmniThinkerForConditionalGeneration,
        _QWEN_SIZES | {"window_size": 16, "fullatt_block_indexes": [1]},
        config=_OMNI_2,
        add=_patches_by_seconds,
    ),
    _qwen(
        hf.Qwen3OmniMoeThinkerForConditionalGeneration,
        _QWEN_3_VISION,
        config=_OMNI_3,
        add=_patches_by_seconds,
        head_dim=8,
        **_EXPERTS,
    ),
    _glm(hf.Glm4vForConditionalGeneration),
    _glm(hf.Glm4vMoeForConditionalGeneration, **_GLM_EXPERTS),
    _glm(hf.Glm46VForConditionalGeneration, model_type="glm4v_text"),
    _glm(hf.GlmOcrForConditionalGeneration, head_dim=8),
    tiny(
        hf.VideoLlama3ForConditionalGeneration,
        {**VISION_SIZES, "patch_size": 4},
        hf.Qwen2Config,
        {
            "image": [SEPARATOR, *[IMAGE] * 12, SEPARATOR],
            "small": [SEPARATOR, *[IMAGE] * 4, SEPARATOR],
            "video": [7, *[VIDEO] * 6, 8, *[VIDEO] * 6],  # a time stamp before each frame
        },
        _patches_and_merges,
        units=_QWEN_UNITS,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    tiny(
        hf.Lfm2VlForConditionalGeneration,
        hf.Siglip2VisionConfig(**VISION_SIZES, patch_size=4, num_patches=36, vision_use_head=False),
        hf.Lfm2Config(
            **TEXT_SIZES | {"num_hidden_layers": 4},
            layer_types=["conv", "full_attention"] * 2,
            block_auto_adjust_ff_dim=False,
        ),
        {kind: [IMAGE] * (h * w // 4) for kind, (h, w) in _LFM_SHAPES.items()},
        _rows_of_patches,
        units={"image": (Grid(3, 4),), "small": (Grid(2, 2),)},
        image_token_id=IMAGE,
        projector_hidden_size=32,
    ),
    _paligemma(hf.GemmaConfig(**TEXT_SIZES, head_dim=8)),
    tiny(
        hf.Gemma3ForConditionalGeneration,
        _siglip(48),
        hf.Gemma3TextConfig(**_GEMMA, layer_types=[_SLIDING, _FULL, _SLIDING, _SLIDING]),
        {"image": [SEPARATOR, *_NINE, SEPARATOR]},  # between a token that begins and one that ends an image
        _gemma_types,
        partial(_square, side=48),
        units=_THREE,
        after=_gemma_projection,
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=SEPARATOR,
        eoi_token_index=SEPARATOR,
    ),
    _gemma_4(),
    tiny(
        hf.Llama4ForConditionalGeneration,
        {
            **VISION_SIZES,
            "intermediate_size": 128,  # what its adapter takes: four patches side by side
            "image_size": 24,
            "patch_size": 4,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
            "vision_output_dim": 24,
        },
        {
            **TEXT_SIZES,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 7,
            "rope_parameters": _PLAIN_ROPE,
        },
        {kind: _NINE * count for kind, count in _TILES.items() if kind != "video"},
        partial(_tiles_in_one_run, side=24),
        units=_TILE_IMAGES,
        image_token_index=IMAGE,
    ),
    _molmo(),
    _got_ocr(hf.GotOcr2Config),
    _got_ocr(hf.PPChart2TableConfig),
    tiny(
        hf.Step3p7ForConditionalGeneration,
        {**VISION_SIZES, "image_size": 48, "patch_size": 4, "mlp_ratio": 1.5, "max_position_embeddings": 144},
        {
            **TEXT_SIZES,
            "head_dim": 8,
            "layer_types": [_SLIDING, _FULL] * 2,
            "sliding_window": 7,
            "num_sliding_attention_heads": 8,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "share_expert_dim": 24,
        },
        {"image": [*[IMAGE] * 4, SEPARATOR, *[IMAGE] * 4, SEPARATOR, *_NINE], "small": _NINE},
        _views,
        units={"image": (Grid(2, 2), Grid(2, 2), Grid(3, 3)), "small": (Grid(3, 3),)},
        image_token_id=IMAGE,
    ),
    tiny(
        hf.AriaForConditionalGeneration,
        {**_TILE_VISION, "model_type": "idefics3_vision"},
        {**TEXT_SIZES, "head_dim": 8, "moe_num_experts": 4, "moe_num_shared_experts": 1},
        {kind: [IMAGE] * 6 * _TILES[kind] for kind in ("image", "small")},
        _tiles_in_one_run,
        units={kind: (Grid(1, 6),) * _TILES[kind] for kind in ("image", "small")},
        after=_aria_queries,
        image_token_index=IMAGE,
        projector_patch_to_query_dict={36: 6, 144: 12},
    ),
    tiny(
        hf.LightOnOcrForConditionalGeneration,
        hf.PixtralVisionConfig(**VISION_SIZES, image_size=32, patch_size=4),
        {**TEXT_SIZES, "model_type": "qwen3", "head_dim": 8},
        {kind: [IMAGE] * grid.tokens for kind, (grid,) in _MISTRAL_UNITS.items()},
        partial(_sized, sizes={kind: (8 * g.height, 8 * g.width) for kind, (g,) in _MISTRAL_UNITS.items()}),
        units=_MISTRAL_UNITS,
        image_token_id=IMAGE,
        spatial_merge_size=2,
    ),
    tiny(
        hf.Ernie4_5_VLMoeForConditionalGeneration,
        {"hidden_size": 32, "intermediate_size": 48, **_QWEN_VISION},
        {
            **TEXT_SIZES,
            "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]},
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": [24, 12],
            "mlp_layer_types": ["dense", "sparse"] * 2,
        },
        _QWEN_TOKENS | {"video": [SEPARATOR, *[VIDEO] * 6, SEPARATOR]},
        _patches_and_experts,
        units=_QWEN_UNITS | {"video": (Grid(2, 3),)},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=SEPARATOR,
        image_end_token_id=SEPARATOR,
        video_start_token_id=SEPARATOR,
        video_end_token_id=SEPARATOR,
    ),
)
TINY: dict[str, TinyFamily] = {family.model_type: family for family in _FAMILIES}
