"""Backend: what a storage can do, be it a folder or a bucket; ids, parts and patterns of its layout."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import StorageError
from orchestrator.plan.jobs import Keep
from orchestrator.plan.ledger.files import Files

Part = Literal["weights", "checkpoint"]
PARTS: tuple[Part, ...] = ("weights", "checkpoint")
PARTS_OF: dict[Keep, tuple[Part, ...]] = {"none": (), "weights": ("weights",), "full": ("weights", "checkpoint")}
"""Parts of a state that stay, from least to most."""
ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_WRITING = re.compile(r"\.?writing-([0-9]+)")
_LEASE = re.compile(r"([0-9]{6,})\.json")


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


class Backend(ABC):
    """One storage: small values by key, finished states, stage runs under way, and what can be deleted.

    Safe between processes and machines. Nothing here knows of fences; `Ledger` checks them. Every method raises
    StorageError where the storage cannot be read or written, or its disk is full.

    Attributes:
        url: What names it: a folder's absolute path or `s3://bucket/prefix`.
        folder: The folder itself; of a bucket this machine's copy of what was needed.
    """

    url: str
    folder: Path

    # Small values under keys such as `failures/ID.json`, each complete or absent ------------------------------------

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Return a value; None where there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write a value; readers see the old one or the new one, and the last writer wins."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write a value if there is none; of several writers at once exactly one gets True."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete a value; it need not be there."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """Return the names directly below a prefix, sorted; empty where there are none."""

    def lease_numbers(self, name: str) -> list[int]:
        """Return the numbers of a name's lease files, sorted."""
        fits = (_LEASE.fullmatch(found) for found in self.names(f"leases/{checked(name)}"))
        return sorted(int(fit.group(1)) for fit in fits if fit)

    def token_of(self, name: str) -> int:
        """Return the highest token given out for a job, 0 if none: a writer under a lower one has lost its lease."""
        return max(self.lease_numbers(name), default=0)

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[None]:
        """Within it, questions about many states may be answered as things were at its begin."""

    # Finished states -----------------------------------------------------------------------------------------------

    def state_folder(self, state: str) -> Path:
        """Return the folder of a finished state on this machine."""
        return self.folder / "stage_runs" / state

    @abstractmethod
    def states(self) -> list[str]:
        """Return all states, complete or not, sorted."""

    @abstractmethod
    def is_complete(self, state: str) -> bool:
        """Return True where no file of a state is missing or cut short; contents are not read."""

    @abstractmethod
    def has(self, state: str, part: Part) -> bool:
        """Return True where a finished state has its weights, or its full checkpoint."""

    @abstractmethod
    def fetch(self, state: str, part: Part) -> list[str]:
        """Download a part of a finished state to this machine where needed, and read every byte of it.

        Returns:
            Damaged files; the part's name where all of it is missing; empty when it is complete.
        """

    @abstractmethod
    def small_file(self, state: str, name: str) -> Path:
        """Return where a finished state's result, job, metrics or log is on this machine; the file need not exist."""

    @abstractmethod
    def write_manifest(self, folder: Path, known: Files) -> None:
        """List all files of an unsealed folder, also other machines', each flushed to disk first.

        Args:
            folder: Holds the files.
            known: Entries of those that their writers flushed and hashed.
        """

    @abstractmethod
    def commit(self, state: str, sealed: Path) -> None:
        """Make a folder with a manifest a finished state; a complete one that is there gets the parts that it lacks."""

    @abstractmethod
    def discard(self, state: str) -> None:
        """Delete a state; readers see all of it or none."""

    @abstractmethod
    def recover(self, state: str) -> bool:
        """Put a state back that a gc took aside, and was killed before it had asked who wants it."""

    def point_to(self, state: str, cell_folder: Path, record: dict[str, Any]) -> None:  # noqa: B027 (a folder has nothing to do)
        """Show a cell under its name to who looks into a bucket; in a shared folder its own folder does."""

    # Stage runs under way ------------------------------------------------------------------------------------------

    def work_folder(self, job_id: str) -> Path:
        """Return the folder of a stage run under way on this machine."""
        return self.folder / "work" / job_id

    @abstractmethod
    def work_file(self, job_id: str, name: str) -> Path:
        """Return the metrics or log of a stage run under way on this machine; it need not exist."""

    @abstractmethod
    def is_begun(self, job_id: str) -> bool:
        """Return True where a stage run is under way."""

    def begin(self, job_id: str, token: int) -> None:  # noqa: B027 (a folder has nothing to do)
        """Forget what machines of earlier attempts shared; in a shared folder nothing is left of them."""

    def share_progress(self, job_id: str) -> None:  # noqa: B027 (a folder has nothing to do)
        """Show others the metrics and the log of a stage run under way; in a shared folder they see them."""

    def share(self, folder: Path, known: Files) -> None:  # noqa: B027 (a folder has nothing to do)
        """Hand over what this machine wrote into an unsealed folder; a shared folder has it already.

        Args:
            folder: Holds the files.
            known: Entries of those that their writers hashed, also other machines'.
        """

    @abstractmethod
    def seal_checkpoint(self, job_id: str, step: int, sealed: Path) -> Path:
        """Make a folder with a manifest the in-stage checkpoint after a step; return where it is now."""

    @abstractmethod
    def prune(self, job_id: str, step: int, keep: int, token: int) -> None:
        """Keep `keep - 1` of the in-stage checkpoints before a sealed one; later ones were damaged, and go."""

    @abstractmethod
    def steps(self, job_id: str) -> list[int]:
        """Return the steps of the sealed in-stage checkpoints, newest first; they may be damaged."""

    @abstractmethod
    def checkpoints(self, job_id: str) -> Iterator[Path]:
        """Yield the in-stage checkpoints on this machine, newest first, every byte read; damaged ones are skipped."""

    def download_checkpoint(self, folder: Path) -> None:  # noqa: B027 (a folder has nothing to do)
        """Download an in-stage checkpoint that another machine found complete to this one."""

    @abstractmethod
    def end_work(self, job_id: str, token: int | None = None) -> None:
        """Delete the work folder and its unsealed files; the logs stay with the finished state.

        Args:
            token: The writer's; None for a gc, which works for nobody.
        """

    # What can be verified and deleted ---------------------------------------------------------------------------

    @abstractmethod
    def files(self, state: str) -> Files | None:
        """Return the name to size in bytes and SHA-256; None where the manifest is missing or damaged."""

    @abstractmethod
    def when(self, state: str) -> float | None:
        """Return the seconds since the epoch when a state was finished, where that is known."""

    @abstractmethod
    def damaged(self, state: str) -> list[str]:
        """Return the files of a state that are missing, cut short or changed: every byte is read."""

    @abstractmethod
    def damaged_step(self, job: str, step: int) -> list[str]:
        """Return the damaged files of an in-stage checkpoint: every byte is read."""

    @abstractmethod
    def work(self) -> dict[str, int]:
        """Return the stage runs under way to the bytes they take."""

    @abstractmethod
    def take_out(self, state: str, is_wanted: Callable[[], bool]) -> bool:
        """Delete a state, unless it is wanted once nobody can find it any more: then it comes back."""

    @abstractmethod
    def aside(self) -> list[str]:
        """Return the states that a gc had taken aside when it was killed: `recover` puts one back."""

    @abstractmethod
    def drop(self, state: str, part: Part) -> None:
        """Delete a part of a finished state; the manifest forgets it first, so that the state is always complete."""

    @abstractmethod
    def drop_step(self, job: str, step: int) -> None:
        """Delete one in-stage checkpoint."""

    @abstractmethod
    def leftovers(self, is_held: Callable[[str], bool], older_seconds: float) -> Iterator[Leftover]:
        """Yield what dead writers left unsealed.

        Args:
            is_held: Whether a living driver works on a job.
            older_seconds: What changed since is left alone: its writer may hold no lease.
        """


