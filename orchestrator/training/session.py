"""Opens a model for training: weights, LoRA, compressor, what trains, then DeepSpeed around it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch

from orchestrator.compression import attach
from orchestrator.models.build import build_model, compute_dtype
from orchestrator.models.lora import add_lora
from orchestrator.models.parts import LANGUAGE_MODEL, parameter_groups, part_of, set_trainable
from orchestrator.plan.jobs import StageJob
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.phase import PhaseSpec
from orchestrator.training import group
from orchestrator.training.batches import accumulation_steps
from orchestrator.training.deepspeed_config import deepspeed_config
from orchestrator.training.dropout import Draws, draw_by_sample
from orchestrator.training.learned import LearnedPart
from orchestrator.training.memory import Session
from orchestrator.training.micro_batch import even_size


def session_key(job: StageJob) -> str:
    """Return settings that are not part of a state but fixed in an engine: a child with others cannot take it over."""
    recipe = PhaseSpec.model_validate(job.recipe)
    model = ModelSpec.model_validate(job.model)
    fixed = {name: getattr(recipe, name) for name in sorted(recipe.not_identity)}
    fixed |= {name: getattr(model, name) for name in sorted(model.not_identity)}
    return json.dumps(fixed, sort_keys=True, default=str)


def open_session(job: StageJob, weights_file: Path, universal: bool = False) -> Session:
    """Return a fresh engine with the weights of a file, on every rank alike; learned compressors are at rest.

    Args:
        job: What it is to train.
        weights_file: Weights of the parent state.
        universal: The engine is to load a converted checkpoint (`training/checkpoint.py`).

    Raises:
        UsageError: the model, a part, LoRA's modules or the DeepSpeed configuration do not fit, or the model has
            dropout that cannot be drawn by sample.
        StorageError: the weights cannot be read.
        StageRunError: the weights are not the model's.
    """
    _set_determinism(job.deterministic)
    model_spec, recipe = ModelSpec.model_validate(job.model), PhaseSpec.model_validate(job.recipe)
    dtype = compute_dtype(model_spec)
    micro_batch_size = _micro_batch_size(recipe)
    config = _config(recipe, dtype, micro_batch_size, universal)
    model = build_model(model_spec, weights_file)
    if recipe.lora is not None:
        add_lora(model, recipe.lora, job.seed)
    draws = Draws()
    draw_by_sample(model, draws)
    if recipe.gradient_checkpointing:
        _checkpoint_activations(model)
    attachment = attach(model, [])  # what learns is brought in by LearnedPart, behind the engine's back
    set_trainable(model, recipe.train, lora=recipe.lora is not None)
    groups = parameter_groups(model, recipe.learning_rate, recipe.weight_decay) or [_resting_group(model)]
    base_rates = [parameters["lr"] for parameters in groups]
    model.train()
    if group.device().type == "cpu":
        # A C++ op that sums over the ranks of one machine: it would be compiled for a minute on the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It prints the memory at each step of its opening, whatever is asked for, and collects garbage each time.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return Session(
        engine=engine,
        attachment=attachment,
        learned=LearnedPart(engine, recipe, job.seed, getattr(torch, dtype), weights_file, alone=not any(base_rates)),
        base_rates=base_rates,
        key=session_key(job),
        config=config,
        micro_batch_size=micro_batch_size,
        compute_dtype=getattr(torch, dtype),
        points=None,
        draws=draws,
    )


def _config(recipe: PhaseSpec, dtype: str, micro_batch_size: int, universal: bool) -> dict[str, Any]:
    config = deepspeed_config(
        recipe,
        dtype,
        micro_batch_size,
        accumulation_steps(recipe.global_batch_size, micro_batch_size, group.world_size()),
        group.world_size(),
        on_gpu=group.device().type == "cuda",
    )
    if universal:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    return config


def _resting_group(model: Any) -> dict[str, Any]:
    """Return where learned compressors alone train: an engine wants a parameter, so it gets the last norm's at rate
    0.
    """
    of_decoder = [(name, p) for name, p in model.named_parameters() if part_of(name) == LANGUAGE_MODEL and p.ndim == 1]
    parameter = of_decoder[-1][1].requires_grad_(True)
    return {"params": [parameter], "lr": 0.0, "weight_decay": 0.0, "name": "rest"}


def _set_determinism(wanted: bool) -> None:
    """Return the kernels that give the same bits every time, at the price of speed; on CPU they are used anyway."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def _micro_batch_size(recipe: PhaseSpec) -> int:
    if recipe.per_device_train_batch_size == "auto":
        return even_size(recipe.global_batch_size, group.world_size(), most=1)  # until the stage run chooses
    return min(int(recipe.per_device_train_batch_size), recipe.global_batch_size)


def _checkpoint_activations(model: Any) -> None:
    # Renamed in transformers 5.23; the old name still works before.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
