"""What a model is, read from its `config.json` without transformers; unknown models give None and are checked later."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

from orchestrator.spec.components import Grid
from orchestrator.spec.decoder_layers import DecoderLayer, decoder_layers, inner_size
from orchestrator.spec.image_units import (
    ImageRule,
    ImageUnits,
    VideoRule,
    image_rule,
    processor_settings,
    video_rule,
    video_settings,
)
from orchestrator.spec.model import ModelSpec

_KEYS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip


def _text(*values: int | None) -> dict[str, Any]:
    return dict(zip(_KEYS, values, strict=True))


_QWEN2_VL = _text(80, 8192, 29568, 64, 8, None, 152064)
_GEMMA3 = _text(26, 2304, 9216, 8, 4, 256, 262208)

_DELTA_RULE = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_LFM2 = {
    "conv_L_cache": 3, "block_auto_adjust_ff_dim": True, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
}  # fmt: skip


def _routed(experts: int, of_a_token: int, inner: int) -> dict[str, Any]:
    return {"num_experts": experts, "num_experts_per_tok": of_a_token, "moe_intermediate_size": inner}


TEXT: dict[str, dict[str, Any]] = {
    "llama": _text(32, 4096, 11008, 32, None, None, 32000),
    "mistral": _text(32, 4096, 14336, 32, 8, None, 32000),
    "ministral3": _text(34, 4096, 14336, 32, 8, 128, 131072),
    "qwen2": _text(32, 4096, 22016, 32, 32, None, 151936),
    "qwen3": _text(32, 4096, 22016, 32, 32, 128, 151936),
    "gemma": _text(28, 3072, 24576, 16, 16, 256, 256000),
    "gemma2": _text(26, 2304, 9216, 8, 4, 256, 256000),
    "gemma3_text": _GEMMA3,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": _text(32, 4096, 22016, 32, 32, 128, 151936),
    "qwen3_vl_moe_text": _text(24, 2048, 5632, 16, 16, 128, 151936) | _routed(60, 4, 1408),
    "qwen3_5_text": _text(32, 4096, 12288, 16, 4, 256, 248320) | _DELTA_RULE,
    "qwen3_5_moe_text": _text(40, 2048, None, 16, 2, 256, 248320)
    | _DELTA_RULE
    | _routed(256, 8, 512)
    | {"shared_expert_intermediate_size": 512},
    "qwen2_5_omni_text": _text(28, 3584, 18944, 28, 4, None, 152064),
    "qwen3_omni_moe_text": _text(28, 2048, 18944, 28, 4, None, 3584) | _routed(128, 8, 768),
    "glm4v_text": _text(40, 4096, 13696, 32, 2, None, 151552),
    "glm4v_moe_text": _text(46, 4096, 10944, 96, 8, None, 151424)
    | _routed(128, 8, 1408)
    | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "glm_ocr_text": _text(16, 1024, 4096, 16, 8, None, 59392),
    "cohere2": _text(40, 8192, 22528, 64, None, None, 256000),
    "lfm2": _text(32, 2560, 12288, 32, 8, None, 65536) | _LFM2,
    "granite4_vision_text": _text(32, 4096, 11008, 32, None, None, 32000),
    "gemma4_text": _text(30, 2304, 9216, 8, 4, 256, 262144)
    | {"global_head_dim": 512, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
    | {"num_kv_shared_layers": 0}
    | {"attention_k_eq_v": False, "enable_moe_block": False},
    "llama4_text": _text(48, 5120, 8192, 40, 8, 128, 202048)
    | {"intermediate_size_mlp": 16384, "num_local_experts": 16, "interleave_moe_layer_step": 1},
    "molmo2_text": _text(36, 4096, 12288, 32, 8, 128, 151936),
    "step3p5": _text(45, 4096, 11264, 64, 8, 128, 128815)
    | {"n_routed_experts": 288, "num_experts_per_tok": 8, "moe_intermediate_size": 1280, "share_expert_dim": 1280},
}


def _vision(layers: int, width: int, inner: int, image: int, patch: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner}
    return {**sizes, "image_size": image, "patch_size": patch, **more}


_WINDOWED = {
    "depth": 32, "patch_size": 14, "out_hidden_size": 3584, "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
}  # fmt: skip
_QWEN3_VISION = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "out_hidden_size": 3584,
}  # fmt: skip

# Its positions are interpolated: `image_size` is only what they were made for.
_GLM_VISION = {
    "depth": 24, "hidden_size": 1536, "intermediate_size": 13696, "patch_size": 14, "out_hidden_size": 4096,
    "in_channels": 3,
}  # fmt: skip

VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": _vision(12, 768, 3072, 224, 32),
    "siglip_vision_model": _vision(12, 768, 3072, 224, 16),
    "idefics3_vision": _vision(12, 1152, 3072, 224, 32),
    "smolvlm_vision": _vision(12, 1152, 3072, 224, 32),
    "internvl_vision": _vision(24, 1024, 4096, 448, 14),
    "pixtral": _vision(24, 1024, 4096, 1024, 16),
    # Their sizes are called otherwise; any image size goes.
    "qwen2_vl_vision": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "patch_size": 14},
    "qwen2_5_vl_vision": _WINDOWED | {"hidden_size": 3584, "intermediate_size": 3420},
    "qwen3_vl_vision": _QWEN3_VISION | {"deepstack_visual_indexes": (8, 16, 24)},
    "qwen3_vl_moe_vision": _QWEN3_VISION | {"deepstack_visual_indexes": (8, 16, 24)},
    "qwen3_omni_moe_vision_encoder": _QWEN3_VISION | {"deepstack_visual_indexes": (8, 16, 24)},
    "qwen3_5_vision": _QWEN3_VISION,
    "qwen3_5_moe_vision": _QWEN3_VISION,
    "qwen2_5_omni_vision_encoder": _WINDOWED | {"hidden_size": 3584, "intermediate_size": 3420},
    "glm4v_vision": _GLM_VISION,
    "glm4v_moe_vision": _GLM_VISION,
    "glm_ocr_vision": _GLM_VISION | {"hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 1536},
    "ovis2_vision": _vision(24, 1024, 2816, 224, 14, hidden_stride=1, vocab_size=16384, num_visual_indicator_tokens=5),
    "video_llama_3_vision": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "patch_size": 16},
    "siglip2_vision_model": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "patch_size": 16},
}

_SAM = {
    **_vision(12, 768, 3072, 1024, 16),
    "output_channels": 256, "window_size": 14, "global_attn_indexes": (2, 5, 8, 11), "mlp_dim": 3072,
}  # fmt: skip
VISION |= {
    "gemma4_vision": {"num_hidden_layers": 16, "hidden_size": 768, "intermediate_size": 3072, "patch_size": 16}
    | {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64, "pooling_kernel_size": 3},
    "llama4_vision_model": _vision(34, 768, 5632, 448, 14, pixel_shuffle_ratio=0.5, vision_output_dim=7680)
    | {"projector_input_dim": 4096, "projector_output_dim": 4096},
    "molmo2_vision": _vision(25, 1152, 4304, 378, 14, num_attention_heads=16, num_key_value_heads=16, head_dim=72),
    "step3p5_vision": _vision(47, 1536, 0, 728, 14, mlp_ratio=8960 / 1536),
    "got_ocr2_vision": _SAM,
    "pp_chart2table_vision": _SAM,
}

# Norms of a decoder layer where they are not two; Gemma's keep what they normed in float32, as a fifth one would.
_NORMS = {"gemma": 3, "gemma2": 5, "gemma3_text": 5, "gemma4_text": 5, "glm4v_text": 4, "glm_ocr_text": 4}
_HEAD_NORMS = (
    "qwen3", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text", "qwen3_5_text", "qwen3_5_moe_text",
    "gemma3_text", "gemma4_text", "molmo2_text", "lfm2",
)  # fmt: skip
# Values are a view of what one map gives for queries, keys and values; what pieces of a row give is joined once more;
# GLM-OCR norms queries and keys, GLM-4V its patches before and after they are merged.
_TOWER_COPIES = {
    **dict.fromkeys((name for name in VISION if name.startswith("qwen")), 3), "ovis2_vision": 3,
    "video_llama_3_vision": 1, "glm4v_vision": 4, "glm4v_moe_vision": 4, "glm_ocr_vision": 9,
}  # fmt: skip

PLAIN_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose layers are blocks alike over one sequence of patches, with positions added at the input alone."""