def checked(name: str) -> str:
    """Return an identity as it is.

    Raises:
        StorageError: it is none, and could leave the storage.
    """
    if not ID.fullmatch(name):
        raise StorageError(f"{name!r} is no identity and can name no lease: letters, digits, _ and - only, at most 128")
    return name


def most(*keeps: Keep) -> Keep:
    """Return the one that keeps most."""
    return max(keeps, key=list(PARTS_OF).index)


def files_of(part: Part, files: Files) -> Files:
    """Return those of a manifest's files that belong to a part."""
    return {name: entry for name, entry in files.items() if name.startswith(f"{part}/")}


def without(part: Part, files: Files) -> Files:
    """Return a manifest's files without those of a part."""
    return {name: entry for name, entry in files.items() if not name.startswith(f"{part}/")}


def token_in(folder: Path) -> int:
    """Return the token under which an unsealed folder is written, from its name `.writing-TOKEN` or a parent's."""
    fits = (_WRITING.fullmatch(part) for part in reversed(folder.parts))
    return next((int(fit.group(1)) for fit in fits if fit), 0)


def step_name(step: int) -> str:
    """Return the name of an in-stage checkpoint."""
    return f"step_{step:06d}"


def steps_in(names: Sequence[str]) -> list[int]:
    """Return the steps of the in-stage checkpoints (folders or manifests) among names, newest first."""
    fits = (re.fullmatch(r"step_([0-9]+)(\.json)?", name) for name in names)
    return sorted((int(fit.group(1)) for fit in fits if fit), reverse=True)


def superseded(steps: Sequence[int], step: int, keep: int) -> list[int]:
    """Return those of the in-stage checkpoints, newest first, that go once the one after `step` is sealed."""
    older = [other for other in steps if other < step]
    return [*older[keep - 1 :], *(later for later in steps if later > step)]
