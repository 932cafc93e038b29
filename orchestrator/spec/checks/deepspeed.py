"""Keys a DeepSpeed configuration may hold: those that change how a phase is computed, and none that change what; and
what a type of model cannot do under one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from orchestrator import registry
from orchestrator.errors import UsageError
from orchestrator.spec.deepspeed import given_config
from orchestrator.spec.model_facts import zero3_refusal
from orchestrator.spec.phase import PhaseSpec
from orchestrator.spec.yaml.file_paths import DEEPSPEED_PRESETS
from orchestrator.spec.yaml.node import Path, dotted
from orchestrator.spec.yaml.validation_errors import Finding

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
AUTO = "auto"  # Hugging Face's: we fill the key, or DeepSpeed's default holds

_FLAG, _COUNT, _NUMBER, _ANY = "true or false", "a whole number from 0 on", "a number from 0 on", "anything"
# A value is allowed where it is of a kind above or one of a tuple; a mapping is looked into.
_OFFLOAD = {"device": ("none", "cpu"), "pin_memory": _FLAG, "buffer_count": _COUNT, "fast_init": _FLAG}
_ALLOWED: dict[str, Any] = {
    "zero_optimization": {
        "stage": (0, 1, 2, 3),
        "contiguous_gradients": _FLAG,
        "reduce_scatter": _FLAG,
        "reduce_bucket_size": _NUMBER,
        "allgather_partitions": _FLAG,
        "allgather_bucket_size": _NUMBER,
        "overlap_comm": _FLAG,
        "round_robin_gradients": _FLAG,
        "sub_group_size": _NUMBER,
        "offload_optimizer": _OFFLOAD,
        "offload_param": {**_OFFLOAD, "buffer_size": _NUMBER, "max_in_cpu": _NUMBER},
        "stage3_prefetch_bucket_size": _NUMBER,
        "stage3_param_persistence_threshold": _NUMBER,
        "stage3_model_persistence_threshold": _NUMBER,
        "stage3_max_live_parameters": _NUMBER,
        "stage3_max_reuse_distance": _NUMBER,
        "stage3_gather_16bit_weights_on_model_save": _FLAG,
        "stage3_gather_fp16_weights_on_model_save": _FLAG,
    },
    # A scale is a power of two that is divided out again; steps that overflow under it are skipped and reported.
    "fp16": {
        "enabled": _FLAG,
        "auto_cast": (False,),
        "loss_scale": _NUMBER,
        "initial_scale_power": _COUNT,
        "loss_scale_window": _COUNT,
        "hysteresis": _COUNT,
        "consecutive_hysteresis": _FLAG,
        "min_loss_scale": _NUMBER,
    },
    "bf16": {"enabled": _FLAG},
    "data_types": {"grad_accum_dtype": ("fp32", None)},
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "gradient_clipping": _NUMBER,
    "optimizer": {"type": ("AdamW", "Adam"), "params": {}},
    "scheduler": {"type": _ANY, "params": {}},
    "zero_allow_untested_optimizer": _FLAG,
    "zero_force_ds_cpu_optimizer": (False,),
    "steps_per_print": _NUMBER,
    "wall_clock_breakdown": _FLAG,
    "memory_breakdown": _FLAG,
    "dump_state": (False,),
}
_ELSEWHERE = {
    "optimizer": "the recipe sets AdamW (learning_rate, weight_decay); leave it out",
    "scheduler": "lr_scheduler_type and warmup_ratio of the phase say it; leave it out",
    "activation_checkpointing": "write gradient_checkpointing: true in the phase",
    "gradient_clipping": "write max_grad_norm in the phase",
    "amp": "model.dtype says it",
    "torch_autocast": "model.dtype says it",
}


def config_findings(config: Any, phase: PhaseSpec, dtype: str, num_workers: int | None) -> Iterator[Finding]:
    """Return what a DeepSpeed configuration may not hold, or what in it contradicts the recipe; paths are inside it.

    `deepspeed` is no part of a cell's identity: a key that can change what is learned would give two experiments one
    name.

    Args:
        config: The mapping; `auto` stands for a key left out.
        phase: The recipe.
        dtype: `model.dtype`; `auto` contradicts nothing.
        num_workers: None where it is not known yet.
    """
    if not isinstance(config, Mapping):
        yield Finding((), "a DeepSpeed configuration is a mapping", "a mapping of keys")
        return
    yield from _unknown(config, _ALLOWED, ())
    micro = phase.per_device_train_batch_size
    expected: dict[str, Any] = {"train_batch_size": phase.global_batch_size, "gradient_clipping": phase.max_grad_norm}
    if isinstance(micro, int):
        size = min(micro, phase.global_batch_size)
        expected["train_micro_batch_size_per_gpu"] = size
        if num_workers is not None:
            expected["gradient_accumulation_steps"] = -(-phase.global_batch_size // (size * num_workers))
    for key in (*BATCH_KEYS, "gradient_clipping"):
        given = config.get(key, AUTO)
        if given == AUTO:
            continue
        hint = 'leave the key out or write "auto"'
        if micro == "auto" and key in BATCH_KEYS:
            yield Finding(
                (key,), f"{key}: {given} contradicts per_device_train_batch_size: auto, which finds it", AUTO, hint
            )
        elif key in expected and given != expected[key]:
            yield Finding((key,), f"{key}: {given} contradicts the recipe, which gives {expected[key]}", AUTO, hint)
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        part = config.get(key)
        enabled = part.get("enabled", AUTO) if isinstance(part, Mapping) else AUTO
        if dtype != "auto" and enabled != AUTO and enabled != (dtype == name):
            message = f"{key}.enabled: {enabled} contradicts model.dtype: {dtype}"
            yield Finding((key, "enabled"), message, AUTO, "leave it out; model.dtype says it")


WITHOUT_ZERO3 = "zero2 (or zero2_offload), or one worker"


def zero3_problem(model_type: str, reason: str) -> str:
    """Return why several workers cannot train a type of model under ZeRO-3, of the reason its family states."""
    return (
        "under ZeRO-3 all workers call the same modules, or wait for one another for ever, and a batch of "
        f"{model_type} may decide which: {reason}"
    )


def zero3_findings(phase: PhaseSpec, model_type: str | None, num_workers: int | None) -> Iterator[Finding]:
    """Return why ZeRO-3 may not spread a type of model over several workers.

    Args:
        phase: The recipe.
        model_type: The model's; None where its config is not at hand.
        num_workers: None where it is not known yet.
    """
    reason = zero3_refusal(model_type) if model_type else ""
    if not model_type or not reason or (num_workers or 1) < 2:
        return
    try:
        zero = given_config(phase.deepspeed, on_gpu=False).get("zero_optimization")
    except UsageError:
        return  # reported where its keys are checked
    if isinstance(zero, Mapping) and zero.get("stage") == 3:
        message = zero3_problem(model_type, reason)
        yield Finding(("deepspeed",), message, "zero0, zero1, zero2, zero2_offload", f"use {WITHOUT_ZERO3}")


def _unknown(config: Mapping[str, Any], allowed: Mapping[str, Any], path: Path) -> Iterator[Finding]:
    for key, value in config.items():
        here = (*path, key)
        if value == AUTO and (key in allowed or path[-1:] == ("params",)):
            continue
        if key not in allowed:
            yield _refused(here, allowed)
        elif isinstance(allowed[key], Mapping):
            if isinstance(value, Mapping):
                yield from _unknown(value, allowed[key], here)
            elif value is not None:
                yield Finding(here, f"{dotted(here)} is a mapping, not {value!r}", "a mapping of keys", None)
        elif not _fits(value, allowed[key]):
            kinds = allowed[key] if isinstance(allowed[key], str) else ", ".join(map(_written, allowed[key]))
            yield Finding(
                here, f"{dotted(here)}: {_written(value)} is not allowed", kinds, _ELSEWHERE.get(str(here[0]))
            )


def _refused(path: Path, allowed: Mapping[str, Any]) -> Finding:
    message = f"{dotted(path)} can change what is learned, or is not known"
    hint = _ELSEWHERE.get(str(path[0])) or registry.did_you_mean(str(path[-1]), list(allowed)) or "leave it out"
    return Finding(path, f"{message}: no DeepSpeed setting of ours", ", ".join(allowed) or "nothing", hint)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return any(value is one or (type(value) is type(one) and value == one) for one in kind)
    if kind == _FLAG:
        return isinstance(value, bool)
    if kind == _ANY:
        return True
    number = isinstance(value, int) if kind == _COUNT else isinstance(value, int | float)
    return number and not isinstance(value, bool) and value >= 0


def _written(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def file_findings(phase: PhaseSpec, dtype: str, num_workers: int | None) -> Iterator[Finding]:
    """Return `config_findings` of a phase's `deepspeed`, inline or in a file; paths are relative to the phase.

    In a file, the message names its line.
    """
    given = phase.deepspeed
    if isinstance(given, Mapping):
        for finding in config_findings(given, phase, dtype, num_workers):
            yield finding.inside(("deepspeed",))
        return
    file = FilePath(given)
    if given in DEEPSPEED_PRESETS or not file.is_file():
        return  # a missing file is reported where paths are
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError) as error:
        yield Finding(
            ("deepspeed",), f"{file} cannot be read as JSON: {error}", "a DeepSpeed configuration in JSON", None
        )
        return
    for finding in config_findings(config, phase, dtype, num_workers):
        line = _line(text, finding.path)
        yield replace(finding, path=("deepspeed",), message=f"{file}{f':{line}' if line else ''}: {finding.message}")


def _line(text: str, path: Path) -> int | None:
    """Return the line of the key at `path`: each name is looked for behind the one before it."""
    at = 0
    for key in path:
        at = text.find(json.dumps(key), at)
        if at < 0:
            return None
    return text.count("\n", 0, at) + 1 if path else None
