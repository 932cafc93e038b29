"""The ledger: the folder of finished work, addressed by identity; it alone decides what is done (DESIGN section 6)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import StorageError
from orchestrator.plan import storage
from orchestrator.plan.lock import hold, holder
from orchestrator.plan.storage import damaged_files, missing_files, read_json, storage_errors, write_json

_PARTS = ("job.json", "result.json", "weights", "checkpoint")
_STEP = re.compile(r"step_[0-9]+")
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Ledger:
    """Finished states, evaluations and failures below one storage folder.

    Nothing is created before something is written. A state is done when its manifest is there and whole.

    Args:
        storage: Storage folder.

    Raises:
        StorageError: it is no local folder.
    """

    def __init__(self, storage: str | Path) -> None:
        if "://" in str(storage):
            raise StorageError(f"{storage}: only folders can hold a ledger so far; mount it, or give a folder")
        self.storage = Path(storage).absolute()
        if self.storage.exists() and not self.storage.is_dir():
            raise StorageError(f"{self.storage}: is a file; cluster.storage_path names a folder")
        self._whole: set[str] = set()
        self._base = str(self.storage)  # text: a plan of 10,000 cells asks 200,000 times for what is not there

    def state_folder(self, state: str) -> Path:
        """Folder of a finished state: a stage run or a root."""
        return self.storage / "stage_runs" / _checked(state)

    def work_folder(self, state: str) -> Path:
        """Folder of a stage run under way: spool, log, in-stage checkpoints, then the parts that `commit` takes."""
        return self.storage / "work" / _checked(state)

    def metrics_file(self, state: str) -> Path:
        """Metrics of a finished stage run, or the spool of one under way; it need not exist."""
        return self._current(state, "metrics.jsonl")

    def log_file(self, job: str) -> Path:
        """What a finished job printed, or one under way; it need not exist."""
        return self._current(job, "log.txt")

    def _current(self, state: str, name: str) -> Path:
        finished = self.state_folder(state) / name
        return finished if finished.exists() else self.work_folder(state) / name

    def is_done(self, state: str) -> bool:
        """True where the state is committed and no file is missing or cut short (contents: `verify`)."""
        # A committed folder does not change; a damaged one is found by `verify` before it is loaded.
        if state in self._whole:
            return True
        if not os.path.exists(f"{self._base}/stage_runs/{_checked(state)}") or missing_files(self.state_folder(state)):
            return False
        self._whole.add(state)
        return True

    def has(self, state: str, part: Literal["weights", "checkpoint"]) -> bool:
        """True where a finished state still has its weights, or its full checkpoint."""
        folder = self.state_folder(state)
        if part == "checkpoint":
            return (folder / "checkpoint").is_dir()
        return (folder / "weights" / "model.safetensors").is_file()

    def verify(self, folder: Path) -> list[str]:
        """Damaged files of a folder with a manifest, every byte read; empty when it is whole."""
        damaged = damaged_files(folder)
        if damaged and folder.parent == self.storage / "stage_runs":
            self._whole.discard(folder.name)
        return damaged

    def write_manifest(self, folder: Path) -> None:
        """Seals a folder: files made to last, then size and SHA-256 of each, written last.

        Raises:
            StorageError: the disk is full or a file cannot be read.
        """
        storage.write_manifest(folder)

    def commit(self, state: str) -> Path:
        """Seals what lies in the work folder (`job.json`, `result.json`, `metrics.jsonl`, `weights/`, `checkpoint/`).

        Until the one rename that makes the state appear, the work folder stays whole, so a crash loses nothing.
        A second commit of a state changes nothing, unless it brings a checkpoint that the first one lacks or
        replaces a damaged one.

        Returns:
            The state's folder.

        Raises:
            StorageError: there is nothing to commit, or the disk is full.
        """
        work, target = self.work_folder(state), self.state_folder(state)
        parts = [work / name for name in _PARTS if (work / name).exists()]
        if not parts:
            if self.is_done(state):
                return target
            raise StorageError(f"{work}: there is nothing to commit; weights/ or result.json is missing")
        aside = target.with_name(f".{state}.{secrets.token_hex(6)}")
        try:
            with storage_errors(self.storage):
                aside.mkdir(parents=True)
                for part in parts:
                    _link(part, aside / part.name)
                if (work / "metrics.jsonl").exists():
                    shutil.copyfile(work / "metrics.jsonl", aside / "metrics.jsonl")
            storage.write_manifest(aside)
            with storage_errors(self.storage):
                self._appear(state, aside, target)
                if (work / "log.txt").exists():
                    (work / "log.txt").replace(target / "log.txt")
                storage.fsync_folder(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        return target

    def _appear(self, state: str, aside: Path, target: Path) -> None:
        for _ in range(10):
            if not missing_files(target) and ((target / "checkpoint").exists() or not (aside / "checkpoint").exists()):
                return
            old = target.with_name(f".{state}.{secrets.token_hex(6)}.old")
            with contextlib.suppress(FileNotFoundError):
                target.rename(old)
            try:
                aside.rename(target)
                return
            except OSError as error:  # another writer was quicker: look again
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        raise StorageError(f"{target}: other processes keep writing it; stop all but one and run again")

    def discard(self, state: str) -> None:
        """Takes a damaged state out of the ledger, so that it is trained again.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._whole.discard(state)
        target = self.state_folder(state)
        old = target.with_name(f".{state}.{secrets.token_hex(6)}.old")
        with storage_errors(self.storage), contextlib.suppress(FileNotFoundError):
            target.rename(old)
        shutil.rmtree(old, ignore_errors=True)

    def result(self, state: str) -> dict[str, Any] | None:
        """`result.json` of a finished stage run."""
        return read_json(self.state_folder(state) / "result.json") if self.is_done(state) else None

    def job(self, state: str) -> dict[str, Any] | None:
        """The job that led to a finished state, as `job_to_json` wrote it."""
        return read_json(self.state_folder(state) / "job.json") if self.is_done(state) else None

    def checkpoints(self, state: str) -> list[Path]:
        """Checkpoints inside a stage run under way, newest first; a damaged or unfinished one is left out."""
        work = self.work_folder(state)
        if not work.is_dir():
            return []
        found = [path for path in work.iterdir() if _STEP.fullmatch(path.name)]
        found.sort(key=lambda path: int(path.name[5:]), reverse=True)
        return [path for path in found if not damaged_files(path)]

    def stored_checkpoints(self, leave_out: Set[str] = frozenset()) -> dict[str, int]:
        """States with a full checkpoint and the step of the phase they stand at."""
        try:
            known = [name for name in os.listdir(self.storage / "stage_runs") if _ID.fullmatch(name)]
        except OSError:
            return {}
        found = {}
        for state in sorted(set(known) - leave_out):
            if self.has(state, "checkpoint") and (job := self.job(state)) is not None:
                found[state] = int(job.get("last_step", 0))
        return found

    def evaluation(self, evaluation: str) -> dict[str, Any] | None:
        """A finished evaluation."""
        return self._note("evaluations", evaluation)

    def write_evaluation(self, evaluation: str, result: dict[str, Any]) -> None:
        """Records a finished evaluation.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        write_json(self.storage / "evaluations" / f"{_checked(evaluation)}.json", result)

    def failure(self, job: str) -> dict[str, Any] | None:
        """Why a stage run or an evaluation failed; None where it did not."""
        return self._note("failures", job)

    def _note(self, folder: str, name: str) -> dict[str, Any] | None:
        path = f"{self._base}/{folder}/{_checked(name)}.json"
        return read_json(Path(path)) if os.path.exists(path) else None

    def write_failure(self, job: str, failure: dict[str, Any]) -> None:
        """Records a failure.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        write_json(self.storage / "failures" / f"{_checked(job)}.json", failure)

    def clear_failure(self, job: str) -> None:
        """Forgets a failure, if there is one."""
        with storage_errors(self.storage):
            (self.storage / "failures" / f"{_checked(job)}.json").unlink(missing_ok=True)

    def cell_folder(self, experiment: str, cell_name: str) -> Path:
        """Folder that points to a cell's weights, log and resolved YAML."""
        return self.storage / "cells" / _as_name(experiment) / _as_name(cell_name)

    def lock(self, experiment: str = "storage") -> contextlib.AbstractContextManager[None]:
        """Holds this storage, or one experiment of it, for one driver; a driver that dies lets go.

        Without leases two experiments may want the same stage run: hold the whole storage.

        Raises:
            UsageError: another driver holds it.
            StorageError: the folder cannot be written.
        """
        return hold(self._lock_file(experiment), f"{experiment} in {self.storage}")

    def lock_holder(self, experiment: str = "storage") -> dict[str, Any] | None:
        """`pid`, `host` and `since` of the driver that holds `lock`; None where none does."""
        return holder(self._lock_file(experiment))

    def _lock_file(self, experiment: str) -> Path:
        return self.storage / "locks" / f"{_as_name(experiment)}.lock"


def _checked(name: str) -> str:
    if not _ID.fullmatch(name):
        raise StorageError(f"{name!r} is no identity of the ledger")
    return name


def _as_name(text: str) -> str:
    """A folder's name; what cannot stand in one is replaced, and a short hash keeps two such names apart."""
    safe = re.sub(r"[^A-Za-z0-9._=,+%-]", "-", text)[:150].lstrip(".") or "_"
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _link(source: Path, target: Path) -> None:
    """The same files under another name, without a copy where the file system can."""
    if not source.is_dir():
        _link_file(source, target)
        return
    target.mkdir()
    for entry in sorted(source.iterdir()):
        _link(entry, target / entry.name)


def _link_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a copy would not fit either
            raise
        shutil.copyfile(source, target)
