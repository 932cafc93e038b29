"""The DeepSpeed configuration of a phase: a preset, a file or a mapping, completed with what the recipe says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.spec.checks.deepspeed import BATCH_KEYS, config_findings
from orchestrator.spec.phase import PhaseSpec
from orchestrator.spec.yaml.file_paths import DEEPSPEED_PRESETS


def deepspeed_config(
    recipe: PhaseSpec, dtype: str, micro_batch_size: int, accumulation_steps: int, world_size: int, on_gpu: bool
) -> dict[str, Any]:
    """Return the complete configuration, in which no `auto` is left.

    The learning rate in it is a placeholder: the training loop sets each group's rate from the step alone.

    Args:
        recipe: The phase; its `deepspeed` is a preset, a path or a mapping.
        dtype: Compute type, `float32`, `bfloat16` or `float16`; master weights and Adam states are float32.
        micro_batch_size: Samples that a worker computes at a time.
        accumulation_steps: Micro-batches of a worker in one optimizer step.
        world_size: Number of workers.
        on_gpu: Communication overlaps with computation only there.

    Raises:
        UsageError: the preset is unknown, the file cannot be read, or a key contradicts the recipe or can
            change what is learned.
    """
    config = _without_auto(_given(recipe.deepspeed, on_gpu))
    for finding in config_findings(config, recipe, dtype, world_size):
        raise UsageError(f"deepspeed: {finding.message}; allowed: {finding.allowed}; {finding.hint}")
    for key in ("optimizer", "scheduler", *BATCH_KEYS):
        config.pop(key, None)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": recipe.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    for key in ("bf16", "fp16"):
        ours[key] = {**config.get(key, {}), **ours[key]}
    config = {**config, **ours}
    # torch's AdamW everywhere: the fused kernels need a compiler on every worker, and it is the reference.
    config["optimizer"] = {
        "type": "AdamW",
        "params": {"lr": 0.0, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True},
    }
    if dtype != "float32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        if zero_stage(config) == 0:
            # Without ZeRO, DeepSpeed accumulates in the compute type, and keeps the float32 weights of float16 where
            # they cannot be read. Stage 1 is the same arithmetic with optimizer states partitioned over ranks.
            config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": 1}
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", 2**31)
    return config


def zero_stage(config: dict[str, Any]) -> int:
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
    """Drop Hugging Face's `auto` values: those keys are filled from the recipe, or keep DeepSpeed's default."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value
