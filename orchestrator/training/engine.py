"""A model under training in a DeepSpeed engine, opened for a stage run and kept in memory for the next one."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from orchestrator import registry
from orchestrator.compression import Attachment, attach
from orchestrator.data.train_data import TrainData, build_train_data
from orchestrator.errors import UsageError
from orchestrator.models.build import build_model, compute_dtype, empty_model, filled_parameters
from orchestrator.models.lora import add_lora
from orchestrator.models.parts import LANGUAGE_MODEL, parameter_groups, part_of, set_trainable
from orchestrator.plan.jobs import StageJob
from orchestrator.spec.checks.deepspeed import WITHOUT_ZERO3, zero3_problem
from orchestrator.spec.components import CompressorSpec
from orchestrator.spec.deepspeed import given_config, zero_stage
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.phase import PhaseSpec
from orchestrator.training import distributed
from orchestrator.training.batches import accumulation_steps, even_size
from orchestrator.training.deepspeed_config import deepspeed_config
from orchestrator.training.dropout import Draws, draw_by_sample
from orchestrator.training.learned_compressors import LearnedCompressors


@dataclass
class Session:
    """A model under training.

    Attributes:
        engine: DeepSpeed engine; `engine.module` is the Hugging Face model.
        attachment: Compressor attachment of the model.
        learned: Its learned compressors, which the engine does not know.
        base_rates: Learning rate of each optimizer group before the schedule's factor.
        key: Settings an engine cannot change: a child with other settings needs a new engine (`session_key`).
        config: DeepSpeed configuration.
        micro_batch_size: Micro-batch size the engine was opened with.
        micro_batches: Micro-batch sizes of the current stage run (`MicroBatches`); None before the first.
        compute_dtype: Type the model computes in.
        points: Current points of the attachment; None where they are not known.
        draws: Random source of its dropout.
        phase_start: State the phase started from: it holds the frozen weights unrounded.
    """

    engine: Any
    attachment: Attachment
    learned: LearnedCompressors
    base_rates: list[float]
    key: str
    config: dict[str, Any]
    micro_batch_size: int
    compute_dtype: torch.dtype
    points: tuple[dict[str, Any], ...] | None
    draws: Draws
    micro_batches: Any = None
    phase_start: str | None = None
    _specs: dict[str, list[CompressorSpec]] = field(default_factory=dict)

    def prepare(self, job: StageJob) -> None:
        """Prepare for a stage run: training mode, and the learned compressors of its table active."""
        self.engine.train()  # an evaluation may have used the model since
        self.points = None
        points = (point for action in job.table for point in action.all_points)
        self.attachment = self.learned.enter(self.attachment, points)

    def switch(self, points: tuple[dict[str, Any], ...]) -> None:
        """Switch the compressors to these points, unless they are the current ones; each set is validated once."""
        if points == self.points:
            return
        key = json.dumps(points)
        if key not in self._specs:
            classes = [registry.spec_class(registry.COMPRESSORS, point["kind"]) for point in points]
            self._specs[key] = [cls.model_validate(point) for cls, point in zip(classes, points, strict=True)]
        self.attachment.switch(self._specs[key])
        self.points = points


@dataclass
class TrainingMemory:
    """What a worker keeps between stage runs: the engine of the last one, so that a child need not load, and its data.

    Attributes:
        state: Id of the state the session holds; None while a stage run is running or after it failed.
        session: The model under training; None where nothing is held.
        allowed_bytes: Memory for activations where `per_device_train_batch_size` is `auto`; None asks the machine.
    """

    state: str | None = None
    session: Session | None = None
    allowed_bytes: int | None = None
    _data: dict[str, TrainData] = field(default_factory=dict)

    def holds(self, state: str, key: str) -> bool:
        """Return whether the session holds exactly this state under these settings."""
        return self.session is not None and self.state == state and self.session.key == key

    def data(self, job: StageJob) -> TrainData:
        """Return the data sets of a job, tokenised for its model; those of the last job stay in memory.

        Raises:
            DataError: rows or images cannot be used.
        """
        model, length = ModelSpec.model_validate(job.model), job.recipe["model_max_length"]
        facts = [job.data, model.model_name_or_path, model.revision, length]
        key = json.dumps(facts, sort_keys=True, default=str)
        if key not in self._data:
            self._data = {key: build_train_data(job.data, model, length)}
        return self._data[key]

    def release(self) -> None:
        """Destroy the engine and free its memory."""
        session, self.session, self.state = self.session, None, None
        if session is None:
            return
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        session.attachment.detach()
        session.engine.destroy()
        unset_hf_deepspeed_config()
        del session
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def session_key(job: StageJob) -> str:
    """Return the settings that are not part of a state but fixed in an engine: a child with others cannot reuse it."""
    recipe = PhaseSpec.model_validate(job.recipe)
    model = ModelSpec.model_validate(job.model)
    fixed = {name: getattr(recipe, name) for name in sorted(recipe.not_identity)}
    fixed |= {name: getattr(model, name) for name in sorted(model.not_identity)}
    return json.dumps(fixed, sort_keys=True, default=str)


def open_session(job: StageJob, weights_file: Path, universal: bool = False) -> Session:
    """Return a new engine with the weights of a file; every rank calls it. Learned compressors are inactive.

    Args:
        job: The stage run to train.
        weights_file: Weights of the parent state.
        universal: The engine will load a converted checkpoint (`training/checkpoint.py`).

    Raises:
        UsageError: the model, a part, LoRA's modules or the DeepSpeed configuration do not fit, or the model has
            dropout that cannot be drawn by sample, or several workers under ZeRO-3 would not call its modules alike.
        StorageError: the weights cannot be read.
        StageRunError: the weights are not the model's.
    """
    _prepare(job.deterministic)
    model_spec, recipe = ModelSpec.model_validate(job.model), PhaseSpec.model_validate(job.recipe)
    dtype = compute_dtype(model_spec)
    micro_batch_size, world_size = _micro_batch_size(recipe), distributed.world_size()
    accumulation = accumulation_steps(recipe.global_batch_size, micro_batch_size, world_size)
    on_gpu = distributed.device().type == "cuda"
    config = deepspeed_config(recipe, dtype, micro_batch_size, accumulation, world_size, on_gpu)
    if universal:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    in_parts = zero_stage(config) == 3
    model = empty_model(model_spec) if in_parts else build_model(model_spec, weights_file)
    if recipe.lora is not None:
        add_lora(model, recipe.lora, job.seed)
    draws = Draws()
    draw_by_sample(model, draws)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    attachment = attach(model, [])  # learned compressors come through LearnedCompressors, unknown to the engine
    if in_parts and world_size > 1 and attachment.zero3_refusal:
        problem = zero3_problem(model.config.model_type, attachment.zero3_refusal)
        raise UsageError(f"deepspeed: {problem}; use {WITHOUT_ZERO3}")
    set_trainable(model, recipe.train, lora=recipe.lora is not None)
    groups = parameter_groups(model, recipe.learning_rate, recipe.weight_decay) or [_resting_group(model)]
    base_rates = [parameters["lr"] for parameters in groups]
    model.train()
    if in_parts:
        _read_in_parts(model, weights_file, config, getattr(torch, dtype))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return Session(
        engine=engine,
        attachment=attachment,
        learned=LearnedCompressors(
            engine, recipe, job.seed, getattr(torch, dtype), weights_file, alone=not any(base_rates)
        ),
        base_rates=base_rates,
        key=session_key(job),
        config=config,
        micro_batch_size=micro_batch_size,
        compute_dtype=getattr(torch, dtype),
        points=None,
        draws=draws,
    )


def open_divided(model_spec: ModelSpec, weights_file: Path) -> Any:
    """Return an engine for evaluations whose ranks hold a share of the weights each (ZeRO-3); every rank calls it.

    Its `module` is the model, which all ranks must run on the same batches at the same time.

    Raises:
        StorageError: the weights cannot be read.
        StageRunError: they are not the model's.
    """
    _prepare(deterministic=False)
    dtype = compute_dtype(model_spec)
    config = {
        **given_config("zero3", distributed.device().type == "cuda"),
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 2**31,
    }
    model = empty_model(model_spec)
    _read_in_parts(model, weights_file, config, getattr(torch, dtype))
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def _prepare(deterministic: bool) -> None:
    """Set what DeepSpeed and torch read from the process when an engine is opened."""
    _set_determinism(deterministic)
    if distributed.device().type != "cuda":
        # A C++ op that sums over the ranks of one machine: compiling it takes a minute on the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    # It prints the memory at each step of its initialisation, whatever the configuration, and collects garbage there.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None


def _read_in_parts(model: nn.Module, weights_file: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Read an empty model's weights and divide them over the ranks, one parameter after the other (ZeRO-3).

    A rank so never holds more than its share and one parameter. Each is cast and divided as `deepspeed.initialize`
    would do it, in the same order.

    Raises:
        StorageError: the weights cannot be read.
        StageRunError: they are not the model's.
    """
    divided: Any = None
    # DeepSpeed gives what rank 0 read to the others.
    for parameter in filled_parameters(model, weights_file, dtype, read=distributed.rank() == 0):
        if divided is None:
            holder, divided = nn.Module(), parameter
            holder.register_parameter("first", parameter)
            deepspeed.zero.Init(module=holder, dtype=dtype, config_dict_or_path=config)
        else:
            divided.convert_to_zero_parameters(param_list=[parameter])
    for module in model.modules():  # of a model that is divided already, DeepSpeed moves none
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(distributed.device()))


