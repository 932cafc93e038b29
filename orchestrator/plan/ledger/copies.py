"""This machine's copies of buckets (`~/.cache/llavolta/ledger`): what lies there and when it was last of use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.plan.identity import cache_folder
from orchestrator.plan.ledger.files import files_below, names_in


@dataclass(frozen=True)
class Copy:
    """One state's files, one stage run's, or one small value, which the bucket has or had.

    Attributes:
        storage: Folder of all copies of one bucket's storage.
        kind: `stage_runs`, `work`, `elsewhere` or `etags`.
        used: When it was last written or fetched, by this machine's clock.
    """

    storage: Path
    kind: str
    name: str
    path: Path
    size: int
    used: float


def copies_folder() -> Path:
    """Return where all copies are."""
    return cache_folder() / "ledger"


def mark_used(folder: Path) -> None:
    """Note that a copy was asked for; where that cannot be noted it may be brought again some day."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def copies() -> Iterator[Copy]:
    """Return all copies on this machine, of whatever bucket.

    Raises:
        StorageError: a folder cannot be read.
    """
    base = copies_folder()
    for storage in names_in(base):
        for kind in ("stage_runs", "work", "elsewhere", "etags"):
            for name in names_in(base / storage / kind):
                path = base / storage / kind / name
                found = list(files_below(path))
                if found:
                    size = sum(about.st_size for _, about in found)
                    yield Copy(base / storage, kind, name, path, size, max(about.st_mtime for _, about in found))
