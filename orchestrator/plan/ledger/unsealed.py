"""What stage runs under way write: in a folder of their writer alone, until one rename seals it; fenced by tokens."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from orchestrator.errors import StaleWriterError
from orchestrator.plan.ledger.leases import token_of
from orchestrator.plan.ledger.states import FolderStates, checked, open_states, token_in
from orchestrator.plan.ledger.storage import make_folder, names_in, storage_errors
from orchestrator.plan.ledger.store import Store, open_store

_KEPT_CHECKPOINTS = 2


class UnsealedWork:
    """Stage runs under way below one storage. A writer that lost its lease changes nothing that readers see.

    Args:
        storage: Storage folder (local or NFS), or `s3://bucket/prefix`.

    Attributes:
        url: What was named, made absolute: other processes open the same storage with it.
        storage: The folder itself; for s3 this machine's copy of what it needed.
        store: Notes, leases and signs of life.
        fences: Job to the token this process writes under; a job without one is not fenced.

    Raises:
        StorageError: it can be no storage.
    """

    def __init__(self, storage: str | Path) -> None:
        self.store: Store = open_store(storage)
        self.url = self.store.url
        self._states: FolderStates = open_states(self.store)
        self.storage = self._states.folder
        self.fences: dict[str, int] = {}

    def work_folder(self, job_id: str) -> Path:
        """Folder of a stage run under way: spool, log and sealed in-stage checkpoints."""
        return self._states.work_folder(checked(job_id))

    def writing_folder(self, job_id: str) -> Path:
        """Folder for what this writer has not sealed yet; it is made here.

        Raises:
            StorageError: it cannot be made.
        """
        folder = self._writing(job_id)
        with storage_errors(folder):
            make_folder(folder)
        return folder

    def _writing(self, job_id: str) -> Path:
        return self.work_folder(job_id) / f".writing-{self._token(job_id)}"

    def _token(self, job_id: str) -> int:
        return self.fences.get(job_id, 0)

    def begin(self, job_id: str) -> None:
        """Clears away what earlier writers of a stage run left unsealed; one rank calls it before any writes.

        Raises:
            StaleWriterError: another driver has taken the job over.
        """
        self.check_fence(job_id)
        token = self._token(job_id)
        for name in names_in(self.work_folder(job_id)):
            if name.startswith(".writing-") and token_in(Path(name)) <= token:
                shutil.rmtree(self.work_folder(job_id) / name, ignore_errors=True)
        self._states.begin(job_id, token)

    def is_begun(self, job_id: str) -> bool:
        """True where a stage run is under way."""
        return self._states.is_begun(checked(job_id))

    def tell(self, job_id: str) -> None:
        """Shows others what an attempt told so far (metrics, logs); its last checkpoint or its commit did so before.

        Raises:
            StaleWriterError: another driver has taken the job over.
            StorageError: the storage cannot be written.
        """
        self.check_fence(job_id)
        self._states.tell(checked(job_id))

    def end_work(self, job_id: str) -> None:
        """Takes the work folder of a job that leaves no state away.

        Raises:
            StorageError: the storage cannot be written.
        """
        self._states.end_work(checked(job_id), self._token(job_id))

    def snapshot(self) -> AbstractContextManager[None]:
        """Within it, questions about many jobs may be answered as things were at its begin: for plans and tables.

        Raises:
            StorageError: the storage cannot be read.
        """
        return self._states.snapshot()

    def check_fence(self, job_id: str) -> None:
        """Asks whether this process may still write for a job.

        Raises:
            StaleWriterError: a higher token was given out: another driver has taken the job over.
        """
        token = self.fences.get(job_id)
        if token is not None and (newest := token_of(self.store, job_id)) > token:
            raise StaleWriterError(
                f"{self.url}: job {job_id} was taken over by another driver (token {newest}, this one has {token}) "
                "because this process showed no sign of life for long; the other driver's work counts"
            )

    def share(self, folder: Path) -> None:
        """Hands over what this machine wrote into an unsealed folder; one rank of each machine calls it before a seal.

        Raises:
            StorageError: the storage cannot be written.
        """
        self._states.share(folder)

    def seal_checkpoint(self, job_id: str, step: int, folder: Path) -> Path:
        """Seals an in-stage checkpoint: manifest last, then one rename. The one before it stays, older ones go.

        Args:
            step: Steps of the phase it is after.
            folder: Where it was written, below `writing_folder`.

        Returns:
            Where it is now.

        Raises:
            StaleWriterError: another driver has taken the job over; readers see no change.
            StorageError: the disk is full.
        """
        self.check_fence(job_id)
        self._states.write_manifest(folder)
        self.check_fence(job_id)  # reading all bytes took its time
        sealed = self._states.seal_checkpoint(checked(job_id), step, folder)
        self.check_fence(job_id)  # who lost its lease takes nothing of the new holder's away
        self._states.prune(job_id, step, _KEPT_CHECKPOINTS, self._token(job_id))
        return sealed

    def checkpoints(self, job_id: str) -> list[Path]:
        """Checkpoints inside a stage run under way, newest first; a damaged or unfinished one is left out."""
        return list(self._states.checkpoints(checked(job_id)))

    def checkpoint_steps(self, job_id: str) -> list[int]:
        """Steps of the checkpoints inside a stage run under way, newest first, whole or not."""
        return self._states.steps(checked(job_id))

    def last_checkpoint(self, job_id: str) -> Path | None:
        """The newest whole checkpoint inside a stage run under way; a damaged one falls back to the one before."""
        return next(self._states.checkpoints(checked(job_id)), None)

    def bring_checkpoint(self, job_id: str, name: str) -> Path:
        """An in-stage checkpoint, found whole on another machine, on this one.

        Raises:
            StorageError: the storage cannot be read.
        """
        folder = self.work_folder(job_id) / name
        self._states.bring_checkpoint(folder)
        return folder
