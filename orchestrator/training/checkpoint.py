"""DeepSpeed checkpoints, each with a `cursor.json` that says which state it holds."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO

from orchestrator.errors import StageRunError, StorageError
from orchestrator.models.weight_files import refusal
from orchestrator.plan.io_retry import retry_io
from orchestrator.plan.jobs import Action, StageJob
from orchestrator.plan.ledger.files import Files, storage_error, storage_errors
from orchestrator.spec.deepspeed import zero_stage
from orchestrator.training import distributed
from orchestrator.training.checkpoint_files import RankFiles
from orchestrator.training.engine import Session


def _convert(folder: Path, target: Path) -> None:
    """Convert a ZeRO checkpoint to DeepSpeed's universal format, which loads at any number of workers.

    The caller has checked which classes it unpickles.

    Raises:
        StorageError: a file is missing or incomplete, or the disk is full.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    output = io.StringIO()
    try:
        target.mkdir(parents=True)
        with _without_patterns(folder) as source, _without_patterns(target) as made:
            arguments = Namespace(
                input_folder=str(source / _TAG), output_folder=str(made / _TAG), num_extract_workers=1,
                num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
            )  # fmt: skip
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                ds_to_universal.main(arguments)
        # A listing that failed counts as empty there, and the step of a parameter may then be left out unsaid.
        kinds = {frozenset(os.listdir(entry)) for entry in (target / _TAG / "zero").iterdir() if entry.is_dir()}
        if len(kinds) != 1:
            raise StorageError("its parameters have different parts")
    except Exception as error:  # DeepSpeed asserts, torch and the file system raise their own kinds
        shutil.rmtree(target, ignore_errors=True)
        why = str(error) or type(error).__name__
        raise StorageError(f"the checkpoint {folder} cannot be opened by another number of workers: {why}") from error