_CLIP_L_336 = {"model_type": "clip_vision_model", **_vision(24, 1024, 4096, 336, 14)}
_SO400M = {"model_type": "siglip_vision_model", **_vision(26, 1152, 4304, 384, 14)}


Part = Mapping[str, Any]
"""A config, or a part of one."""


class Projector(NamedTuple):
    """A projector of its own kind.

    Attributes:
        passed: Weights that a token it gives has passed.
        kept: Numbers that training keeps for each of these tokens: what linear maps, norms and activations were given.
            A norm counts for three of its width, what it was given once in float32 (two numbers) and normed.
        stored: Its weights, where these are others; else 0.
    """

    passed: int
    kept: int
    stored: int = 0


@dataclass(frozen=True)
class FamilyDefaults:
    """What a family's config class takes where a part is left out, and how its images become tokens.

    Attributes:
        text_type: Type of the language model where `text_config` has none.
        vision: The vision tower where `vision_config` is left out altogether.
        units: How many tokens one unit (image, frame, tile) becomes: its `patches`; the patches `shuffled` together;
            a number `stated` in the config; or it `varies` with the image.
        text: The language model's sizes where `text_config` is left out, as far as they differ from the type's.
        top: Further keys of the config with the class's defaults.
        tiled: An image may become several units.
        projector_layers: The projector's linear maps.
        tokenwise: The projector maps token by token, so that methods at the projector act on what it takes.
        cls: The vision tower's CLS token is one for the tokens of a unit, so that methods may ask for its attention.
        offers: Further needs of methods the family can meet.
        gated_tower: The MLP of the vision tower has three matrices.
        towers: Vision towers of the same sizes, of which one sees an image.
        other_names: The decoder's linear maps have other names than LLaMA's.
        projector: The projector, of `(text, vision, config)`, where it is no one or two linear maps.
        tower_refusal: Why no compressor may act inside the vision tower; empty where one may in a tower that is one of
            `PLAIN_TOWERS`.
        zero3_refusal: What of a batch decides how often some modules are called, so that several workers under ZeRO-3,
            which gathers a module whenever any of them calls it, would wait for one another; empty where every batch
            calls the same ones.
    """

    text_type: str
    vision: dict[str, Any]
    units: Literal["patches", "shuffled", "stated", "varies"]
    text: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    tiled: bool = False
    projector_layers: int = 2
    tokenwise: bool = False
    cls: bool = False
    offers: frozenset[str] = frozenset()
    gated_tower: bool = False
    towers: int = 1
    other_names: bool = False
    projector: Callable[[Part, Part, Part], Projector] | None = None
    tower_refusal: str = "between it and the decoder the model merges, pools or arranges its patches by their grid"
    zero3_refusal: str = ""


