"""What lies in a storage, whole or not, reached or not: sizes, every byte's check, and how a thing is taken away."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from orchestrator.plan.identity import digest
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.storage import (
    MANIFEST,
    damaged_files,
    read_manifest,
    storage_errors,
    write_json,
)

Files = dict[str, dict[str, Any]]
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_STEP = re.compile(r"step_([0-9]+)")
_NOTES = ("evaluations", "experiments", "failures", "leases", "owners", "searches")


@dataclass(frozen=True)
class Leftover:
    """Something that nobody will use.

    Attributes:
        what: For people.
        size: Bytes.
        remove: Takes it away; harmless where it is gone already.
        changed: When anything of it was last touched by its file system's clock, renamed included; 0 is not known.
    """

    what: str
    size: int
    remove: Callable[[], None]
    changed: Callable[[], float] = lambda: 0.0


class Inventory(Protocol):
    """The states and the work under way of one storage."""

    def states(self) -> list[str]:
        """All states, whole or not, sorted."""
        ...

    def files(self, state: str) -> Files | None:
        """Name to size in bytes and SHA-256; None where the manifest is missing or damaged."""
        ...

    def when(self, state: str) -> float | None:
        """Seconds since the epoch when a state was finished, where that is known."""
        ...

    def damaged(self, state: str) -> list[str]:
        """Files of a state that are missing, cut short or changed: every byte is read."""
        ...

    def work(self) -> dict[str, int]:
        """Stage runs under way to the bytes they take."""
        ...

    def steps(self, job: str) -> dict[int, Callable[[], list[str]]]:
        """Sealed in-stage checkpoints, each with what reads every byte of it and tells the damaged files."""
        ...

    def take_out(self, state: str, is_wanted: Callable[[], bool]) -> bool:
        """Takes a state away, unless it is wanted once nobody can find it any more: then it comes back."""
        ...

    def drop(self, state: str, part: str) -> None:
        """Takes `weights` or `checkpoint` out of a finished state."""
        ...

    def end_work(self, job: str) -> None:
        """Takes a stage run's sealed and unsealed files away."""
        ...

    def drop_step(self, job: str, step: int) -> None:
        """Takes one in-stage checkpoint away."""
        ...

    def leftovers(self, is_held: Callable[[str], bool], older_seconds: float) -> Iterator[Leftover]:
        """What dead writers left unsealed.

        Args:
            is_held: Whether a living driver works on a job.
            older_seconds: What changed since is left alone: its writer may hold no lease.
        """
        ...


def open_inventory(ledger: Ledger) -> Inventory:
    """The inventory of a ledger's storage."""
    if ledger.url.startswith("s3://"):
        from orchestrator.plan.ledger.inventory_s3 import S3Inventory

        return S3Inventory(ledger)
    return FolderInventory(ledger)


class FolderInventory:
    """The inventory of a storage that is a folder."""

    def __init__(self, ledger: Ledger) -> None:
        self._base = ledger.storage
        self._runs, self._work = self._base / "stage_runs", self._base / "work"

    def states(self) -> list[str]:
        """All states, whole or not, sorted."""
        return [name for name in _names(self._runs) if _ID.fullmatch(name)]

    def files(self, state: str) -> Files | None:
        """Name to size in bytes and SHA-256; None where the manifest is missing or damaged."""
        return read_manifest(self._runs / state)

    def when(self, state: str) -> float | None:
        """When the manifest was written."""
        try:
            return (self._runs / state / MANIFEST).stat().st_mtime
        except OSError:
            return None

    def damaged(self, state: str) -> list[str]:
        """Files of a state that are missing, cut short or changed: every byte is read."""
        return damaged_files(self._runs / state)

    def work(self) -> dict[str, int]:
        """Stage runs under way to the bytes they take."""
        return {name: _size(self._work / name) for name in _names(self._work) if _ID.fullmatch(name)}

    def steps(self, job: str) -> dict[int, Callable[[], list[str]]]:
        """Sealed in-stage checkpoints, each with what reads every byte of it and tells the damaged files."""
        fits = (_STEP.fullmatch(name) for name in _names(self._work / job))
        return {int(fit[1]): _checker(self._work / job / fit[0]) for fit in fits if fit}

    def take_out(self, state: str, is_wanted: Callable[[], bool]) -> bool:
        """Renames a state aside, asks once more, and puts it back or removes it."""
        target = self._runs / state
        aside = target.with_name(f".{state}.{secrets.token_hex(6)}.old")
        with storage_errors(self._runs):
            try:
                target.rename(aside)
            except FileNotFoundError:
                return False
            if is_wanted():
                with contextlib.suppress(OSError):  # trained again meanwhile: then that one counts
                    aside.rename(target)
                    return False
        shutil.rmtree(aside, ignore_errors=True)
        return True

    def drop(self, state: str, part: str) -> None:
        """The manifest forgets the part before its files go, so that the state is whole at every moment."""
        target = self._runs / state
        if (files := read_manifest(target)) is None:
            return
        kept = {name: entry for name, entry in files.items() if not name.startswith(f"{part}/")}
        aside = target / f".{part}.{secrets.token_hex(6)}.old"
        write_json(target / MANIFEST, {"files": kept, "sha256": digest(kept)})
        with storage_errors(self._runs), contextlib.suppress(FileNotFoundError):
            (target / part).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def end_work(self, job: str) -> None:
        """Takes a stage run's folder away."""
        shutil.rmtree(self._work / job, ignore_errors=True)

    def drop_step(self, job: str, step: int) -> None:
        """Takes one in-stage checkpoint away."""
        shutil.rmtree(self._work / job / f"step_{step:06d}", ignore_errors=True)

    def leftovers(self, is_held: Callable[[str], bool], older_seconds: float) -> Iterator[Leftover]:
        """Hidden folders and files of dead writers: beside the states, in work folders, beside the notes."""
        places = [self._runs, *(self._work / job for job in self.work() if not is_held(job))]
        places += [Path(folder) for note in _NOTES for folder, _, _ in os.walk(self._base / note)]
        for place in places:
            for name in _names(place, hidden=True):
                path = place / name
                if name.startswith(".") and time.time() - _changed(path) >= older_seconds:
                    yield Leftover(path.relative_to(self._base).as_posix(), _size(path), _remover(path), partial(_changed, path))


def _checker(folder: Path) -> Callable[[], list[str]]:
    return lambda: damaged_files(folder)


def _remover(path: Path) -> Callable[[], None]:
    def remove() -> None:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    return remove


def _names(folder: Path, hidden: bool = False) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if hidden or not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [Path(base) / name for base, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def _changed(path: Path) -> float:
    """When anything of a file or folder was last touched, renamed included."""
    newest = 0.0
    for file in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            newest = max(newest, file.stat().st_ctime)
    return newest
