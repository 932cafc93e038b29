"""Where finished states and sealed in-stage checkpoints lie: a folder, each state through one rename."""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import StorageError
from orchestrator.plan.identity import digest
from orchestrator.plan.jobs import Keep
from orchestrator.plan.ledger.files import (
    MANIFEST,
    Listings,
    changed_files,
    cut_files,
    damaged_files,
    fsync_folder,
    is_there,
    make_folder,
    missing_files,
    names_in,
    read_manifest,
    stat_of,
    storage_errors,
    write_json,
    write_manifest,
)

Part = Literal["weights", "checkpoint"]
PARTS: tuple[Part, ...] = ("weights", "checkpoint")
PARTS_OF: dict[Keep, tuple[Part, ...]] = {"none": (), "weights": ("weights",), "full": ("weights", "checkpoint")}
"""Parts of a state that stay, from least to most."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_STEP = re.compile(r"step_([0-9]+)")
_WRITING = re.compile(r"\.?writing-([0-9]+)")
_ASIDE = re.compile(r"\.([A-Za-z0-9_-]{1,128})\.[0-9a-f]{12}\.aside")
_LOG = re.compile(r"log(_rank.*)?\.txt")
Files = dict[str, dict[str, Any]]
"""Name of a file to its size in bytes and its SHA-256."""


class FolderStates:
    """Finished states and in-stage checkpoints of a storage that is a folder, local or NFS.

    A storage of another kind keeps a copy of what it needs in such a folder and says what travels when: it extends
    these methods. Nothing here knows of fences; `Ledger` checks them.

    Args:
        folder: The storage, or the local copy of one.
        listings: Names in its folders, shared with who reads other ones of them.
    """

    def __init__(self, folder: Path, listings: Listings | None = None) -> None:
        self.folder = folder
        self.listings = listings or Listings()
        self._base = str(folder)  # text: a plan of 10,000 cells asks 200,000 times for what is not there
        self._seen: dict[str, tuple[tuple[int, ...], frozenset[str], bool]] = {}

    def state_folder(self, state: str) -> Path:
        """Return the folder of a finished state on this machine."""
        return self.folder / "stage_runs" / state

    def work_folder(self, job_id: str) -> Path:
        """Return the folder of a stage run under way on this machine."""
        return self.folder / "work" / job_id

    def names(self) -> list[str]:
        """Return all states, whole or not, sorted."""
        return [name for name in names_in(f"{self._base}/stage_runs") if _ID.fullmatch(name)]

    def is_whole(self, state: str) -> bool:
        """Return True where no file of a state is missing or cut short; contents are not read."""
        return self._look(state)[1]

    def has(self, state: str, part: Part) -> bool:
        """Return True where a finished state has its weights, or its full checkpoint."""
        return part in self._look(state)[0]

    def _look(self, state: str) -> tuple[frozenset[str], bool]:
        """Return what the manifest lists, by first names, and whether all of it is there."""
        folder = f"{self._base}/stage_runs/{state}"
        if self.listings.lacks(f"{self._base}/stage_runs", state):
            return frozenset(), False
        manifest = stat_of(f"{folder}/{MANIFEST}")
        about = stat_of(folder) if manifest is not None else None
        if manifest is None or about is None:
            return frozenset(), False
        # Of a committed folder only the manifest is written again, whole, when a part comes or goes.
        mark = (about.st_ino, about.st_mtime_ns, manifest.st_ino, manifest.st_mtime_ns)
        known = self._seen.get(state)
        if known is not None and known[0] == mark:
            return known[1:]
        files = read_manifest(Path(folder))
        whole = files is not None and not cut_files(Path(folder), files)
        parts = frozenset(name.partition("/")[0] for name in files or ())
        if whole:
            self._seen[state] = mark, parts, whole
        return parts, whole

    def small_file(self, state: str, name: str) -> Path:
        """Return `result.json`, `job.json`, `metrics.jsonl` or `log.txt` of a finished state, on this machine."""
        return self.state_folder(state) / name

    def work_file(self, job_id: str, name: str) -> Path:
        """Return the metrics or log of a stage run under way, on this machine; it need not exist."""
        return self.work_folder(job_id) / name

    def is_begun(self, job_id: str) -> bool:
        """Return True where a stage run is under way."""
        folder = f"{self._base}/work"
        return not self.listings.lacks(folder, job_id) and is_there(f"{folder}/{job_id}")

    def begin(self, job_id: str, token: int) -> None:
        """Hear that a writer of a stage run begins; in a common folder nothing is left of earlier ones."""

    def tell(self, job_id: str) -> None:
        """Show others the metrics and the log of a stage run under way; in a common folder they see them."""

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Within it, questions about many states may be answered as things were at its begin."""
        return self.listings.snapshot()

    def point_to(self, state: str, cell_folder: Path, record: dict[str, Any]) -> None:
        """Show a cell under its name to who looks into the storage; in a common folder its own folder does."""

    def fetch(self, state: str, part: Part) -> list[str]:
        """Bring a part of a finished state to this machine and reads every byte of it.

        Returns:
            Damaged files; the part's name where all of it is missing; empty when it is whole.
        """
        folder, damaged = self.state_folder(state), [MANIFEST]
        for _ in range(2):  # another commit may take its place meanwhile
            known = read_manifest(folder)
            if known is not None:
                wanted = {name: entry for name, entry in known.items() if name.startswith(f"{part}/")}
                damaged = changed_files(folder, wanted) if wanted else [part]
            if not damaged:
                break
        return damaged

    def share(self, folder: Path) -> None:
        """Hand over what this machine wrote into an unsealed folder; in a common folder it is there already."""

    def write_manifest(self, folder: Path) -> None:
        """List all files of an unsealed folder, also other machines', made to last first.

        Raises:
            StorageError: the disk is full or a file cannot be read.
        """
        write_manifest(folder)

    def commit(self, state: str, sealed: Path) -> None:
        """Make a folder with a manifest a finished state; one that is there and whole gets the parts that it lacks.

        Raises:
            StorageError: the folder cannot be written.
        """
        target = self.state_folder(state)
        with storage_errors(self.folder):
            make_folder(target.parent)
            for _ in range(10):
                known = read_manifest(target)
                if known is not None and not cut_files(target, known):
                    return _add_parts(sealed, target, known)
                if take_place(sealed, target):
                    fsync_folder(target.parent)
                    return None
        raise StorageError(f"{target}: other processes keep writing it; stop all but one and run again")

    def end_work(self, job_id: str, token: int) -> None:
        """Move the ranks' logs to the finished state, stacks of a hung attempt among them; the work folder goes."""
        work, state = self.work_folder(job_id), self.state_folder(job_id)
        for name in names_in(work) if is_there(state) else ():
            if _LOG.fullmatch(name):
                with storage_errors(self.folder), contextlib.suppress(FileNotFoundError):
                    (work / name).replace(state / name)
        shutil.rmtree(work, ignore_errors=True)

    def seal_checkpoint(self, job_id: str, step: int, sealed: Path) -> Path:
        """Make a folder with a manifest the in-stage checkpoint after a step.

        Raises:
            StorageError: the folder cannot be written.
        """
        target = self.work_folder(job_id) / f"step_{step:06d}"
        with storage_errors(self.folder):
            if not take_place(sealed, target):
                raise StorageError(f"{target}: another process writes it too; stop all but one and run again")
            fsync_folder(target.parent)
        return target

    def prune(self, job_id: str, step: int, keep: int, token: int) -> None:
        """Of the in-stage checkpoints before a sealed one `keep - 1` stay; later ones were damaged, and go."""
        for other in superseded(self.steps(job_id), step, keep):
            shutil.rmtree(self.work_folder(job_id) / f"step_{other:06d}", ignore_errors=True)

    def steps(self, job_id: str) -> list[int]:
        """Return the steps of the sealed in-stage checkpoints, newest first; they may be damaged."""
        found = (_STEP.fullmatch(name) for name in names_in(self.work_folder(job_id)))
        return sorted((int(fit.group(1)) for fit in found if fit), reverse=True)

    def checkpoints(self, job_id: str) -> Iterator[Path]:
        """In-stage checkpoints on this machine, newest first, every byte read; a damaged one is passed over."""
        for step in self.steps(job_id):
            folder = self.work_folder(job_id) / f"step_{step:06d}"
            if not damaged_files(folder):
                yield folder

    def bring_checkpoint(self, folder: Path) -> None:
        """Bring an in-stage checkpoint that another machine found whole to this one."""

    def discard(self, state: str) -> None:
        """Take a state away.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._seen.pop(state, None)
        target = self.state_folder(state)
        old = _old(target)
        with storage_errors(self.folder), contextlib.suppress(FileNotFoundError):
            target.rename(old)
        shutil.rmtree(old, ignore_errors=True)

    def recover(self, state: str) -> bool:
        """Put a finished state back that a gc took aside, and was killed before it had asked who wants it."""
        target = self.state_folder(state)
        for name in names_in(target.parent):
            aside = target.parent / name
            if fit_aside(name) == state and not is_there(target) and not missing_files(aside):
                with storage_errors(self.folder), contextlib.suppress(FileNotFoundError):
                    aside.rename(target)
                    return True
        return False


def most(*keeps: Keep) -> Keep:
    """Return the one that keeps most."""
    return max(keeps, key=list(PARTS_OF).index)


def checked(name: str) -> str:
    """Return an identity as it is.

    Raises:
        StorageError: it is none, and could leave the storage.
    """
    if not _ID.fullmatch(name):
        raise StorageError(f"{name!r} is no identity of the ledger")
    return name


def token_in(folder: Path) -> int:
    """Return token under which an unsealed folder is written: it stands in its name `.writing-TOKEN`, or a parent's."""
    fits = (_WRITING.fullmatch(part) for part in reversed(folder.parts))
    return next((int(fit.group(1)) for fit in fits if fit), 0)


