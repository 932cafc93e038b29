"""Tiny random models of every family, by `model_type`: what the contract kit runs over."""

from __future__ import annotations

from orchestrator.compression.testing.tiny import TinyFamily
from orchestrator.compression.testing.tiny_gemma import GEMMA_3, PALIGEMMA
from orchestrator.compression.testing.tiny_llava import LLAVA
from orchestrator.compression.testing.tiny_llava_like import LLAVA_NEXT, LLAVA_ONEVISION, VIDEO_LLAVA, VIPLLAVA
from orchestrator.compression.testing.tiny_mistral3 import MISTRAL3
from orchestrator.compression.testing.tiny_qwen import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE
from orchestrator.compression.testing.tiny_tiled import IDEFICS3, INTERNVL, SMOLVLM

TINY: dict[str, TinyFamily] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "video_llava": VIDEO_LLAVA,
    "vipllava": VIPLLAVA,
    "internvl": INTERNVL,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "mistral3": MISTRAL3,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "paligemma": PALIGEMMA,
    "gemma3": GEMMA_3,
}
