"""Tiny random models of every family, by `model_type`: what the contract kit runs over."""

from __future__ import annotations

from orchestrator.compression.testing.tiny import TinyFamily
from orchestrator.compression.testing.tiny_llava import LLAVA

TINY: dict[str, TinyFamily] = {
    "llava": LLAVA,
}
