"""The ledger: finished work, addressed by identity; it alone decides what is done (DESIGN section 6)."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Set
from pathlib import Path
from typing import Any

from orchestrator.errors import DamagedStateError, StorageError
from orchestrator.plan.ledger.states import Part, checked
from orchestrator.plan.ledger.storage import (
    damaged_files,
    dump_json,
    is_there,
    names_in,
    parse_json,
    read_json,
    storage_errors,
)
from orchestrator.plan.ledger.unsealed import UnsealedWork
from orchestrator.plan.steady import steady

_PARTS = ("job.json", "result.json", "weights", "checkpoint")


class Ledger(UnsealedWork):
    """Finished states, evaluations and failures below one storage, and stage runs under way (`UnsealedWork`).

    Nothing is created before something is written. A state is done when its manifest is there and whole.

    Args:
        storage: Storage folder (local or NFS), or `s3://bucket/prefix`.

    Raises:
        StorageError: it can be no storage.
    """

    def state_folder(self, state: str) -> Path:
        """Folder of a finished state, a stage run or a root, on this machine; `fetch` brings its parts there."""
        return self._states.state_folder(checked(state))

    def is_done(self, state: str) -> bool:
        """True where the state is committed and no file is missing or cut short (contents: `fetch`)."""
        return self._states.is_whole(checked(state))

    def has(self, state: str, part: Part) -> bool:
        """True where a finished state still has its weights, or its full checkpoint."""
        return self._states.has(checked(state), part)

    def fetch(self, state: str, part: Part) -> Path:
        """Folder of a finished state's part on this machine, every byte of it checked.

        Raises:
            DamagedStateError: files are missing, cut short or changed.
            StorageError: the storage cannot be read.
        """
        if damaged := self._states.fetch(checked(state), part):
            raise DamagedStateError(
                f"{self.url}: the {part} of the state {state} cannot be used (missing or damaged: "
                f"{', '.join(damaged[:3])}); it must be trained again, and the next run does that",
                state,
            )
        return self.state_folder(state) / part

    def verify(self, folder: Path) -> list[str]:
        """Damaged files of a folder with a manifest, every byte read; empty when it is whole."""
        return damaged_files(folder)

    def discard(self, state: str) -> None:
        """Takes a damaged state out of the ledger, so that it is trained again.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._states.discard(checked(state))

    def recover(self, state: str) -> bool:
        """Puts a finished state back that a gc had taken aside when it was killed; call it while holding its lease.

        Raises:
            StorageError: the storage cannot be read or written.
        """
        return self._states.recover(checked(state))

    def result(self, state: str) -> dict[str, Any] | None:
        """`result.json` of a finished stage run."""
        return read_json(self._states.small_file(state, "result.json")) if self.is_done(state) else None

    def job(self, state: str) -> dict[str, Any] | None:
        """The job that led to a finished state, as `job_to_json` wrote it."""
        return read_json(self._states.small_file(state, "job.json")) if self.is_done(state) else None

    def stored_checkpoints(self, leave_out: Set[str] = frozenset()) -> dict[str, int]:
        """States with a full checkpoint and the step of the phase they stand at."""
        found = {}
        for state in self._states.names():
            if state in leave_out or not self.has(state, "checkpoint"):
                continue
            if (job := self.job(state)) is not None:
                found[state] = int(job.get("last_step", 0))
        return found

    def metrics_file(self, state: str) -> Path:
        """Metrics of a finished stage run, or the spool of one under way; it need not exist."""
        return self._current(state, "metrics.jsonl")

    def log_file(self, job_id: str) -> Path:
        """What a finished job printed, or one under way; it need not exist."""
        return self._current(job_id, "log.txt")

    def _current(self, state: str, name: str) -> Path:
        finished = self._states.small_file(checked(state), name)
        return finished if is_there(finished) else self._states.work_file(state, name)

    def commit(self, state: str) -> Path:
        """Makes a finished state of what lies in the writing folder (`job.json`, `result.json`, `weights/`,
        `checkpoint/`) and of the work folder's `metrics.jsonl` and `log.txt`; the work folder goes.

        Until the one rename that makes the state appear, readers see no change, and sealed checkpoints stay.
        A second commit of a state adds the parts that the first one lacks, or replaces a damaged one; what is whole
        stays as it is, since evaluations were made of it.

        Returns:
            The state's folder.

        Raises:
            StaleWriterError: another driver has taken the job over; readers see no change.
            StorageError: there is nothing to commit, or the disk is full.
        """
        self.check_fence(state)
        writing, metrics = self._writing(state), self.work_folder(state) / "metrics.jsonl"
        if not any(is_there(writing / name) for name in _PARTS):
            if self.is_done(state):
                return self.state_folder(state)
            raise StorageError(f"{writing}: there is nothing to commit; weights/ or result.json is missing")
        with storage_errors(writing):
            for entry in [writing / name for name in names_in(writing)]:
                if entry.name not in _PARTS and entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name not in _PARTS:
                    entry.unlink()
            if is_there(metrics):
                steady(lambda: shutil.copyfile(metrics, writing / metrics.name))
        self._states.write_manifest(writing)
        self.check_fence(state)  # reading all bytes took its time
        self._states.commit(state, writing)
        self._states.end_work(state, self._token(state))
        return self.state_folder(state)

    def evaluation(self, evaluation: str) -> dict[str, Any] | None:
        """A finished evaluation."""
        return self._note("evaluations", evaluation)

    def write_evaluation(self, evaluation: str, result: dict[str, Any]) -> None:
        """Records a finished evaluation.

        Raises:
            StorageError: the disk is full or the storage cannot be written.
        """
        self._states.tell(checked(evaluation))
        self._write_note("evaluations", evaluation, result)

    def failure(self, job: str) -> dict[str, Any] | None:
        """Why a stage run or an evaluation failed; None where it did not."""
        return self._note("failures", job)

    def write_failure(self, job: str, failure: dict[str, Any]) -> None:
        """Records a failure.

        Raises:
            StorageError: the disk is full or the storage cannot be written.
        """
        self._write_note("failures", job, failure)

    def clear_failure(self, job: str) -> None:
        """Forgets a failure, if there is one."""
        self.store.delete(f"failures/{checked(job)}.json")

    def _note(self, kind: str, name: str) -> dict[str, Any] | None:
        return parse_json(self.store.read(f"{kind}/{checked(name)}.json"))

    def _write_note(self, kind: str, name: str, note: dict[str, Any]) -> None:
        self.store.write(f"{kind}/{checked(name)}.json", dump_json(note))

    def cell_folder(self, experiment: str, cell_name: str) -> Path:
        """Folder that points to a cell's weights, log and resolved YAML."""
        return self.storage / "cells" / as_name(experiment) / as_name(cell_name)

    def point_to(self, state: str, cell_folder: Path, record: dict[str, Any]) -> None:
        """Shows a cell by name to who looks into the storage itself, where that is a bucket: record and addresses.

        Raises:
            StorageError: the storage cannot be written.
        """
        self._states.point_to(checked(state), cell_folder, record)


def as_name(text: str) -> str:
    """A folder's name; what cannot stand in one is replaced, and a short hash keeps two such names apart."""
    safe = re.sub(r"[^A-Za-z0-9._=,+%-]", "-", text)[:150].lstrip(".") or "_"
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