def _merger(text: Part, vision: Part, top: Part) -> Projector:
    """Qwen-VL: neighbours side by side, two linear maps; one such merger more for each level of DeepStack."""
    merged = (vision.get("embed_dim") or vision["hidden_size"]) * vision.get("spatial_merge_size", 2) ** 2
    given = vision.get("out_hidden_size") or vision["hidden_size"]
    levels = 1 + len(vision.get("deepstack_visual_indexes", ()))
    return Projector(levels * (merged * merged + merged * given), levels * 6 * merged)


def _mistral3(text: Part, vision: Part, top: Part) -> Projector:
    """Neighbours become one by a linear map, then two more."""
    width, given = vision["hidden_size"], text["hidden_size"]
    layers = top["vision_feature_layer"]
    several, merged = width * (len(layers) if isinstance(layers, list) else 1), width * top["spatial_merge_size"] ** 2
    return Projector(width * merged + several * given + given * given, 5 * merged + several + 2 * given)


def _glm(text: Part, vision: Part, top: Part) -> Projector:
    """GLM-4V: neighbours become one by a convolution, then a linear map and a gated MLP."""
    given, merge = vision["out_hidden_size"], vision.get("spatial_merge_size", 2)
    ocr = top["model_type"] == "glm_ocr"
    inner = given * vision["in_channels"] if ocr else vision["intermediate_size"]
    merged = vision["hidden_size"] * merge**2
    return Projector(merged * given + given * given + 3 * given * inner, 9 * merged + 6 * given + 4 * inner)