def _resting_group(model: Any) -> dict[str, Any]:
    """Return the optimizer group where only learned compressors train: an engine needs a parameter, so it gets the last
    norm's at rate 0.
    """
    of_decoder = [(name, p) for name, p in model.named_parameters() if part_of(name) == LANGUAGE_MODEL and p.ndim == 1]
    parameter = of_decoder[-1][1].requires_grad_(True)
    return {"params": [parameter], "lr": 0.0, "weight_decay": 0.0, "name": "rest"}


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without compiling it.

    DeepSpeed 0.19.8 imports it to check the type of any optimizer, and compiling its functions loads torch's compiler,
    which takes seconds in every worker; nothing here uses it.
    """
    compiler = torch.compile
    torch.compile = lambda function, *_, **__: function  # type: ignore[assignment]
    try:
        with contextlib.suppress(ImportError):  # another version of DeepSpeed
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compiler


def _set_determinism(wanted: bool) -> None:
    """Use kernels that give the same bits every time, at the price of speed; on CPU they are used anyway."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def _micro_batch_size(recipe: PhaseSpec) -> int:
    if recipe.per_device_train_batch_size == "auto":
        return even_size(recipe.global_batch_size, distributed.world_size(), most=1)  # until the stage run chooses
    return min(int(recipe.per_device_train_batch_size), recipe.global_batch_size)


def checkpoint_activations(model: Any) -> None:
    """Compute a model's activations again in the backward pass."""
    # Renamed in transformers 5.23; the old name still works before.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
