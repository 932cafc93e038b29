"""What transformers' config classes take where a `config.json` leaves something out, by type (tested against them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_KEYS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip


def _text(*values: int | None) -> dict[str, Any]:
    return dict(zip(_KEYS, values, strict=True))


_QWEN2_VL = _text(80, 8192, 29568, 64, 8, None, 152064)
_GEMMA3 = _text(26, 2304, 9216, 8, 4, 256, 262208)

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
}


def _vision(layers: int, width: int, inner: int, image: int, patch: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner}
    return {**sizes, "image_size": image, "patch_size": patch, **more}


VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": _vision(12, 768, 3072, 224, 32),
    "siglip_vision_model": _vision(12, 768, 3072, 224, 16),
    "idefics3_vision": _vision(12, 1152, 3072, 224, 32),
    "smolvlm_vision": _vision(12, 1152, 3072, 224, 32),
    "internvl_vision": _vision(24, 1024, 4096, 448, 14),
    "pixtral": _vision(24, 1024, 4096, 1024, 16),
    # Their sizes are called otherwise; any image size goes.
    "qwen2_vl_vision": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "patch_size": 14},
    "qwen2_5_vl_vision": {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "patch_size": 14},
    "qwen3_vl_vision": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16},
}

_CLIP_L_336 = {"model_type": "clip_vision_model", **_vision(24, 1024, 4096, 336, 14)}
_SO400M = {"model_type": "siglip_vision_model", **_vision(26, 1152, 4304, 384, 14)}


@dataclass(frozen=True)
class FamilyDefaults:
    """What a family's config class takes where a part is left out, and how its images become tokens.

    Attributes:
        text_type: Type of the language model where `text_config` has none.
        text: Its sizes where `text_config` is left out altogether, as far as they differ from the type's.
        vision: The vision tower where `vision_config` is left out altogether.
        top: Further keys of the config with the class's defaults.
        units: How many tokens one unit (image, frame, tile) becomes: its `patches`; the patches `shuffled` together;
            a number `stated` in the config; or it `varies` with the image.
        tiled: An image may become several units.
        projector: The projector's linear maps: `mlp` (two) or `linear` (one).
        tokenwise: The projector maps token by token, so that methods at the projector act on what it takes.
        cls: The vision tower's CLS token is one for the tokens of a unit, so that methods may ask for its attention.
        offers: Further needs of methods the family can meet.
    """

    text_type: str
    vision: dict[str, Any]
    text: dict[str, Any]
    top: dict[str, Any]
    units: Literal["patches", "shuffled", "stated", "varies"]
    tiled: bool = False
    projector: Literal["mlp", "linear"] = "mlp"
    tokenwise: bool = False
    cls: bool = False
    offers: frozenset[str] = frozenset()


_LLAVA_TOP = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}

FAMILIES: dict[str, FamilyDefaults] = {
    "llava": FamilyDefaults(
        "llama", _CLIP_L_336, {}, _LLAVA_TOP, "patches", tokenwise=True, cls=True, offers=frozenset({"pixels"})
    ),
    "vipllava": FamilyDefaults(
        "llama", _CLIP_L_336, {}, {"vision_feature_layer": [-2, -5, -8, -11, 6]}, "patches", tokenwise=True, cls=True
    ),
    "video_llava": FamilyDefaults("llama", _CLIP_L_336 | {"image_size": 224}, {}, _LLAVA_TOP, "patches", tiled=True),
    "llava_next": FamilyDefaults("llama", _CLIP_L_336, {}, _LLAVA_TOP, "varies", tiled=True),
    "llava_onevision": FamilyDefaults(
        "qwen2",
        _SO400M,
        {},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        "varies",
        tiled=True,
    ),
    "internvl": FamilyDefaults(
        "qwen2",
        {"model_type": "internvl_vision"},
        {},
        {"downsample_ratio": 0.5},
        "shuffled",
        tiled=True,
        tokenwise=True,
    ),
    "idefics3": FamilyDefaults(
        "llama",
        {"model_type": "idefics3_vision"},
        {},
        {"scale_factor": 2},
        "shuffled",
        tiled=True,
        tokenwise=True,
        projector="linear",
    ),
    "smolvlm": FamilyDefaults(
        "llama",
        {"model_type": "smolvlm_vision"},
        {},
        {"scale_factor": 2},
        "shuffled",
        tiled=True,
        tokenwise=True,
        projector="linear",
    ),
    "mistral3": FamilyDefaults(
        "mistral",
        {"model_type": "pixtral", **_vision(24, 1024, 4096, 1540, 14)},
        _text(40, 5120, 32768, 32, 8, 128, 131072),
        {},
        "varies",
    ),
    "qwen2_vl": FamilyDefaults("qwen2_vl_text", {"model_type": "qwen2_vl_vision"}, {}, {}, "varies"),
    "qwen2_5_vl": FamilyDefaults("qwen2_5_vl_text", {"model_type": "qwen2_5_vl_vision"}, {}, {}, "varies"),
    "qwen3_vl": FamilyDefaults("qwen3_vl_text", {"model_type": "qwen3_vl_vision"}, {}, {}, "varies"),
    "paligemma": FamilyDefaults(
        "gemma",
        {"model_type": "siglip_vision_model", **_vision(27, 1152, 4096, 224, 14)},
        _text(18, 2048, 16384, 8, 1, 256, 257152),
        {},
        "patches",
        projector="linear",
        tokenwise=True,
    ),
    "gemma3": FamilyDefaults(
        "gemma3_text",
        {"model_type": "siglip_vision_model"},
        {},
        {"mm_tokens_per_image": 256},
        "stated",
        projector="linear",
    ),
}
