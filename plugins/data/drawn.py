"""What data kinds that draw their pictures share: random numbers that are the same everywhere, files in the cache."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from hashlib import shake_256
from pathlib import Path

from orchestrator import plugin
from orchestrator.plan.identity import cache_folder, digest


def random_numbers(count: int, *purpose: object) -> Iterator[int]:
    """Return random numbers of a purpose, 64 bits each: a hash (SHAKE-256).

    Args:
        count: How many there are.
        purpose: What they are drawn for.
    """
    return iter(struct.unpack(f">{count}Q", shake_256(repr(purpose).encode()).digest(8 * count)))


def files_in_cache(
    kind: str, content: str, numbers: Iterable[int], suffix: str, what: str, write: Callable[[Path, int], None]
) -> dict[int, str]:
    """Return the paths of numbered files in the cache.

    Args:
        kind: The data kind.
        content: Digest of what its files hold.
        numbers: Those that are wanted.
        suffix: Of their names.
        what: They, in messages: `its pictures`.
        write: Writes one to a path, unless it is there.

    Raises:
        DataError: they cannot be written.
    """
    folder = cache_folder() / kind / digest([content])[:16]
    paths = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            path = folder / f"{number:06}{suffix}"
            write(path, number)
            paths[number] = str(path)
    except OSError as error:
        raise plugin.DataError(
            f"{kind}: {what} cannot be written to {folder}: {error.strerror or error}; set XDG_CACHE_HOME to a folder "
            "that is writable"
        ) from error
    return paths


def reasons(data: plugin.DataSet) -> list[str]:
    """Return why the rows of a data set cannot be had, if they cannot."""
    try:
        data.rows()
    except plugin.DataError as error:
        return [str(error)]
    return []
