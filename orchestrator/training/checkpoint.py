"""DeepSpeed checkpoints with a cursor beside them that says, in plain JSON, what they are."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO

from orchestrator.errors import StageRunError, StorageError
from orchestrator.models.torch_files import refusal
from orchestrator.plan.jobs import Action, StageJob
from orchestrator.plan.ledger.storage import storage_error, storage_errors
from orchestrator.training import group
from orchestrator.training.deepspeed_config import zero_stage
from orchestrator.training.memory import Session
from orchestrator.training.resize import convert, mended_load

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
    """Writes the state after `step` optimizer steps of the phase; every rank calls it. No manifest is written.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    group.decide(lambda: _empty(folder))
    group.on_each_node(lambda: _make(folder))
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
            "world_size": group.world_size(),
            "learned": session.learned.names(),
            "phase_start": session.phase_start,
        }
        cursor = {**_cursor(session, job, step), **facts}
        with storage_errors(folder):
            (folder / CURSOR_FILE).write_text(json.dumps(cursor, indent=1), encoding="utf-8")

    group.decide(finish)


def load_checkpoint(session: Session, folder: Path, job: StageJob, state: str, scratch: Path) -> int:
    """Loads a checkpoint into a fresh engine; every rank calls it.

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

    cursor = group.decide(check)
    source = folder
    if other_workers(cursor):
        # Nodes may share a disk or not: each converts for its own ranks.
        source = scratch / f"universal_{group.node_rank()}"
        group.on_each_node(lambda: convert(folder, _TAG, source))
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
        group.on_each_node(lambda: shutil.rmtree(source, ignore_errors=True))
    session.phase_start = cursor.get("phase_start")
    return int(cursor["step"])


def read_cursor(folder: Path) -> dict[str, Any]:
    """The cursor of a checkpoint.

    Raises:
        StorageError: it is missing or no JSON.
    """
    try:
        cursor: dict[str, Any] = json.loads((folder / CURSOR_FILE).read_text(encoding="utf-8"))
        return cursor
    except (OSError, ValueError) as error:
        raise StorageError(f"the checkpoint {folder} has no readable {CURSOR_FILE}: {error}") from error


def other_workers(cursor: dict[str, Any]) -> bool:
    """Whether a checkpoint's parts are those of another number of workers; without ZeRO there is one part."""
    return bool(cursor.get("world_size") != group.world_size() and cursor.get("zero_stage"))


def compiled_table(actions: Sequence[Action], last_step: int) -> list[list[Any]]:
    """The table up to a step as plain values: `[first, last, points]`, equal neighbours merged, without names.

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