@contextlib.contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """Return a path of a folder that is no pattern: DeepSpeed looks for files by patterns made of their paths."""
    if _PATTERN.isdisjoint(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "folder"
        link.symlink_to(folder.absolute())
        yield link


@contextlib.contextmanager
def _corrected_load(engine: Any) -> Iterator[None]:
    """Correct what DeepSpeed 0.19.8 gets wrong under ZeRO-3 where an engine loads a universal checkpoint inside.

    It gives all groups the first group's settings (weight decay among them), and one shared step count, a tensor that
    each group's step then increments, so that Adam's bias correction runs ahead.
    """
    optimizer = engine.optimizer.optimizer
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    yield
    for of_group, own in zip(optimizer.param_groups, settings, strict=True):
        of_group.update(own)
    for state in optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()


CURSOR_FILE = "cursor.json"
_PATTERN = frozenset("*?[](){}+^$|\\")
_TAG = "state"
# DeepSpeed loads with weights_only=False, which can run any code: a file may refer to these classes only.
_KNOWN_CLASSES = {
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def save_checkpoint(session: Session, folder: Path, job: StageJob, step: int) -> Files:
    """Write the state after `step` optimizer steps of the phase, without a manifest; every rank calls it.

    Returns:
        The manifest's entries of what the ranks wrote, on every rank.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    files = take_checkpoint(session, folder, job, step, copies=False)
    return joined(distributed.on_each_rank(lambda: files.finish(folder)))


def take_checkpoint(session: Session, folder: Path, job: StageJob, step: int, copies: bool) -> RankFiles:
    """Take the state after `step` optimizer steps of the phase; every rank calls it, and then finishes its files.

    Args:
        session: The model under training.
        folder: Where the checkpoint is written; what is there goes.
        job: The stage run.
        step: Steps of the phase that its state has trained.
        copies: Where the host's memory allows, only copy what is to be written; see `RankFiles`.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    distributed.decide(lambda: _empty(folder))
    distributed.on_each_node(lambda: _make(folder))
    # The key DeepSpeed's universal format looks for, so that another world size can open this checkpoint.
    setattr(session.engine.module, UNIVERSAL_CHECKPOINT_INFO, {"universal_checkpoint_version": 0.2})
    try:
        with _rank_files(session.engine, copies) as files:
            session.engine.save_checkpoint(str(folder), tag=_TAG, client_state={}, save_latest=False)
    except (OSError, RuntimeError) as error:
        raise storage_error(folder, error) from error

    def finish() -> None:
        # A script that DeepSpeed copies into each checkpoint; nobody should run code from there.
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
    return files


def joined(files: Sequence[Files]) -> Files:
    """Return the entries of all ranks as one mapping."""
    return {name: entry for of_rank in files for name, entry in of_rank.items()}


def load_checkpoint(session: Session, folder: Path, job: StageJob, state: str, scratch: Path) -> int:
    """Load a checkpoint into a fresh engine; every rank calls it.

    Args:
        session: Its engine has not trained yet; opened with `universal` where the checkpoint is of another number of
            workers.
        folder: What `save_checkpoint` wrote; the caller has verified its manifest.
        job: The stage run that continues from it.
        state: State the checkpoint must belong to.
        scratch: Folder for unsealed files, where a checkpoint of another number of workers is converted.

    Returns:
        The number of steps of the phase that its state has trained.

    Raises:
        StageRunError: it belongs to another state, table, seed or ZeRO stage; the message says which.
        StorageError: it cannot be read, or refers to classes that are not allowed.
    """

    def check() -> dict[str, Any]:
        cursor = read_cursor(folder)
        _check_cursor(cursor, session, job, state, folder)
        _check_classes(folder)
        return cursor

    cursor = distributed.decide(check)
    source = folder
    if other_workers(cursor):
        # Nodes need not share a disk: each converts for its own ranks.
        source = scratch / f"universal_{distributed.node_rank()}"
        distributed.on_each_node(lambda: _convert(folder, source))
    session.learned.load(folder, cursor.get("learned", []))
    correction = _corrected_load(session.engine) if source != folder else contextlib.nullcontext()
    try:
        with correction, _rank_files(session.engine, copies=False), _without_patterns(source) as place:
            path = retry_io(lambda: _loaded(session.engine, place))
    except (OSError, RuntimeError, EOFError) as error:
        raise StorageError(f"the checkpoint {folder} cannot be loaded: {error}") from error
    if path is None:
        raise StorageError(f"the checkpoint {folder} is missing: DeepSpeed found nothing to load")
    if source != folder:
        distributed.on_each_node(lambda: shutil.rmtree(source, ignore_errors=True))
    session.phase_start = cursor.get("phase_start")
    return int(cursor["step"])


def _loaded(engine: Any, folder: Path) -> str | None:
    """Return the path that DeepSpeed has loaded a checkpoint from, if any.

    Raises:
        OSError: it takes a file for missing. It asserts that they are there, before a rank waits for another, and takes
            one that it could not look at for missing.
    """
    try:
        path: str | None = engine.load_checkpoint(str(folder), tag=_TAG)[0]
        return path
    except AssertionError as error:
        raise OSError(errno.EIO, str(error) or "DeepSpeed finds a file missing", str(folder)) from error


@contextlib.contextmanager
def _rank_files(engine: Any, copies: bool) -> Iterator[RankFiles]:
    """Put `RankFiles` in the place of DeepSpeed's reader and writer."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = files = RankFiles(own, copies)
    try:
        yield files
    finally:
        engine.checkpoint_engine = own


def read_cursor(folder: Path) -> dict[str, Any]:
    """Return the cursor of a checkpoint.

    Raises:
        StorageError: it is missing or not valid JSON.
    """
    try:
        cursor: dict[str, Any] = json.loads(retry_io(lambda: (folder / CURSOR_FILE).read_text("utf-8")))
        return cursor
    except (OSError, ValueError) as error:
        raise StorageError(f"the checkpoint {folder} has no readable {CURSOR_FILE}: {error}") from error


def other_workers(cursor: dict[str, Any]) -> bool:
    """Return whether a checkpoint is partitioned for another number of workers; without ZeRO it is not partitioned."""
    return bool(cursor.get("world_size") != distributed.world_size() and cursor.get("zero_stage"))


def compiled_table(actions: Sequence[Action], last_step: int) -> list[list[Any]]:
    """Return the table up to a step as plain values: `[first, last, points]`, equal neighbours merged, without names.

    With a teacher, a fourth value holds its points, weight and temperature; with students, one holds theirs.
    """
    table: list[list[Any]] = []
    for action in actions:
        first, last = action.first_step, min(action.last_step, last_step)
        if first >= last:
            continue
        does: list[Any] = [list(action.points)]
        if action.distill is not None:
            does.append({name: value for name, value in action.distill.fields().items() if name != "teacher"})
        if action.students is not None:
            does.append({name: value for name, value in asdict(action.students).items() if name != "variants"})
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
            named = retry_io(partial(torch.serialization.get_unsafe_globals_in_checkpoint, file))
            unknown = set(named) - _KNOWN_CLASSES
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise StorageError(f"the checkpoint file {file} was not loaded: {refusal(file, error)}") from error
        if unknown:
            raise StorageError(
                f"the checkpoint file {file} refers to {', '.join(sorted(unknown))}, which is not allowed in a "
                "checkpoint; it was not loaded"
            )
