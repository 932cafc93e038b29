"""A state's weights file: what an engine trained, gathered, unrounded, as a plain model's."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from torch import nn

from orchestrator.errors import StageRunError
from orchestrator.models.build import save_weights, weight_tensors
from orchestrator.models.compressor_weights import named_in_file
from orchestrator.models.lora import has_lora, merged_weights
from orchestrator.models.parts import plain_name
from orchestrator.spec.deepspeed import zero_stage
from orchestrator.training import distributed
from orchestrator.training.engine import Session


def whole_weights(session: Session) -> dict[str, torch.Tensor]:
    """Return all parameters (float32) and persistent buffers by name, on the CPU; empty on ranks other than 0.

    Every rank calls it: parameters are gathered one at a time, so that a worker never holds more than one in full.

    Raises:
        StageRunError: the engine does not hold the float32 value of a parameter that trains.
    """
    model = session.engine.module
    partitioned = zero_stage(session.config) == 3
    separate_master = partitioned or session.compute_dtype != torch.float32
    found: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    for name, tensor in weight_tensors(model).items():
        parameter = parameters.get(name)
        if parameter is None:
            _keep(found, name, tensor, tensor.dtype)  # an engine rounds no buffer
        elif parameter.requires_grad and separate_master:
            _keep(found, name, _master(name, parameter, partitioned))
        elif partitioned:
            with GatheredParameters([parameter]):
                _keep(found, name, parameter)
        else:
            _keep(found, name, tensor)
    return found


def _master(name: str, parameter: nn.Parameter, partitioned: bool) -> torch.Tensor:
    """Return the float32 master weights of which the parameter is the rounded copy; every rank calls it.

    Raises:
        StageRunError: the engine has none, or others; the rounded copy never stands in for them.
    """
    whole: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    if whole is None or whole.dtype != torch.float32 or whole.numel() == 0 < parameter.numel():
        raise StageRunError(f"no float32 weights of {name}, which trains, are in the engine; nothing was stored")
    # Under ZeRO-3 the rounded copy is partitioned as the float32 weights are.
    if not partitioned and not torch.equal(_without_nan(whole.to(parameter)), _without_nan(parameter.detach())):
        raise StageRunError(
            f"the engine's float32 weights of {name} are not those it computed with; nothing was stored"
        )
    return whole


def _without_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.nan_to_num(nan=0.0)  # a diverged run is reported as such elsewhere


def _restore_frozen(model: nn.Module, tensors: dict[str, torch.Tensor], exact_file: Path | None, rests: bool) -> None:
    """Take frozen weights from the file the engine was opened with: the engine holds only their rounded values.

    Where nothing in the engine trains (`rests`), all weights are frozen.

    Raises:
        StageRunError: there is no such file, or it lacks a weight.
    """
    frozen = [name for name, parameter in model.named_parameters() if rests or not parameter.requires_grad]
    if not frozen:
        return
    if exact_file is None:
        raise StageRunError(
            f"{frozen[0]} and {len(frozen) - 1} other weights do not train, and the state the phase started from, "
            "which holds them unrounded, is no longer in the ledger; nothing was stored; train that state again"
        )
    with safe_open(exact_file, framework="pt") as file:
        known = set(file.keys())
        for name in frozen:
            plain = plain_name(name)
            if plain not in known:
                raise StageRunError(f"{exact_file} lacks {plain}, which does not train; nothing was stored")
            tensors[name] = file.get_tensor(plain)


def _keep(found: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    if distributed.rank() == 0:
        # A copy: a gathered parameter is freed again, and the others will be trained further.
        found[name] = tensor.detach().to("cpu", dtype, copy=True)


def write_weights(session: Session, path: Path, exact_file: Path | None) -> None:
    """Write the model's weights on rank 0 as a plain model's, adapters merged, and the learned compressors' with them.

    Args:
        session: The model under training.
        path: File to write.
        exact_file: Weights the phase started from: frozen ones are taken from it where the engine rounded them. Not
            read in float32; None if it is gone.

    Raises:
        StageRunError: a weight is not finite, or the engine does not hold what was trained.
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
        if session.compute_dtype != torch.float32:
            _restore_frozen(model, tensors, exact_file, rests=not any(session.base_rates))
        plain = merged_weights(model, tensors) if has_lora(model) else tensors
        save_weights(plain | learned, path)

    distributed.decide(write)
