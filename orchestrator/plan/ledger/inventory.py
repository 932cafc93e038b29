"""What lies in a storage, whole or not, reached or not: sizes, every byte's check, and how a thing is taken away."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from orchestrator.plan.identity import digest
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import (
    MANIFEST,
    damaged_files,
    files_below,
    names_in,
    read_manifest,
    stat_of,
    storage_errors,
    write_json,
)
from orchestrator.plan.ledger.states import Files, aside_name, fit_aside

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_STEP = re.compile(r"step_([0-9]+)")
_NOTES = ("evaluations", "experiments", "failures", "leases", "owners", "predictions", "searches")


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
        """Return all states, whole or not, sorted."""
        ...

    def files(self, state: str) -> Files | None:
        """Return the name to size in bytes and SHA-256; None where the manifest is missing or damaged."""
        ...

    def when(self, state: str) -> float | None:
        """Return the seconds since the epoch when a state was finished, where that is known."""
        ...

    def damaged(self, state: str) -> list[str]:
        """Return the files of a state that are missing, cut short or changed: every byte is read."""
        ...

    def work(self) -> dict[str, int]:
        """Return the stage runs under way to the bytes they take."""
        ...

    def steps(self, job: str) -> dict[int, Callable[[], list[str]]]:
        """Return the sealed in-stage checkpoints, each with what reads every byte of it and tells the damaged files."""
        ...

    def take_out(self, state: str, is_wanted: Callable[[], bool]) -> bool:
        """Take a state away, unless it is wanted once nobody can find it any more: then it comes back."""
        ...

    def aside(self) -> list[str]:
        """Return the states that a gc had taken aside when it was killed: `Ledger.recover` puts one back."""
        ...

    def drop(self, state: str, part: str) -> None:
        """Take `weights` or `checkpoint` out of a finished state."""
        ...

    def end_work(self, job: str) -> None:
        """Take a stage run's sealed and unsealed files away."""
        ...

    def drop_step(self, job: str, step: int) -> None:
        """Take one in-stage checkpoint away."""
        ...

    def leftovers(self, is_held: Callable[[str], bool], older_seconds: float) -> Iterator[Leftover]:
        """Return what dead writers left unsealed.

        Args:
            is_held: Whether a living driver works on a job.
            older_seconds: What changed since is left alone: its writer may hold no lease.
        """
        ...


class FolderInventory:
    """The inventory of a storage that is a folder."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._base = ledger, ledger.storage
        self._runs, self._work = self._base / "stage_runs", self._base / "work"

    def states(self) -> list[str]:
        """Return all states, whole or not, sorted."""
        return [name for name in _names(self._runs) if _ID.fullmatch(name)]

    def files(self, state: str) -> Files | None:
        """Return the name to size in bytes and SHA-256; None where the manifest is missing or damaged."""
        return read_manifest(self._runs / state)

    def when(self, state: str) -> float | None:
        """Return when the manifest was written."""
        about = stat_of(self._runs / state / MANIFEST)
        return about.st_mtime if about is not None else None

    def damaged(self, state: str) -> list[str]:
        """Return the files of a state that are missing, cut short or changed: every byte is read."""
        return damaged_files(self._runs / state)

    def work(self) -> dict[str, int]:
        """Return the stage runs under way to the bytes they take."""
        return {name: _size(self._work / name) for name in _names(self._work) if _ID.fullmatch(name)}

    def steps(self, job: str) -> dict[int, Callable[[], list[str]]]:
        """Return the sealed in-stage checkpoints, each with what reads every byte of it and tells the damaged files."""
        fits = (_STEP.fullmatch(name) for name in _names(self._work / job))
        return {int(fit[1]): _checker(self._work / job / fit[0]) for fit in fits if fit}

    def take_out(self, state: str, is_wanted: Callable[[], bool]) -> bool:
        """Rename a state aside, ask once more, and put it back or remove it."""
        target = self._runs / state
        aside = target.with_name(aside_name(state))
        with storage_errors(self._runs):
            try:
                target.rename(aside)
            except FileNotFoundError:
                return False
            if is_wanted():
                with contextlib.suppress(OSError):  # trained again meanwhile: then that one counts
                    aside.rename(target)
                    return False
            old = aside.with_suffix(".old")  # by this name nobody puts it back
            with contextlib.suppress(FileNotFoundError):
                aside.rename(old)
        shutil.rmtree(old, ignore_errors=True)
        return True

    def aside(self) -> list[str]:
        """Return the states that a gc had taken aside when it was killed: `Ledger.recover` puts one back."""
        return sorted({state for name in names_in(self._runs) if (state := fit_aside(name)) is not None})

    def drop(self, state: str, part: str) -> None:
        """Return the manifest forgets the part before its files go, so that the state is whole at every moment."""
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
        """Take a stage run's folder away; the logs of a finished one go where its others are."""
        self._ledger.end_work(job)

    def drop_step(self, job: str, step: int) -> None:
        """Take one in-stage checkpoint away."""
        shutil.rmtree(self._work / job / f"step_{step:06d}", ignore_errors=True)

    def leftovers(self, is_held: Callable[[str], bool], older_seconds: float) -> Iterator[Leftover]:
        """Hidden folders and files of dead writers: beside the states, in work folders, beside the notes."""
        places = [self._runs, *(self._work / job for job in self.work() if not is_held(job))]
        places += [folder for note in _NOTES for folder in _folders(self._base / note)]
        places += [self._runs / state for state in self.states()]  # parts that were moved aside
        for place in places:
            for name in names_in(place):
                path = place / name
                if name.startswith(".") and time.time() - _changed(path) >= older_seconds:
                    what = path.relative_to(self._base).as_posix()
                    yield Leftover(what, _size(path), remover(path), partial(_changed, path))


def _checker(folder: Path) -> Callable[[], list[str]]:
    return lambda: damaged_files(folder)


def remover(path: Path) -> Callable[[], None]:
    """Take a file or a folder away, once it is called."""

    def remove() -> None:
        about = stat_of(path)
        if about is not None and stat.S_ISDIR(about.st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    return remove


def _names(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if not name.startswith(".")]


def _folders(folder: Path) -> list[Path]:
    """Return a folder and all below it."""
    return [path for path, about in files_below(folder) if stat.S_ISDIR(about.st_mode)]


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    return sum(about.st_size for _, about in files_below(path) if not stat.S_ISDIR(about.st_mode))


def _changed(path: Path) -> float:
    """Return when anything of a file or folder was last touched, renamed included."""
    return max((about.st_ctime for _, about in files_below(path)), default=0.0)
