"""Where finished states and sealed in-stage checkpoints lie: a folder, each state through one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import StorageError
from orchestrator.plan.ledger import storage
from orchestrator.plan.ledger.storage import changed_files, damaged_files, missing_files, read_manifest, storage_errors
from orchestrator.plan.ledger.store import Store

Part = Literal["weights", "checkpoint"]
PARTS: tuple[Part, ...] = ("weights", "checkpoint")
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_STEP = re.compile(r"step_([0-9]+)")
_WEIGHTS = "weights/model.safetensors"


class FolderStates:
    """Finished states and in-stage checkpoints of a storage that is a folder, local or NFS.

    A storage of another kind keeps a copy of what it needs in such a folder and says what travels when: it extends
    these methods. Nothing here knows of fences; `Ledger` checks them.

    Args:
        folder: The storage, or the local copy of one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._base = str(folder)  # text: a plan of 10,000 cells asks 200,000 times for what is not there
        self._whole: dict[str, tuple[int, int]] = {}

    def state_folder(self, state: str) -> Path:
        """Folder of a finished state on this machine."""
        return self.folder / "stage_runs" / state

    def work_folder(self, job_id: str) -> Path:
        """Folder of a stage run under way on this machine."""
        return self.folder / "work" / job_id

    def names(self) -> list[str]:
        """All states, whole or not, sorted."""
        try:
            return sorted(name for name in os.listdir(f"{self._base}/stage_runs") if _ID.fullmatch(name))
        except OSError:
            return []

    def is_whole(self, state: str) -> bool:
        """True where no file of a state is missing or cut short; contents are not read."""
        try:
            about = os.stat(f"{self._base}/stage_runs/{state}")
        except OSError:
            return False
        # A committed folder does not change: it is taken away, or another takes its place.
        mark = (about.st_ino, about.st_mtime_ns)
        if self._whole.get(state) == mark:
            return True
        if missing_files(self.state_folder(state)):
            return False
        self._whole[state] = mark
        return True

    def has(self, state: str, part: Part) -> bool:
        """True where a finished state has its weights, or its full checkpoint."""
        folder = self.state_folder(state)
        return (folder / "checkpoint").is_dir() if part == "checkpoint" else (folder / _WEIGHTS).is_file()

    def small_file(self, state: str, name: str) -> Path:
        """`result.json`, `job.json`, `metrics.jsonl` or `log.txt` of a finished state, on this machine."""
        return self.state_folder(state) / name

    def work_file(self, job_id: str, name: str) -> Path:
        """Metrics or log of a stage run under way, on this machine; it need not exist."""
        return self.work_folder(job_id) / name

    def is_begun(self, job_id: str) -> bool:
        """True where a stage run is under way."""
        return os.path.isdir(f"{self._base}/work/{job_id}")

    def begin(self, job_id: str) -> None:
        """Hears that a writer of a stage run begins; in a common folder nothing is left of earlier ones."""

    def tell(self, job_id: str) -> None:
        """Shows others the metrics and the log of a stage run under way; in a common folder they see them."""

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Within it, questions about many states may be answered as things were at its begin."""
        return contextlib.nullcontext()

    def point_to(self, state: str, cell_folder: Path, record: dict[str, Any]) -> None:
        """Shows a cell under its name to who looks into the storage; in a common folder its own folder does."""

    def fetch(self, state: str, part: Part) -> list[str]:
        """Brings a part of a finished state to this machine and reads every byte of it.

        Returns:
            Damaged files; the part's name where all of it is missing; empty when it is whole.
        """
        folder, damaged = self.state_folder(state), [storage.MANIFEST]
        for _ in range(2):  # another commit may take its place meanwhile
            known = read_manifest(folder)
            if known is not None:
                wanted = {name: entry for name, entry in known.items() if name.startswith(f"{part}/")}
                damaged = changed_files(folder, wanted) if wanted else [part]
            if not damaged:
                break
        return damaged

    def share(self, folder: Path) -> None:
        """Hands over what this machine wrote into an unsealed folder; in a common folder it is there already."""

    def write_manifest(self, folder: Path) -> None:
        """Lists all files of an unsealed folder, also other machines', made to last first.

        Raises:
            StorageError: the disk is full or a file cannot be read.
        """
        storage.write_manifest(folder)

    def commit(self, state: str, sealed: Path) -> None:
        """Makes a folder with a manifest a finished state, unless there is a whole one that holds as much.

        Raises:
            StorageError: the folder cannot be written.
        """
        target = self.state_folder(state)
        with storage_errors(self.folder):
            target.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(10):
                lacks = [part for part in PARTS if (sealed / part).exists() and not self.has(state, part)]
                if not lacks and not missing_files(target):
                    return
                if take_place(sealed, target):
                    storage.fsync_folder(target.parent)
                    return
        raise StorageError(f"{target}: other processes keep writing it; stop all but one and run again")

    def end_work(self, job_id: str) -> None:
        """Moves the ranks' logs to the finished state, stacks of a hung attempt among them; the work folder goes."""
        work = self.work_folder(job_id)
        with storage_errors(self.folder), contextlib.suppress(FileNotFoundError):
            for log in [work / "log.txt", *work.glob("log_rank*.txt")]:
                log.replace(self.state_folder(job_id) / log.name)
        shutil.rmtree(work, ignore_errors=True)

    def seal_checkpoint(self, job_id: str, step: int, sealed: Path, keep: int) -> Path:
        """Makes a folder with a manifest the in-stage checkpoint after a step; of those before it `keep - 1` stay.

        Raises:
            StorageError: the folder cannot be written.
        """
        target = self.work_folder(job_id) / f"step_{step:06d}"
        with storage_errors(self.folder):
            if not take_place(sealed, target):
                raise StorageError(f"{target}: another process writes it too; stop all but one and run again")
            storage.fsync_folder(target.parent)
        steps = self.steps(job_id)
        older = [other for other in steps if other < step]
        for other in [*older[keep - 1 :], *(later for later in steps if later > step)]:  # later ones were damaged
            shutil.rmtree(self.work_folder(job_id) / f"step_{other:06d}", ignore_errors=True)
        return target

    def steps(self, job_id: str) -> list[int]:
        """Steps of the sealed in-stage checkpoints, newest first; they may be damaged."""
        try:
            found = (_STEP.fullmatch(name) for name in os.listdir(self.work_folder(job_id)))
        except OSError:
            return []
        return sorted((int(fit.group(1)) for fit in found if fit), reverse=True)

    def checkpoints(self, job_id: str) -> Iterator[Path]:
        """In-stage checkpoints on this machine, newest first, every byte read; a damaged one is passed over."""
        for step in self.steps(job_id):
            folder = self.work_folder(job_id) / f"step_{step:06d}"
            if not damaged_files(folder):
                yield folder

    def bring_checkpoint(self, folder: Path) -> None:
        """Brings an in-stage checkpoint that another machine found whole to this one."""

    def discard(self, state: str) -> None:
        """Takes a state away.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._whole.pop(state, None)
        target = self.state_folder(state)
        old = _aside(target)
        with storage_errors(self.folder), contextlib.suppress(FileNotFoundError):
            target.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def checked(name: str) -> str:
    """An identity as it is.

    Raises:
        StorageError: it is none, and could leave the storage.
    """
    if not _ID.fullmatch(name):
        raise StorageError(f"{name!r} is no identity of the ledger")
    return name


def open_states(store: Store) -> FolderStates:
    """The states of a storage.

    Raises:
        StorageError: a file stands where the folder should be.
    """
    if store.url.startswith("s3://"):
        from orchestrator.plan.ledger.states_s3 import S3States

        return S3States(store)
    folder = Path(store.url)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder}: is a file; cluster.storage_path names a folder")
    return FolderStates(folder)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")


def take_place(sealed: Path, target: Path) -> bool:
    """Renames a folder to its place, over what was there; False where another writer was quicker."""
    old = _aside(target)
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    try:
        sealed.rename(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            old.rename(target)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    finally:
        shutil.rmtree(old, ignore_errors=True)
    return True
