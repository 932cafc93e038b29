"""The DeepSpeed configuration of a phase: a preset, a file or a mapping, completed with what the recipe says."""

from __future__ import annotations

from typing import Any

from orchestrator.errors import UsageError
from orchestrator.spec.checks.deepspeed import BATCH_KEYS, config_findings
from orchestrator.spec.deepspeed import given_config, zero_stage
from orchestrator.spec.phase import PhaseSpec


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
    config = given_config(recipe.deepspeed, on_gpu)
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