def superseded(steps: Sequence[int], step: int, keep: int) -> list[int]:
    """Of in-stage checkpoints, newest first, those to take away once the one after `step` is sealed."""
    older = [other for other in steps if other < step]
    return [*older[keep - 1 :], *(later for later in steps if later > step)]


def aside_name(state: str) -> str:
    """Return the name of a state's folder while a gc asks who wants it; `.old` is what nobody does."""
    return f".{state}.{secrets.token_hex(6)}.aside"


def fit_aside(name: str) -> str | None:
    """Return the state whose folder was given this name by a gc."""
    fit = _ASIDE.fullmatch(name)
    return fit.group(1) if fit else None


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")


def _add_parts(sealed: Path, target: Path, known: Files) -> None:
    """Move the parts that a whole state lacks into it, and lists them last: it is whole at every moment."""
    new = read_manifest(sealed) or {}
    lacks = [part for part in PARTS if _lists(new, part) and not _lists(known, part)]
    for part in lacks:
        old = _old(target / part)  # what a killed writer moved and did not list
        with contextlib.suppress(FileNotFoundError):
            (target / part).rename(old)
        shutil.rmtree(old, ignore_errors=True)
        (sealed / part).rename(target / part)
    if lacks:
        fsync_folder(target)
        files = known | {name: entry for name, entry in new.items() if name.partition("/")[0] in lacks}
        write_json(target / MANIFEST, {"files": files, "sha256": digest(files)})


def _lists(files: Files, part: str) -> bool:
    return any(name.startswith(f"{part}/") for name in files)


def take_place(sealed: Path, target: Path) -> bool:
    """Rename a folder to its place, over a damaged one that was there; False where another writer was quicker."""
    old, whole = _old(target), read_manifest(sealed)
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    try:
        sealed.rename(target)
    except OSError as error:
        # A file server whose answer was lost is asked again by the system: then the folder is in its place.
        if error.errno == errno.ENOENT and not is_there(sealed) and None is not whole == read_manifest(target):
            return True
        with contextlib.suppress(OSError):
            old.rename(target)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    finally:
        shutil.rmtree(old, ignore_errors=True)
    return True
