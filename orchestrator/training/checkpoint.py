"""DeepSpeed checkpoints with a cursor beside them that says, in plain JSON, what they are."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from torch import nn

from orchestrator.errors import StageRunError, StorageError
from orchestrator.models.build import save_weights, weight_tensors
from orchestrator.models.compressor_weights import named_in_file
from orchestrator.models.lora import has_lora, merged_weights, plain_name
from orchestrator.models.weight_files import refusal
from orchestrator.plan.jobs import Action, StageJob
from orchestrator.plan.ledger.files import storage_error, storage_errors
from orchestrator.training import distributed
from orchestrator.training.deepspeed_config import zero_stage
from orchestrator.training.engine import Session


def convert(folder: Path, tag: str, target: Path) -> None:
    """Write a ZeRO checkpoint as a universal one, which an engine opened with `load_universal` takes at any size.

    Args:
        folder: The checkpoint; what it asks to unpickle was looked at before.
        tag: Its one tag.
        target: Folder to write; an older one is removed.

    Raises:
        StorageError: a file is missing or torn, or the disk is full.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    arguments = Namespace(
        input_folder=str(folder / tag), output_folder=str(target / tag), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    said = io.StringIO()
    try:
        target.mkdir(parents=True)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(arguments)
    except Exception as error:  # DeepSpeed asserts, torch and the file system raise their own kinds
        shutil.rmtree(target, ignore_errors=True)
        raise StorageError(f"the checkpoint {folder} cannot be opened by another number of workers: {error}") from error


@contextlib.contextmanager
def mended_load(engine: Any) -> Iterator[None]:
    """Around an engine's load of a universal checkpoint: puts right what DeepSpeed 0.19.8 gets wrong under ZeRO-3.

    It gives all groups the first group's settings (weight decay among them), and one step count, a tensor that each
    group's step then raises anew, so that Adam's bias correction runs ahead.
    """
    optimizer = engine.optimizer.optimizer
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    yield
    for of_group, own in zip(optimizer.param_groups, settings, strict=True):
        of_group.update(own)
    for state in optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()


def whole_weights(session: Session) -> dict[str, torch.Tensor]:
    """Return all parameters (float32) and persistent buffers by name, on the CPU; empty on ranks other than 0.

    Every rank calls it: parameters are gathered one by one, so that no more than one is whole on a worker.

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
            _keep(found, name, tensor, tensor.dtype)  # no engine rounds a buffer
        elif parameter.requires_grad and separate_master:
            _keep(found, name, _master(name, parameter, partitioned))
        elif partitioned:
            with GatheredParameters([parameter]):
                _keep(found, name, parameter)
        else:
            _keep(found, name, tensor)
    return found


def _master(name: str, parameter: nn.Parameter, partitioned: bool) -> torch.Tensor:
    """Return the float32 value that trains, of which the parameter is the rounded copy; every rank calls it.

    Raises:
        StageRunError: the engine has none, or another one; the rounded copy is never taken for it.
    """
    whole: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    if whole is None or whole.dtype != torch.float32 or whole.numel() == 0 < parameter.numel():
        raise StageRunError(f"no float32 weights of {name}, which trains, are in the engine; nothing was stored")
    # Under ZeRO-3 the rounded copy lies in pieces, cut from the pieces of the float32 weights.
    if not partitioned and not torch.equal(_without_nan(whole.to(parameter)), _without_nan(parameter.detach())):
        raise StageRunError(
            f"the engine's float32 weights of {name} are not those it computed with; nothing was stored"
        )
    return whole


def _without_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.nan_to_num(nan=0.0)  # a diverged run is told as one


def _restore_frozen(model: nn.Module, tensors: dict[str, torch.Tensor], exact_file: Path | None, rests: bool) -> None:
    """Frozen weights have no master in the engine, only their rounded values: those it was opened with are exact.

    Where nothing in the engine trains (`rests`), all are.

    Raises:
        StageRunError: there is no such file, or it lacks one.
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
        # A copy: a gathered parameter's memory is given back, and training goes on in the others.
        found[name] = tensor.detach().to("cpu", dtype, copy=True)


def write_weights(session: Session, path: Path, exact_file: Path | None) -> None:
    """Rank 0 writes the model's weights as a plain model's, adapters merged, and beside them what compressors learned.

    Args:
        session: The model under training.
        path: File to write.
        exact_file: Weights the phase started from: frozen ones are taken from it where the engine rounded them. Not
            read in float32; None where they are gone.

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


CURSOR_FILE = "cursor.json"
_TAG = "state"
# DeepSpeed loads with weights_only=False, which runs what a file asks for: nothing but these may be asked for.
_KNOWN_CLASSES = {
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def save_checkpoint(session: Session, folder: Path, job: StageJob, step: int) -> None:
    """Write the state after `step` optimizer steps of the phase; every rank calls it. No manifest is written.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    distributed.decide(lambda: _empty(folder))
    distributed.on_each_node(lambda: _make(folder))
    # The key DeepSpeed's universal format looks for, so that another world size can open this checkpoint.
    setattr(session.engine.module, UNIVERSAL_CHECKPOINT_INFO, {"universal_checkpoint_version": 0.2})
    try:
        session.engine.save_checkpoint(str(folder), tag=_TAG, client_state={}, save_latest=False)
    except (OSError, RuntimeError) as error:
        raise storage_error(folder, error) from error

    def finish() -> None:
        # A script DeepSpeed copies into each checkpoint; nobody should run code out of one.
        (folder / "zero_to_fp32.py").unlink(missing_ok=True)
        session.learned.save(folder)
        facts = {
            "world_size": distributed.world_size(),
            "learned": session.learned.names(),
            "phase_start": session.phase_start,
        }
        cursor = {**_cursor(session, job, step), **facts}
        with storage_errors(folder):
            (folder / CURSOR_FILE).write_text(json.dumps(cursor, indent=1), encoding="utf-8")

    distributed.decide(finish)


def load_checkpoint(session: Session, folder: Path, job: StageJob, state: str, scratch: Path) -> int:
    """Load a checkpoint into a fresh engine; every rank calls it.

    Args:
        session: Its engine has not trained yet, and is `universal` where the checkpoint is of other workers.
        folder: What `save_checkpoint` wrote; its manifest is verified by the caller.
        job: The stage run that goes on from it.
        state: State the checkpoint must belong to.
        scratch: Folder of unsealed files, where one of another number of workers is converted.

    Returns:
        The phase's step the state is after.

    Raises:
        StageRunError: it belongs to another state, table, seed or ZeRO stage; the sentence says which.
        StorageError: it cannot be read, or holds classes it should not.
    """

    def check() -> dict[str, Any]:
        cursor = read_cursor(folder)
        _check_cursor(cursor, session, job, state, folder)
        _check_classes(folder)
        return cursor

    cursor = distributed.decide(check)
    source = folder
    if other_workers(cursor):
        # Nodes may share a disk or not: each converts for its own ranks.
        source = scratch / f"universal_{distributed.node_rank()}"
        distributed.on_each_node(lambda: convert(folder, _TAG, source))
    session.learned.load(folder, cursor.get("learned", []))
    mending = mended_load(session.engine) if source != folder else contextlib.nullcontext()
    try:
        with mending:
            path, _ = session.engine.load_checkpoint(str(source), tag=_TAG)
    except (OSError, RuntimeError, EOFError) as error:
        raise StorageError(f"the checkpoint {folder} cannot be loaded: {error}") from error
    if path is None:
        raise StorageError(f"the checkpoint {folder} is not there; DeepSpeed found nothing to load")
    if source != folder:
        distributed.on_each_node(lambda: shutil.rmtree(source, ignore_errors=True))
    session.phase_start = cursor.get("phase_start")
    return int(cursor["step"])


def read_cursor(folder: Path) -> dict[str, Any]:
    """Return the cursor of a checkpoint.

    Raises:
        StorageError: it is missing or no JSON.
    """
    try:
        cursor: dict[str, Any] = json.loads((folder / CURSOR_FILE).read_text(encoding="utf-8"))
        return cursor
    except (OSError, ValueError) as error:
        raise StorageError(f"the checkpoint {folder} has no readable {CURSOR_FILE}: {error}") from error


def other_workers(cursor: dict[str, Any]) -> bool:
    """Return whether a checkpoint's parts are those of another number of workers; without ZeRO there is one part."""
    return bool(cursor.get("world_size") != distributed.world_size() and cursor.get("zero_stage"))


def compiled_table(actions: Sequence[Action], last_step: int) -> list[list[Any]]:
    """Return the table up to a step as plain values: `[first, last, points]`, equal neighbours merged, without names.

    Where a teacher runs, a fourth value holds its points, weight and temperature.
    """
    table: list[list[Any]] = []
    for action in actions:
        first, last = action.first_step, min(action.last_step, last_step)
        if first >= last:
            continue
        does: list[Any] = [list(action.points)]
        if action.distill is not None:
            does.append({name: value for name, value in asdict(action.distill).items() if name != "teacher"})
        does = json.loads(json.dumps(does))
        if table and table[-1][2:] == does and table[-1][1] == first:
            table[-1][1] = last
        else:
            table.append([first, last, *does])
    return table


def _empty(folder: Path) -> None:
    with storage_errors(folder.parent):
        if folder.exists():
            shutil.rmtree(folder)


def _make(folder: Path) -> None:
    with storage_errors(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)


def _cursor(session: Session, job: StageJob, step: int) -> dict[str, Any]:
    return {
        "state": job.id,
        "step": step,
        "total_steps": job.total_steps,
        "seed": job.seed,
        "table": compiled_table(job.table, step),
        "zero_stage": zero_stage(session.config),
    }


def _check_cursor(cursor: dict[str, Any], session: Session, job: StageJob, state: str, folder: Path) -> None:
    step = int(cursor.get("step", -1))
    expected = {**_cursor(session, job, step), "state": state}
    differences = [
        f"{key} is {json.dumps(cursor.get(key))} there and {json.dumps(value)} here"
        for key, value in expected.items()
        if cursor.get(key) != value
    ]
    if not job.first_step <= step <= job.last_step:
        differences.append(f"it is after step {step}, this stage run covers {job.first_step} to {job.last_step}")
    if differences:
        listed = "\n    ".join(differences)
        raise StageRunError(f"stage run {job.id}: the checkpoint {folder} is of another run\n    {listed}")


def _check_classes(folder: Path) -> None:
    for file in sorted(folder.rglob("*.pt")):
        try:
            unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - _KNOWN_CLASSES
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise StorageError(f"the checkpoint file {file} was not loaded: {refusal(file, error)}") from error
        if unknown:
            raise StorageError(
                f"the checkpoint file {file} asks for {', '.join(sorted(unknown))}, which no checkpoint of ours does; "
                "it was not loaded"
            )
