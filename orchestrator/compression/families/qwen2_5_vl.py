"""Qwen2.5-VL (`Qwen2_5_VLForConditionalGeneration`): as Qwen2-VL; a video's time axis counts in seconds."""

from __future__ import annotations

from orchestrator.compression.families.qwen2_vl import Qwen2VLFamily


class Qwen25VLFamily(Qwen2VLFamily):
    """Its tower and the spacing of temporal position ids differ, what the mechanism sees does not."""
