"""What a phase's `deepspeed` says: a preset, a file or a mapping, as one configuration."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.spec.yaml.file_paths import DEEPSPEED_PRESETS


def given_config(deepspeed: str | dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    """Return the configuration that a phase gives, without Hugging Face's `auto` values: those keys are filled from the
    recipe, or keep DeepSpeed's default.

    Raises:
        UsageError: the preset is unknown, or the file cannot be read.
    """
    given: dict[str, Any] = _without_auto(_given(deepspeed, on_gpu))
    return given


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration, 0 where it names none."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _given(deepspeed: str | dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    if isinstance(deepspeed, dict):
        return copy.deepcopy(deepspeed)
    if deepspeed in DEEPSPEED_PRESETS:
        return _preset(deepspeed, on_gpu)
    path = Path(deepspeed)
    if path.suffix != ".json" and not path.exists():
        raise UsageError(f"deepspeed: {deepspeed!r} is neither a file nor one of {', '.join(DEEPSPEED_PRESETS)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"deepspeed: {path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"deepspeed: {path} does not hold a mapping")
    return config


def _preset(name: str, on_gpu: bool) -> dict[str, Any]:
    stage = int(name[4])
    zero: dict[str, Any] = {"stage": stage}
    if stage >= 2:
        zero |= {"overlap_comm": on_gpu, "contiguous_gradients": True}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    if name.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return {"zero_optimization": zero}


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value
