"""Whole float32 weights of a model under any ZeRO stage, gathered on rank 0."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from torch import nn

from orchestrator.errors import StageRunError
from orchestrator.models.build import save_weights, weight_tensors
from orchestrator.models.learned import named_in_file
from orchestrator.models.lora import has_lora, merged_weights
from orchestrator.training import group
from orchestrator.training.deepspeed_config import zero_stage
from orchestrator.training.memory import Session


def whole_weights(session: Session) -> dict[str, torch.Tensor]:
    """All parameters and persistent buffers by name, float32 on the CPU; empty on ranks other than 0.

    Every rank calls it: parameters are gathered one by one, so that no more than one is whole on a worker.
    """
    model = session.engine.module
    partitioned = zero_stage(session.config) == 3
    separate_master = partitioned or session.compute_dtype != torch.float32
    found: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    for name, tensor in weight_tensors(model).items():
        parameter = parameters.get(name)
        if parameter is not None and parameter.requires_grad and separate_master:
            whole = safe_get_full_fp32_param(parameter)
            _keep(found, name, tensor if whole is None else whole)
        elif parameter is not None and partitioned:
            with GatheredParameters([parameter]):
                _keep(found, name, parameter)
        else:
            _keep(found, name, tensor)
    return found


def _restore_frozen(model: nn.Module, tensors: dict[str, torch.Tensor], parent_file: Path, rests: bool) -> None:
    """Frozen weights have no master in the engine, only their rounded values: the parent's are the exact ones.

    Where nothing in the engine trains (`rests`), all are.
    """
    with safe_open(parent_file, framework="pt") as file:
        known = set(file.keys())
        for name, parameter in model.named_parameters():
            if name in known and (rests or not parameter.requires_grad):
                tensors[name] = file.get_tensor(name)


def _keep(found: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    if group.rank() == 0:
        # A copy: a gathered parameter's memory is given back, and training goes on in the others.
        found[name] = tensor.detach().to("cpu", torch.float32, copy=True)


def write_weights(session: Session, path: Path, parent_file: Path | None) -> None:
    """Rank 0 writes the model's weights as a plain model's, adapters merged, and beside them what compressors learned.

    Args:
        session: The model under training.
        path: File to write.
        parent_file: Weights of the parent state; frozen ones are taken from it where the engine rounded them; None
            where it did not, or where they are gone.

    Raises:
        StageRunError: a weight is not finite.
        StorageError: the file cannot be written.
    """
    tensors = whole_weights(session)
    learned = named_in_file(session.learned.weights())

    def write() -> None:
        broken = [name for name, tensor in (tensors | learned).items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise StageRunError(
                f"diverged: {broken[0]} and {len(broken) - 1} other weights are not finite; nothing was stored; "
                "lower learning_rate, or set max_grad_norm"
            )
        model = session.engine.module
        if parent_file is not None:
            _restore_frozen(model, tensors, parent_file, rests=not any(session.base_rates))
        plain = merged_weights(model, tensors) if has_lora(model) else tensors
        save_weights(plain | learned, path)

    group.decide(write)
