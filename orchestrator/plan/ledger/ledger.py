"""The ledger: finished work, addressed by identity; it alone decides what is done (docs/concepts/ledger.md)."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from orchestrator.errors import DamagedStateError, StaleWriterError, StorageError
from orchestrator.plan.io_retry import retry_io
from orchestrator.plan.jobs import Keep
from orchestrator.plan.ledger.backends import open_backend
from orchestrator.plan.ledger.backends.base import PARTS_OF, Part, checked, token_in
from orchestrator.plan.ledger.files import (
    Files,
    dump_json,
    dump_note,
    is_there,
    make_folder,
    names_in,
    parse_json,
    parse_note,
    read_json,
    storage_errors,
)
from orchestrator.plan.ledger.leases import Holder, Leases

_ANSWERS, _FILES = "predictions_sha256", "files_sha256"
_KEPT_CHECKPOINTS = 2
_MARK = "storage.json"
_PARTS = ("job.json", "result.json", "weights", "checkpoint")


class Ledger:
    """Finished states, evaluations, failures and stage runs under way of one storage.

    Nothing is created before something is written. A state is done when its manifest is there and complete. A writer
    that lost its lease changes nothing that readers see. Every method raises StorageError where the storage cannot be
    read or written, or its disk is full.

    Args:
        storage: Storage folder (local or NFS), or `s3://bucket/prefix`.

    Attributes:
        url: What was named, made absolute: other processes open the same storage with it.
        storage: The folder itself; for s3 this machine's copy of what it needed.
        store: The backend: notes, leases, heartbeats, and where states lie.
        fences: Job to the token this process writes under; a job without one is not fenced.
    """

    def __init__(self, storage: str | Path) -> None:
        self.store = open_backend(storage)
        self.url, self.storage = self.store.url, self.store.folder
        self.fences: dict[str, int] = {}
        self._onlooker = Leases(self.store, "onlooker")  # kept: whom it once watched it need not wait for again

    def snapshot(self) -> AbstractContextManager[None]:
        """Within it, questions about many jobs may be answered as things were at its begin: for plans and tables."""
        return self.store.snapshot()

    def mark(self) -> str:
        """Return what tells this storage from every other, whoever opens it from where; it is made here if need be."""
        self.store.create(_MARK, dump_json({"id": uuid.uuid4().hex}))
        mark = self.read_mark()
        if mark is None:
            raise StorageError(f"{self.url}/{_MARK} is damaged; take it away, and run again")
        return mark

    def read_mark(self) -> str | None:
        """Return what `mark` made; None where nobody has, or where another storage is under this address."""
        return (parse_json(self.store.read(_MARK)) or {}).get("id")

    def living_holders(self) -> dict[str, Holder]:
        """Return the jobs under way to who works on them; what a killed driver left behind does not count."""
        return self._onlooker.holders()

    # Finished states -----------------------------------------------------------------------------------------------

    def state_folder(self, state: str) -> Path:
        """Return the folder of a finished state on this machine; `fetch` downloads its parts there."""
        return self.store.state_folder(checked(state))

    def is_done(self, state: str) -> bool:
        """Return True where the state is committed and no file is missing or cut short (contents: `fetch`)."""
        return self.store.is_complete(checked(state))

    def has(self, state: str, part: Part) -> bool:
        """Return True where a finished state still has its weights, or its full checkpoint."""
        return self.store.has(checked(state), part)

    def is_stored(self, state: str, keep: Keep) -> bool:
        """Return True where a state is committed with all that `keep` wants of it: `none` wants its result alone."""
        return self.is_done(state) and all(self.has(state, part) for part in PARTS_OF[keep][-1:])

    def fetch(self, state: str, part: Part) -> Path:
        """Return the folder of a finished state's part on this machine, every byte of it checked.

        Raises:
            DamagedStateError: files are missing, cut short or changed.
        """
        if damaged := self.store.fetch(checked(state), part):
            raise DamagedStateError(
                f"{self.url}: the {part} of the state {state} cannot be used (missing or damaged: "
                f"{', '.join(damaged[:3])}); it must be trained again, and the next run does that",
                state,
            )
        return self.state_folder(state) / part

    def discard(self, state: str) -> None:
        """Delete a damaged state from the ledger, so that it is trained again."""
        self.store.discard(checked(state))

    def recover(self, state: str) -> bool:
        """Put a finished state back that a gc had taken aside when it was killed; call it while holding its lease."""
        return self.store.recover(checked(state))

    def result(self, state: str) -> dict[str, Any] | None:
        """Return `result.json` of a finished stage run."""
        return read_json(self.store.small_file(state, "result.json")) if self.is_done(state) else None

    def job(self, state: str) -> dict[str, Any] | None:
        """Return the job that led to a finished state, as `job_to_json` wrote it."""
        return read_json(self.store.small_file(state, "job.json")) if self.is_done(state) else None

    def stored_checkpoints(self, leave_out: Set[str] = frozenset()) -> dict[str, int]:
        """Return the states with a full checkpoint and the step of the phase they stand at."""
        found = {}
        for state in self.store.states():
            if state in leave_out or not self.has(state, "checkpoint"):
                continue
            if (job := self.job(state)) is not None:
                found[state] = int(job.get("last_step", 0))
        return found

    def metrics_file(self, state: str) -> Path:
        """Return the metrics of a finished stage run, or the spool of one under way; it need not exist."""
        place = self.store.small_file if self.is_done(state) else self.store.work_file
        return place(state, "metrics.jsonl")

    def log_file(self, job_id: str) -> Path:
        """Return what a finished job printed, or one under way; it need not exist."""
        finished = self.store.small_file(checked(job_id), "log.txt")
        return finished if is_there(finished) else self.store.work_file(job_id, "log.txt")

    def commit(self, state: str, known: Files | None = None) -> Path:
        """Make a finished state of what lies in the writing folder (`job.json`, `result.json`, `weights/`,
        `checkpoint/`) and of the work folder's `metrics.jsonl` and `log.txt`; the work folder goes.

        Until the one rename that makes the state appear, readers see no change, and sealed checkpoints stay.
        A second commit of a state adds the parts that the first one lacks, or replaces a damaged one; what is complete
        stays as it is, since evaluations were made of it.

        Args:
            state: The stage run.
            known: Manifest entries of files that their writers flushed and hashed; they are not read again.

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
                retry_io(lambda: shutil.copyfile(metrics, writing / metrics.name))
        self.store.write_manifest(writing, known or {})
        self.check_fence(state)  # reading all bytes took its time
        self.store.commit(state, writing)
        self.store.end_work(state, self._token(state))
        return self.state_folder(state)

    # Stage runs under way ------------------------------------------------------------------------------------------

    def work_folder(self, job_id: str) -> Path:
        """Return the folder of a stage run under way: spool, log and sealed in-stage checkpoints."""
        return self.store.work_folder(checked(job_id))

    def writing_folder(self, job_id: str) -> Path:
        """Return the folder for what this writer has not sealed yet; it is made here."""
        folder = self._writing(job_id)
        with storage_errors(folder):
            make_folder(folder)
        return folder

    def _writing(self, job_id: str) -> Path:
        return self.work_folder(job_id) / f".writing-{self._token(job_id)}"

    def _token(self, job_id: str) -> int:
        return self.fences.get(job_id, 0)

    def check_fence(self, job_id: str) -> None:
        """Ask whether this process may still write for a job.

        Raises:
            StaleWriterError: a higher token was given out: another driver has taken the job over.
        """
        token = self.fences.get(job_id)
        if token is not None and (newest := self.store.token_of(job_id)) > token:
            raise StaleWriterError(
                f"{self.url}: job {job_id} was taken over by another driver (token {newest}, this one has {token}) "
                "because this process sent no heartbeat for long; the other driver's work counts"
            )

    def begin(self, job_id: str) -> None:
        """Clear away what earlier writers of a stage run left unsealed; one rank calls it before any writes.

        Raises:
            StaleWriterError: another driver has taken the job over.
        """
        self.check_fence(job_id)
        token = self._token(job_id)
        for name in names_in(self.work_folder(job_id)):
            if name.startswith(".writing-") and token_in(Path(name)) <= token:
                shutil.rmtree(self.work_folder(job_id) / name, ignore_errors=True)
        self.store.begin(job_id, token)

    def is_begun(self, job_id: str) -> bool:
        """Return True where a stage run is under way."""
        return self.store.is_begun(checked(job_id))

    def share_progress(self, job_id: str) -> None:
        """Show others the metrics and logs of an attempt so far; its last checkpoint or its commit did so before.

        Raises:
            StaleWriterError: another driver has taken the job over.
        """
        self.check_fence(job_id)
        self.store.share_progress(checked(job_id))

    def end_work(self, job_id: str) -> None:
        """Delete the work folder of a job that leaves no state."""
        self.store.end_work(checked(job_id), self._token(job_id))

    def share(self, folder: Path, known: Files | None = None) -> None:
        """Hand over what this machine wrote into an unsealed folder; one rank a machine calls it before a seal."""
        self.store.share(folder, known or {})

    def seal_checkpoint(self, job_id: str, step: int, folder: Path, known: Files | None = None) -> Path:
        """Seal an in-stage checkpoint: manifest last, then one rename. The one before it stays, older ones go.

        Args:
            step: Steps of the phase it is after.
            folder: Where it was written, below `writing_folder`.
            known: Manifest entries of files that their writers flushed and hashed; they are not read again.

        Returns:
            Where it is now.

        Raises:
            StaleWriterError: another driver has taken the job over; readers see no change.
        """
        self.check_fence(job_id)
        self.store.write_manifest(folder, known or {})
        self.check_fence(job_id)  # reading all bytes took its time
        sealed = self.store.seal_checkpoint(checked(job_id), step, folder)
        self.check_fence(job_id)  # who lost its lease takes nothing of the new holder's away
        self.store.prune(job_id, step, _KEPT_CHECKPOINTS, self._token(job_id))
        return sealed

    def checkpoint_steps(self, job_id: str) -> list[int]:
        """Return the steps of the checkpoints inside a stage run under way, newest first, complete or not."""
        return self.store.steps(checked(job_id))

    def last_checkpoint(self, job_id: str) -> Path | None:
        """Return the newest complete checkpoint inside a stage run under way; damaged ones are skipped."""
        return next(self.store.checkpoints(checked(job_id)), None)

    def download_checkpoint(self, job_id: str, name: str) -> Path:
        """Return an in-stage checkpoint, found complete on another machine, on this one."""
        folder = self.work_folder(job_id) / name
        self.store.download_checkpoint(folder)
        return folder

    # Notes ---------------------------------------------------------------------------------------------------------

    def evaluation(self, evaluation: str) -> dict[str, Any] | None:
        """Return a finished evaluation; None where there is none or it was changed: then it is done again."""
        return self._note("evaluations", evaluation)

    def write_evaluation(
        self,
        evaluation: str,
        result: dict[str, Any],
        predictions: Sequence[Mapping[str, Any]] = (),
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Record a finished evaluation, its answers and files before its result: where there is one, they are there."""
        self.store.share_progress(checked(evaluation))
        if files:
            texts = {name: base64.b64encode(content).decode() for name, content in files.items()}
            content = gzip.compress(dump_json(texts), mtime=0)
            self.store.write(_files_key(evaluation), content)
            result = {**result, _FILES: hashlib.sha256(content).hexdigest()}
        if predictions:
            lines = gzip.compress("".join(json.dumps(each) + "\n" for each in predictions).encode(), mtime=0)
            self.store.write(_predictions_key(evaluation), lines)
            result = {**result, _ANSWERS: hashlib.sha256(lines).hexdigest()}
        self._write_note("evaluations", evaluation, result)

    def predictions(self, evaluation: str) -> list[dict[str, Any]] | None:
        """Return every answer of a finished evaluation; None where it kept none, or they are gone.

        Raises:
            StorageError: they are damaged.
        """
        with self._damage_of(_predictions_key(evaluation)):
            text = self._unpacked(_predictions_key(evaluation), (self.evaluation(evaluation) or {}).get(_ANSWERS))
            return None if text is None else [json.loads(line) for line in text.splitlines()]

    def evaluation_files(self, evaluation: str) -> dict[str, bytes]:
        """Return the files that a finished evaluation wrote, such as a benchmark's submission, by name.

        Raises:
            StorageError: they are damaged.
        """
        with self._damage_of(_files_key(evaluation)):
            text = self._unpacked(_files_key(evaluation), (self.evaluation(evaluation) or {}).get(_FILES))
            return {name: base64.b64decode(one) for name, one in json.loads(text or b"{}").items()}

    def _unpacked(self, key: str, sha256: str | None) -> bytes | None:
        """Return what was compressed under a key; None where nothing was."""
        data = self.store.read(key)
        if data is None:
            return None
        if sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError("not what was written")
        return gzip.decompress(data)

    @contextlib.contextmanager
    def _damage_of(self, key: str) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise StorageError(
                f"{self.url}/{key} is damaged ({error}); `ledger verify --discard` takes its evaluation out, so that "
                "the next run does it again"
            ) from error

    def damaged_evaluation(self, evaluation: str) -> list[str]:
        """Return which keys of a finished evaluation are damaged or gone; every byte is read."""
        note, found = f"evaluations/{checked(evaluation)}.json", []
        result = self.evaluation(evaluation)
        if result is None:
            return [note] if self.store.read(note) is not None else []
        for key, seal in ((_predictions_key(evaluation), _ANSWERS), (_files_key(evaluation), _FILES)):
            try:
                is_gone = self._unpacked(key, result.get(seal)) is None and seal in result
            except (OSError, EOFError, ValueError, zlib.error):
                is_gone = True
            if is_gone:
                found.append(key)
        return found

    def discard_evaluation(self, evaluation: str) -> None:
        """Delete a finished evaluation, its result first: it is then to be done again."""
        for key in (f"evaluations/{checked(evaluation)}.json", _predictions_key(evaluation), _files_key(evaluation)):
            self.store.delete(key)

    def record_score(self, evaluation: str, metric: str, score: Mapping[str, Any]) -> None:
        """Add a score that someone else measured to a finished evaluation; an earlier one of that metric gives way.

        Args:
            evaluation: Its id.
            metric: The metric's name.
            score: `value`, `source` and `when` (seconds since 1970).
        """
        result = self.evaluation(evaluation) or {}
        recorded = {**result.get("recorded", {}), metric: dict(score)}
        self._write_note("evaluations", evaluation, {**result, "recorded": recorded})

    def failure(self, job: str) -> dict[str, Any] | None:
        """Return why a stage run or an evaluation failed; None where it did not."""
        return self._note("failures", job)

    def write_failure(self, job: str, failure: dict[str, Any]) -> None:
        """Record a failure."""
        self._write_note("failures", job, failure)

    def clear_failure(self, job: str) -> None:
        """Forget a failure, if there is one."""
        self.store.delete(f"failures/{checked(job)}.json")

    def _note(self, kind: str, name: str) -> dict[str, Any] | None:
        key = f"{kind}/{checked(name)}.json"
        return parse_note(key, self.store.read(key))

    def _write_note(self, kind: str, name: str, note: dict[str, Any]) -> None:
        key = f"{kind}/{checked(name)}.json"
        self.store.write(key, dump_note(key, note))

    def cell_folder(self, experiment: str, cell_name: str) -> Path:
        """Return the folder that points to a cell's weights, log and resolved YAML."""
        return self.storage / "cells" / as_name(experiment) / as_name(cell_name)

    def point_to(self, state: str, cell_folder: Path, record: dict[str, Any]) -> None:
        """Show a cell by name to who looks into the storage itself, where that is a bucket: record and addresses."""
        self.store.point_to(checked(state), cell_folder, record)


def as_name(text: str) -> str:
    """Return a folder's name; what cannot stand in one is replaced, and a short hash keeps two such names apart."""
    safe = re.sub(r"[^A-Za-z0-9._=,+%-]", "-", text)[:150].lstrip(".") or "_"
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _files_key(evaluation: str) -> str:
    return f"evaluation_files/{checked(evaluation)}.json.gz"


def _predictions_key(evaluation: str) -> str:
    return f"predictions/{checked(evaluation)}.jsonl.gz"
