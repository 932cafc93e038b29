"""The DeepSpeed configuration of a phase: a preset, a file or a mapping, completed with what the recipe says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.spec.phase import PhaseSpec

PRESETS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def deepspeed_config(
    recipe: PhaseSpec, dtype: str, micro_batch_size: int, accumulation_steps: int, world_size: int, on_gpu: bool
) -> dict[str, Any]:
    """The whole configuration, without a single `auto` left.

    The learning rate in it is a placeholder: the loop sets each group's rate from the step alone.

    Args:
        recipe: The phase; its `deepspeed` is a preset, a path or a mapping.
        dtype: Compute type, `float32`, `bfloat16` or `float16`; master weights and Adam states are float32.
        micro_batch_size: Samples of one worker in one forward.
        accumulation_steps: Micro-batches of one worker in one optimizer step.
        world_size: Number of workers.
        on_gpu: Communication overlaps with computation only there.

    Raises:
        UsageError: the preset is unknown, the file cannot be read, or a key contradicts the recipe.
    """
    config = _without_auto(_given(recipe.deepspeed, on_gpu))
    if recipe.per_device_train_batch_size == "auto" and (given := [key for key in _BATCH_KEYS if key in config]):
        raise UsageError(
            f"deepspeed: {given[0]}: {config[given[0]]} contradicts per_device_train_batch_size: auto, which finds it; "
            'leave the key out or write "auto"'
        )
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": recipe.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    _refuse_contradictions(config, ours, micro_batch_size * accumulation_steps * world_size)
    for key in ("bf16", "fp16"):
        ours[key] = {**config.get(key, {}), **ours[key]}
    config = {**config, **ours}
    config.pop("train_batch_size", None)
    # torch's AdamW everywhere: the fused kernels need a compiler on every worker, and it is the reference.
    config["optimizer"] = {
        "type": "AdamW",
        "params": {"lr": 0.0, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True},
    }
    if dtype == "bfloat16":
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", 2**31)
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a configuration, 0 where it names none."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _given(deepspeed: str | dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    if isinstance(deepspeed, dict):
        return copy.deepcopy(deepspeed)
    if deepspeed in PRESETS:
        return _preset(deepspeed, on_gpu)
    path = Path(deepspeed)
    if path.suffix != ".json" and not path.exists():
        raise UsageError(f"deepspeed: {deepspeed!r} is neither a file nor one of {', '.join(PRESETS)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"deepspeed: {path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"deepspeed: {path} holds no mapping")
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
    """Drops Hugging Face's `auto`: we fill those keys, or DeepSpeed's default holds."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _refuse_contradictions(config: dict[str, Any], ours: dict[str, Any], global_batch_size: int) -> None:
    expected = {**ours, "train_batch_size": global_batch_size}
    for key in (*_BATCH_KEYS, "gradient_clipping"):
        if key in config and config[key] != expected[key]:
            raise UsageError(
                f"deepspeed: {key}: {config[key]} contradicts the recipe, which gives {expected[key]}; "
                'leave the key out or write "auto"'
            )
    for key in ("bf16", "fp16"):
        given = config.get(key, {}).get("enabled")
        if given is not None and given != ours[key]["enabled"]:
            raise UsageError(f"deepspeed: {key}.enabled: {given} contradicts model.dtype; leave it out")
    optimizer = config.pop("optimizer", {})
    if optimizer.get("type", "AdamW") not in ("AdamW", "Adam") or optimizer.get("params"):
        raise UsageError("deepspeed: optimizer: the recipe sets AdamW (learning_rate, weight_decay); leave it out")
    scheduler = config.pop("scheduler", {})
    if scheduler.get("params"):
        raise UsageError("deepspeed: scheduler: lr_scheduler_type and warmup_ratio of the phase say it; leave it out")