def _swiglu(text: Part, vision: Part, top: Part) -> Projector:
    """Aya and Cohere2 Vision: neighbours side by side, a map to two halves of which one gates the other, a map."""
    inner = top.get("alignment_intermediate_size", text["hidden_size"])
    merged = vision["hidden_size"] * top["downsample_factor"] ** 2
    return Projector(merged * inner + inner // 2 * text["hidden_size"], 4 * merged + 2 * inner)


def _visual_table(text: Part, vision: Part, top: Part) -> Projector:
    """Ovis2: a probability over visual words, and the mean of their embeddings (arXiv 2405.20797, section 3.1)."""
    words, width = vision["vocab_size"], vision["hidden_size"] * vision["hidden_stride"] ** 2
    passed = width * (words - vision["num_visual_indicator_tokens"]) + words * text["hidden_size"]
    return Projector(passed, 4 * width + 6 * words)


def _lfm2(text: Part, vision: Part, top: Part) -> Projector:
    """LFM2-VL: neighbours side by side, two linear maps."""
    inner = top["projector_hidden_size"]
    merged = vision["hidden_size"] * top["downsample_factor"] ** 2
    return Projector(merged * inner + inner * text["hidden_size"], 4 * merged + 2 * inner)


def _spatial_layers(top: Part) -> Sequence[int]:
    return top.get("spatial_target_layers") or (12, 15, 18, 21)


def _window_q_former(text: Part, vision: Part, top: Part) -> Projector:
    """Granite 4 Vision: for each kind of feature a Q-Former within windows, whose queries are the tokens it gives.

    In a window of `w x w` patches and `q x q` queries each query attends to the queries and to the patches, of which
    `w^2 / q^2` fall to it; operations of attention count as weights that a token passes.
    """
    if not top.get("downsample_rate"):
        return Projector(0, 0)  # no such model can be built
    queries, patches = (int(side) ** 2 for side in top["downsample_rate"].split("/"))
    former = {"num_hidden_layers": 1, "intermediate_size": 3072, "cross_attention_frequency": 1}
    former |= top.get("qformer_config") or {}
    width, given = vision["hidden_size"], text["hidden_size"]
    every = former["cross_attention_frequency"]
    passed = stored = width * given
    for layer in range(former["num_hidden_layers"]):
        own = 4 * width * width + 2 * width * former["intermediate_size"]
        passed, stored = passed + own + 2 * queries * width, stored + own
        if layer % every == 0:
            keys = 2 * width * width
            passed += 2 * width * width + keys * patches // queries + 2 * patches * width
            stored += 2 * width * width + keys
    several = len(top.get("deepstack_layer_map") or ()) + len(_spatial_layers(top))
    # Two attentions with their norms over queries, keys and values of the patches, the MLP; windows and their means.
    kept = former["num_hidden_layers"] * ((20 + 3 * patches // queries) * width + 3 * former["intermediate_size"])
    kept += 4 * patches // queries * width + width
    return Projector(several * passed, several * kept, several * stored)


def _vision_adapter(text: Part, vision: Part, top: Part) -> Projector:
    """Llama 4: what a linear map takes; the tower's own adapter before it is the tower's."""
    inside = vision["intermediate_size"] + 2 * vision["projector_input_dim"] + vision["projector_output_dim"]
    return Projector(vision["vision_output_dim"] * text["hidden_size"], inside + vision["vision_output_dim"])


def _downsampler(text: Part, vision: Part, top: Part) -> Projector:
    """Step 3.7: two convolutions of 3 x 3 and stride 2, each to twice the width, then a linear map."""
    width = vision["hidden_size"]
    first, second, last = 9 * width * 2 * width, 9 * 2 * width * 4 * width, 4 * width * text["hidden_size"]
    return Projector(4 * first + second + last, (16 + 4 * 2 + 4) * width, first + second + last)


def _sam_neck(text: Part, vision: Part, top: Part) -> Projector:
    """GOT-OCR 2: two convolutions over all patches, two of stride 2, of which edges are rounded up, a linear map."""
    width, channels, given = vision["hidden_size"], vision["output_channels"], text["hidden_size"]
    side = _side(vision["image_size"]) // _side(vision["patch_size"])
    half, quarter = -(-side // 2), -(-side // 4)
    parts = (width * channels + 9 * channels**2, 9 * channels * 2 * channels, 9 * 2 * channels * given + given**2)
    counts = (side, half, quarter)
    done = sum(count**2 * part for count, part in zip(counts, parts, strict=True))
    kept = side**2 * (width + 6 * channels) + half**2 * 2 * channels
    each = max(1, quarter) ** 2
    return Projector(round(done / each), round(kept / each) + 2 * given, sum(parts))


def _attention_pooling(text: Part, vision: Part, top: Part) -> Projector:
    """Molmo 2: a query attends to the 2 x 2 patches it is the mean of, of several layers; then a gated MLP.

    Operations of attention count as weights that a token passes.
    """
    adapter = _MOLMO2_ADAPTER | (top.get("adapter_config") or {})
    width, inner, patches = adapter["hidden_size"], adapter["intermediate_size"], 4
    heads = adapter["num_attention_heads"] * adapter["head_dim"]
    keys = 2 * adapter["num_key_value_heads"] * adapter["head_dim"]
    taken = width * len(adapter["vision_feature_layer"])
    after = heads * width + 2 * width * inner + inner * adapter["text_hidden_size"]
    passed = taken * (heads + patches * keys) + 2 * patches * heads + after
    kept = taken * (2 + patches) + 3 * heads + patches * keys + width + 4 * inner
    return Projector(passed, kept, taken * (heads + keys) + after)


_MOLMO2_ADAPTER: dict[str, Any] = {
    "vision_feature_layer": [24, 18], "hidden_size": 1152, "num_attention_heads": 16, "num_key_value_heads": 16,
    "head_dim": 72, "intermediate_size": 18944, "text_hidden_size": 3584,
}  # fmt: skip
_LLAVA = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
_VIP_LLAVA = {"vision_feature_layer": [-2, -5, -8, -11, 6], "vision_feature_select_strategy": "default"}
_ONEVISION = {
    "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
}  # fmt: skip
_PIXTRAL = {"model_type": "pixtral", **_vision(24, 1024, 4096, 1540, 14)}
_SO400M_224 = {"model_type": "siglip_vision_model", **_vision(27, 1152, 4096, 224, 14)}
_MISTRAL3 = _text(40, 5120, 32768, 32, 8, 128, 131072)
_PALIGEMMA = _text(18, 2048, 16384, 8, 1, 256, 257152)


def _idefics(vision_type: str) -> FamilyDefaults:
    vision, top = {"model_type": vision_type}, {"scale_factor": 2}
    return FamilyDefaults("llama", vision, "shuffled", top=top, tiled=True, tokenwise=True, projector_layers=1)


def _qwen(text_type: str, vision_type: str, **more: Any) -> FamilyDefaults:
    return FamilyDefaults(text_type, {"model_type": vision_type}, "varies", projector=_merger, **more)


def _glm4v(text_type: str, vision_type: str) -> FamilyDefaults:
    return FamilyDefaults(
        text_type, {"model_type": vision_type}, "varies", projector=_glm, gated_tower=True, other_names=True
    )


def _got_ocr(vision_type: str) -> FamilyDefaults:
    text = _text(24, 1024, 2816, 16, 16, None, 151860)
    return FamilyDefaults("qwen2", {"model_type": vision_type}, "varies", text=text, tiled=True, projector=_sam_neck)


FAMILIES: dict[str, FamilyDefaults] = {
    "llava": FamilyDefaults(
        "llama",
        _CLIP_L_336,
        "patches",
        top=_LLAVA,
        tokenwise=True,
        cls=True,
        offers=frozenset({"pixels"}),
        tower_refusal="",
    ),
    "vipllava": FamilyDefaults(
        "llama", _CLIP_L_336, "patches", top=_VIP_LLAVA, tokenwise=True, cls=True, tower_refusal=""
    ),
    "video_llava": FamilyDefaults(
        "llama",
        _CLIP_L_336 | {"image_size": 224},
        "patches",
        top=_LLAVA,
        towers=2,
        tower_refusal="images and videos have a tower each",
    ),
    "llava_next": FamilyDefaults("llama", _CLIP_L_336, "varies", top=_LLAVA, tiled=True),
    "llava_onevision": FamilyDefaults("qwen2", _SO400M, "varies", top=_ONEVISION, tiled=True),
    "internvl": FamilyDefaults(
        "qwen2",
        {"model_type": "internvl_vision"},
        "shuffled",
        top={"downsample_ratio": 0.5},
        tiled=True,
        tokenwise=True,
    ),
    "idefics3": _idefics("idefics3_vision"),
    "smolvlm": _idefics("smolvlm_vision"),
    "mistral3": FamilyDefaults(
        "mistral",
        _PIXTRAL,
        "varies",
        text=_MISTRAL3,
        top={"vision_feature_layer": -1, "spatial_merge_size": 2},
        gated_tower=True,
        projector=_mistral3,
    ),
    "qwen2_vl": _qwen("qwen2_vl_text", "qwen2_vl_vision"),
    "qwen2_5_vl": _qwen("qwen2_5_vl_text", "qwen2_5_vl_vision", gated_tower=True),
    "qwen3_vl": _qwen("qwen3_vl_text", "qwen3_vl_vision"),
    "qwen3_vl_moe": _qwen("qwen3_vl_moe_text", "qwen3_vl_moe_vision"),
    "qwen3_5": _qwen("qwen3_5_text", "qwen3_5_vision"),
    "qwen3_5_moe": _qwen("qwen3_5_moe_text", "qwen3_5_moe_vision"),
    "qwen2_5_omni_thinker": _qwen("qwen2_5_omni_text", "qwen2_5_omni_vision_encoder", gated_tower=True),
    "qwen3_omni_moe_thinker": _qwen("qwen3_omni_moe_text", "qwen3_omni_moe_vision_encoder"),
    "glm4v": _glm4v("glm4v_text", "glm4v_vision"),
    "glm4v_moe": _glm4v("glm4v_moe_text", "glm4v_moe_vision"),
    "glm46v": _glm4v("glm4v_text", "glm4v_vision"),
    "glm_ocr": _glm4v("glm_ocr_text", "glm_ocr_vision"),
    "video_llama_3": FamilyDefaults("qwen2", {"model_type": "video_llama_3_vision"}, "varies"),
    "aya_vision": FamilyDefaults(
        "cohere2",
        {"model_type": "siglip_vision_model", **_vision(26, 1152, 4304, 384, 14)},
        "shuffled",
        top={"downsample_factor": 2, "vision_feature_layer": -1},
        tiled=True,
        projector=_swiglu,
    ),
    "cohere2_vision": FamilyDefaults(
        "cohere2",
        {"model_type": "siglip_vision_model", **_vision(27, 1152, 3072, 512, 16)},
        "shuffled",
        top={"downsample_factor": 2, "alignment_intermediate_size": 36864},
        tiled=True,
        projector=_swiglu,
    ),
    "ovis2": FamilyDefaults(
        "qwen2", {"model_type": "ovis2_vision"}, "shuffled", tiled=True, gated_tower=True, projector=_visual_table
    ),
    "lfm2_vl": FamilyDefaults(
        "lfm2",
        {"model_type": "siglip2_vision_model"},
        "varies",
        top={"downsample_factor": 2, "projector_hidden_size": 2560},
        projector=_lfm2,
        other_names=True,
        zero3_refusal="its projector is called once for each image",
    ),
    "llava_next_video": FamilyDefaults("llama", _CLIP_L_336, "varies", top=_LLAVA, tiled=True),
    "granite4_vision": FamilyDefaults(
        "granite4_vision_text",
        {"model_type": "clip_vision_model"},
        "varies",
        tiled=True,
        projector=_window_q_former,
    ),
    "lighton_ocr": FamilyDefaults(
        "qwen3",
        _PIXTRAL,
        "varies",
        text=_text(28, 1024, 3072, 16, 8, 128, 151936),
        top={"vision_feature_layer": -1, "spatial_merge_size": 2},
        gated_tower=True,
        projector=_mistral3,
    ),
    "llama4": FamilyDefaults(
        "llama4_text",
        {"model_type": "llama4_vision_model"},
        "shuffled",
        tiled=True,
        tokenwise=True,
        projector=_vision_adapter,
    ),
    "step3p7": FamilyDefaults(
        "step3p5",
        {"model_type": "step3p5_vision"},
        "varies",
        tiled=True,
        projector=_downsampler,
        zero3_refusal="its vision tower is called a second time where an image has local views",
    ),
    "got_ocr2": _got_ocr("got_ocr2_vision"),
    "pp_chart2table": _got_ocr("pp_chart2table_vision"),
    "molmo2": FamilyDefaults(
        "molmo2_text", {"model_type": "molmo2_vision"}, "varies", tiled=True, projector=_attention_pooling
    ),
    "gemma4": FamilyDefaults(
        "gemma4_text", {"model_type": "gemma4_vision"}, "varies", gated_tower=True, projector_layers=1
    ),
    "paligemma": FamilyDefaults(
        "gemma", _SO400M_224, "patches", text=_PALIGEMMA, projector_layers=1, tokenwise=True, tower_refusal=""
    ),
    "gemma3": FamilyDefaults(
        "gemma3_text",
        {"model_type": "siglip_vision_model"},
        "stated",
        top={"mm_tokens_per_image": 256},
        projector_layers=1,
        tower_refusal="its projector pools the square of patches",
    ),
}


WITHOUT_FACTS = (
    "perception_lm",  # its tower's sizes stand in timm
    "aria",  # its projector's keys are of patches, whose number for a query differs
    "ernie4_5_vl_moe",  # visual tokens, and those around them, go to experts of another size
)
"""Types that have an adapter of their own, and whose costs are not known."""

UNCHECKED_CALLS = "it has no adapter of its own, and its self-check does not compare the calls of batches"


def zero3_refusal(model_type: str) -> str:
    """Return why several workers cannot train a type of model under ZeRO-3; empty where they can."""
    if model_type in FAMILIES:
        return FAMILIES[model_type].zero3_refusal
    return "" if model_type in WITHOUT_FACTS else UNCHECKED_CALLS


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a vision-language model.

    Attributes:
        model_type: `model_type` of the config.
        num_layers: Decoder layers of the language model.
        hidden_size: Width of the language model.
        intermediate_size: Width of its MLP.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of one head.
        vocab_size: Size of the vocabulary.
        vision_layers: Layers of the vision tower that are used: `vision_feature_layer: -2` uses all but the last.
        vision_hidden_size: Width of the vision tower.
        vision_intermediate_size: Width of its MLP.
        vision_tokens: Tokens inside the vision tower for one image, CLS included.
        projector_in: Width of the features the projector takes.
        projector_hidden: Width of the projector.
        visual_grid: Visual tokens of one image (tile, frame) as the language model sees them, before compression; None
            where it varies with the image's size.
        has_cls: True where the vision tower has a CLS token that methods may ask for.
        gated_mlp: True where the MLP has three matrices (SwiGLU, GeGLU), False for two.
        tiled: An image may become several tiles or frames.
        projector_layers: Linear maps of the projector, 2 or 1.
        tokenwise_projector: It maps token by token; methods at the projector act on what it takes.
        first_layer: First decoder layer before which a compressor may act (DeepStack adds visual features up to it).
        offers: Needs of methods the family meets beside attention: `cls`, `pixels`.
        gated_tower: The MLP of the vision tower has three matrices.
        windowed_layers: Of `vision_layers` those that attend within windows.
        projector_size: Weights that a token the projector gives has passed, where it is no one or two linear maps of
            the sizes above; 0 where it is.
        projector_stored: Its weights, where these are others; else 0.
        projector_kept: Numbers that training keeps for a token it gives, where it is no one or two linear maps.
        decoder_norms: Norms of a decoder layer, by what training keeps for them.
        head_norms: Queries and keys of the decoder are normed head by head.
        tower_copies: Widths that training keeps for a patch in each layer of the tower beside those of a plain block.
        decoder_layers: The decoder's layers where they are not all dense and of `intermediate_size`; else empty.
        towers: Vision towers of these sizes, of which one sees an image.
        other_names: The decoder's linear maps have other names than LLaMA's; then LoRA's modules are checked when a
            run starts, and its cost is not known.
        vision_depth: Layers of the vision tower, used or not; what a share of its depth is a share of.
        tower_points: Layers 0 to this - 1 of the vision tower are those before which a compressor may act; 0 for none.
        tower_refusal: Why none may.
        tower_adapter: Weights that a feature passes behind the tower's layers, before what points at the projector
            leave of it.
        relative_positions: Each layer of the tower adds a product of queries and relative places (SAM).
        patches_per_token: Tokens of the tower for a visual token, where images vary in size: about, and rather more.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    vision_layers: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_tokens: int
    projector_in: int
    projector_hidden: int
    visual_grid: Grid | None
    has_cls: bool
    gated_mlp: bool
    tiled: bool = False
    projector_layers: int = 2
    tokenwise_projector: bool = False
    first_layer: int = 0
    offers: frozenset[str] = frozenset()
    gated_tower: bool = False
    windowed_layers: int = 0
    projector_size: int = 0
    projector_stored: int = 0
    projector_kept: int = 0
    decoder_norms: int = 2
    head_norms: bool = False
    tower_copies: int = 0
    decoder_layers: tuple[DecoderLayer, ...] = ()
    towers: int = 1
    other_names: bool = False
    vision_depth: int = 0
    tower_points: int = 0
    tower_refusal: str = ""
    tower_adapter: int = 0
    relative_positions: bool = False
    patches_per_token: int = 4

    @property
    def priced(self) -> bool:
        """True where an image is always the same number of tokens, so that costs are known without the data."""
        return self.visual_grid is not None and not self.tiled

    @property
    def image_grid(self) -> Grid:
        """The tokens of an image.

        Raises:
            ValueError: they vary with its size.
        """
        if self.visual_grid is None or self.tiled:
            raise ValueError(f"the visual tokens of an image vary with its size in {self.model_type}")
        return self.visual_grid

    @property
    def projector_weights(self) -> int:
        """Weights of the projector's linear maps."""
        if self.projector_size:
            return self.projector_size
        if self.projector_layers == 1:
            return self.projector_in * self.hidden_size
        return self.projector_in * self.projector_hidden + self.projector_hidden * self.hidden_size


def model_facts(model_name_or_path: str, revision: str | None = None) -> ModelFacts | None:
    """Return the facts of a model; None where its type is not in the table or its config is not at hand.

    Args:
        model_name_or_path: A folder, or a hub id, which is looked up in the hub's cache without network.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: the folder's `config.json` cannot be read, or is not a model's.
    """
    path = find_config(model_name_or_path, revision)
    if path is None:
        return None
    stat = path.stat()
    return _facts_of(str(path), stat.st_mtime_ns, stat.st_size)


def find_config(model_name_or_path: str, revision: str | None = None) -> Path | None:
    """Return the model's `config.json`: in its folder, or in the hub's cache; None where there is none."""
    local = Path(model_name_or_path)
    folder = local if local.is_dir() else hub_snapshot(model_name_or_path, revision)
    path = None if folder is None else folder / "config.json"
    return path if path is not None and path.is_file() else None


def hub_snapshot(repo_id: str, revision: str | None = None, kind: str = "model") -> Path | None:
    """Return the folder of a hub repository's files at a revision in the local cache; None where it has none.

    Args:
        repo_id: The hub id.
        revision: Branch, tag or commit; None for `main`.
        kind: `model` or `dataset`.
    """
    repository, revision = hub_repository(repo_id, kind), revision or "main"
    try:
        reference = repository / "refs" / revision
        commit = reference.read_text().strip() if reference.is_file() else revision
        found = repository / "snapshots" / (commit or "-")
        return found if found.is_dir() else None
    except OSError:
        return None


def hub_repository(repo_id: str, kind: str = "model") -> Path:
    """Return the folder of a hub repository in the local cache."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")) / f"{kind}s--{repo_id.replace('/', '--')}"


def read_config(model_name_or_path: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return the content of a model's `config.json`; None where it cannot be read, which `model_facts` reports."""
    path = find_config(model_name_or_path, revision)
    try:
        config = json.loads(path.read_bytes()) if path is not None else None
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def compute_type(model: ModelSpec) -> str | None:
    """Return what a model computes in, without loading it; None where its config does not say so plainly."""
    if model.dtype != "auto":
        return model.dtype
    config = read_config(model.model_name_or_path, model.revision)
    named = [part.get("dtype", part.get("torch_dtype")) for part in (config or {}).values() if isinstance(part, dict)]
    whole = None if config is None else config.get("dtype", config.get("torch_dtype"))
    if config is None or (whole is None and any(named)):
        return None
    return whole if whole in ("bfloat16", "float16") else "float32"


def attention_dropout(model_name_or_path: str, revision: str | None = None) -> tuple[str, float] | None:
    """Return the first part of a config that drops attention weights, and its probability; None where none is known."""
    config = read_config(model_name_or_path, revision) or {}
    for name, part in (("", config), *config.items()):
        value = part.get("attention_dropout") if isinstance(part, dict) else None
        if isinstance(value, float | int) and value > 0:
            return f"{name}.attention_dropout".lstrip("."), float(value)
    return None


def rule_of_images(folder: Path) -> ImageRule:
    """Return what the model in a folder makes of an image of any size.

    Raises:
        ValueError: its type or its files do not say; the message has the reason.
    """
    return image_rule(*_config_parts(folder, "an image"), processor_settings(folder))


def rule_of_videos(folder: Path) -> VideoRule:
    """Return what the model in a folder makes of a video.

    Raises:
        ValueError: its type or its files do not say; the message has the reason.
    """
    return video_rule(*_config_parts(folder, "a video"), video_settings(folder))


class UnitRules:
    """What the model in a folder makes of images and videos; a rule is looked for when the first of them comes.

    Args:
        folder: The model's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _images(self) -> ImageRule:
        return rule_of_images(self._folder)

    @cached_property
    def _videos(self) -> VideoRule:
        return rule_of_videos(self._folder)

    def units(self, shape: tuple[int, int, int], alone: bool) -> ImageUnits:
        """Return what becomes of one by its frames (0 of an image), height and width.

        Raises:
            ValueError: that is not known here.
        """
        frames, height, width = shape
        return self._videos(frames, height, width) if frames else self._images(height, width, alone)


def _config_parts(folder: Path, what: str) -> tuple[Part, Part]:
    """Return the config of the model in a folder and that of its vision tower, with the defaults of their classes."""
    config = read_config(str(folder)) or {}
    family = FAMILIES.get(config.get("model_type", ""))
    vision = None if family is None else _vision_part(config, family)
    if family is None or vision is None:
        raise ValueError(f"what {what} becomes in {config.get('model_type', 'this model')} is not known here")
    return {**family.top, **config}, vision


@lru_cache(maxsize=64)
def _facts_of(path: str, mtime_ns: int, size: int) -> ModelFacts | None:
    try:
        config = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a model's config: expected a JSON object")
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return None
    try:
        return _family_facts(config, family)
    except (TypeError, ZeroDivisionError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a {config['model_type']} config: {error}") from error


def _text_part(config: dict[str, Any], family: FamilyDefaults) -> dict[str, Any] | None:
    given = config.get("text_config")
    if given is None and config["model_type"].startswith("qwen2") and "num_hidden_layers" in config:
        given = {**config, "model_type": family.text_type}  # files of before transformers 4.52 hold it flat
    given = family.text if given is None else given
    if config["model_type"] == "step3p7":  # its files call some of them otherwise, and the type by its own name
        given = {_STEP_NAMES.get(name, name): value for name, value in given.items()} | {"model_type": "step3p5"}
    known = TEXT.get(given.get("model_type", family.text_type))
    return None if known is None else {**known, **given}


_STEP_NAMES = {
    "num_attention_groups": "num_key_value_heads", "moe_num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok", "share_expert_dims": "share_expert_dim",
    "width": "hidden_size", "layers": "num_hidden_layers",
}  # fmt: skip


def _vision_part(config: dict[str, Any], family: FamilyDefaults) -> dict[str, Any] | None:
    given = config.get("vision_config")
    if given is None and config["model_type"] == "gemma4":
        return None  # then it has no tower
    given = family.vision if given is None else {"model_type": family.vision["model_type"], **given}
    if given["model_type"] == config["model_type"]:  # Qwen-VL's own files name the whole model here
        given = {**given, "model_type": family.vision["model_type"]}
    if config["model_type"] == "step3p7":
        given = {_STEP_NAMES.get(name, name): value for name, value in given.items()} | family.vision
    if "vit_config" in config:
        return None  # Molmo 2's own files name layers and sizes otherwise, for transformers to translate
    known = VISION.get(given["model_type"])
    return None if known is None else {**known, **given}


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _family_facts(config: dict[str, Any], family: FamilyDefaults) -> ModelFacts | None:
    text, vision = _text_part(config, family), _vision_part(config, family)
    if text is None or vision is None or not _square_heads(vision):
        return None
    top = {**family.top, **config}
    clip = vision["model_type"] == "clip_vision_model"
    width = vision.get("embed_dim") or vision["hidden_size"]
    depth = vision.get("depth") or vision["num_hidden_layers"]
    layers = top.get("vision_feature_layer", -1)
    layers = layers if isinstance(layers, list) else [layers]
    if top["model_type"] == "granite4_vision":
        layers = [top.get("spatial_vision_layer", -1), *(layer for layer, _ in top.get("deepstack_layer_map") or ())]
    if top["model_type"] == "molmo2":  # these count layers, not hidden states
        chosen = (_MOLMO2_ADAPTER | (top.get("adapter_config") or {}))["vision_feature_layer"]
        layers = [layer + 1 if layer >= 0 else layer for layer in chosen]
    # hidden_states holds the embeddings and then each layer's output, so -2 is what all but the last layer give.
    states = [layer if layer >= 0 else depth + 1 + layer for layer in layers]
    used = max(states)
    side = _side(vision["image_size"]) // _side(vision["patch_size"]) if "image_size" in vision else 0
    heads = text["num_attention_heads"]
    kind = vision["model_type"]
    cls = clip and family.cls
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    layers_of_text = decoder_layers(text, head_dim)
    text_type = text.get("model_type", family.text_type)
    projector = Projector(0, 0) if family.projector is None else family.projector(text, vision, top)
    whole = vision.get("fullatt_block_indexes", vision.get("global_attn_indexes"))
    adapted = vision.get("vision_output_dim", 0)
    unit = None if kind == "pixtral" else _unit(top, vision, family, side, clip)
    refusal = _tower_refusal(kind, family, unit, side)
    return ModelFacts(
        model_type=config["model_type"],
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        intermediate_size=inner_size(text),
        num_attention_heads=heads,
        num_key_value_heads=text["num_key_value_heads"] or heads,
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        vision_layers=used,
        vision_hidden_size=width,
        vision_intermediate_size=_tower_inner(vision, width),
        vision_tokens=side * side + (kind in ("clip_vision_model", "internvl_vision", "llama4_vision_model")),
        projector_in=adapted
        or width * len(layers) * (_shuffled(top, vision) ** 2 if family.units == "shuffled" else 1),
        projector_hidden=text["hidden_size"],
        visual_grid=unit,
        has_cls=cls,
        gated_mlp=True,
        tiled=family.tiled,
        tokenwise_projector=family.tokenwise,
        projector_layers=family.projector_layers,
        first_layer=_first_layer(top, vision),
        # Pixtral's tower has no positions that could be interpolated for a smaller image.
        offers=(family.offers if kind != "pixtral" else frozenset()) | ({"cls"} if cls else set()),
        gated_tower=family.gated_tower or kind == "pixtral",
        windowed_layers=0 if whole is None else depth - len({layer for layer in whole if layer < depth}),
        decoder_layers=layers_of_text,
        towers=family.towers,
        other_names=family.other_names or bool(layers_of_text),
        projector_size=projector.passed,
        projector_stored=projector.stored,
        projector_kept=projector.kept,
        decoder_norms=_NORMS.get(text_type, 2),
        head_norms=text_type in _HEAD_NORMS,
        tower_copies=_TOWER_COPIES.get(kind, 0),
        vision_depth=depth,
        tower_points=0 if refusal else max(0, min(states)),
        tower_refusal=refusal,
        tower_adapter=_adapter(vision),
        relative_positions="global_attn_indexes" in vision and bool(vision.get("use_rel_pos", True)),
        patches_per_token=_patches_per_token(top, vision),
    )


def _patches_per_token(top: Part, vision: Part) -> int:
    """Return how many patches become a token: Qwen-VL's merger has four, and most have no more."""
    if top["model_type"] == "llava_next":
        return 2  # one, and others are of the margin around the image
    if vision["model_type"] == "step3p5_vision" or "mlp_dim" in vision:
        return 16  # two convolutions of stride 2
    return int(vision.get("pooling_kernel_size", 2)) ** 2


def _adapter(vision: Part) -> int:
    """Return the weights of the tower's own adapter: Llama 4's two linear maps over patches side by side."""
    if "vision_output_dim" not in vision:
        return 0
    return int(vision["intermediate_size"] * vision["projector_input_dim"] + vision["projector_output_dim"] ** 2)


def _square_heads(vision: Part) -> bool:
    """Return whether the tower's heads together are as wide as the tower, which its cost takes for granted."""
    heads, head = vision.get("num_attention_heads"), vision.get("head_dim")
    wide = not (heads and head) or heads * head == vision["hidden_size"]
    return wide and (vision.get("num_key_value_heads") or heads) == heads


def _tower_inner(vision: Part, width: int) -> int:
    """Return the width of the tower's MLP; GLM-4V's is what its tower gives, GLM-OCR's the config's."""
    if vision["model_type"] in ("glm4v_vision", "glm4v_moe_vision"):
        return int(vision["out_hidden_size"])
    if "mlp_dim" in vision:  # SAM
        return int(vision["mlp_dim"])
    if vision["model_type"] == "step3p5_vision":
        return int(width * vision["mlp_ratio"])
    return int(vision.get("intermediate_size") or width * vision["mlp_ratio"])


def _first_layer(top: Part, vision: Part) -> int:
    """Return the layer after the last one that visual features enter (DeepStack, Granite 4 Vision)."""
    if top["model_type"] == "granite4_vision":
        deep = [layer for _, layer in top.get("deepstack_layer_map") or ()]
        return int(max([*deep, *_spatial_layers(top)])) + 1
    return len(vision.get("deepstack_visual_indexes", ()))


def _shuffled(top: Part, vision: Part) -> int:
    """Return how many patches along a side lie in one token."""
    for name in ("scale_factor", "downsample_factor"):
        if name in top:
            return int(top[name])
    for part, name in ((top, "downsample_ratio"), (vision, "pixel_shuffle_ratio")):
        if name in part:
            return round(1 / part[name])
    return int(vision["hidden_stride"])


def _tower_refusal(tower: str, family: FamilyDefaults, unit: Grid | None, side: int) -> str:
    """Return why no compressor may act inside a vision tower; empty where one may."""
    if family.tower_refusal:
        return family.tower_refusal
    if tower not in PLAIN_TOWERS:
        return f"it is a {tower}, not one of {', '.join(PLAIN_TOWERS)}, whose positions are added at the input"
    if unit != Grid(side, side):
        return "its visual tokens are not its patches one to one (vision_feature_select_strategy)"
    return ""


def _unit(top: Part, vision: Part, family: FamilyDefaults, side: int, clip: bool) -> Grid | None:
    """Return the tokens of one image, tile or frame."""
    if family.units == "varies":
        return None
    if family.units == "shuffled":
        return Grid(side // _shuffled(top, vision), side // _shuffled(top, vision))
    if family.units == "stated":
        stated = isqrt(top["mm_tokens_per_image"])
        return Grid(stated, stated)
    if top.get("vision_feature_select_strategy") == "full" and clip:
        return Grid(1, side * side + 1)  # the CLS token stays
    if top.get("vision_feature_select_strategy") == "default" and not clip:
        return Grid(1, side * side - 1)  # `default` drops the first token, a CLS or not
    return Grid(side, side)
