"""What two things must share to be the same: canonical JSON, SHA-256, and digests of files and folders by content."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import math
import os
import re
import stat
import sys
import time
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.plan.io_retry import retry_io

SEMANTICS_VERSION = 2
"""Version of the training semantics; raised when a change of this code moves the numbers of a training run."""

_RACY_SECONDS = 2.0
_MAX_CACHED = 200_000
_BLOCK_BYTES = 1 << 20
_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_DIGEST = re.compile(r"[0-9a-f]{64}")


def _plain(value: Any) -> Any:
    # Exact type first: this runs for every value of every cell.
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        if not math.isfinite(value):
            raise ValueError(f"{value!r} has no canonical form; identities hold finite numbers only")
        return int(value) if value.is_integer() else value
    if kind is dict or isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"keys of an identity are strings, got {[k for k in value if not isinstance(k, str)]}")
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain_rare(value)


def _plain_rare(value: Any) -> Any:
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for base in (bool, int, float, str):  # subclasses such as numpy.float64
        if isinstance(value, base):
            return _plain(base(value))
    raise TypeError(f"a {type(value).__name__} has no canonical form: {value!r}")


def canonical_json(value: Any) -> str:
    """Return one text for one value: sorted keys, no spaces, ASCII, Fractions as `1/4`, floats by `repr`.

    A float that is a whole number is written as an integer, so that 1 and 1.0 are the same value; True is not 1.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value is none of null, bool, number, text, list, mapping with text keys, path, set, enum.
    """
    return _ENCODE(_plain(value))


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, never cached.

    Raises:
        OSError: it cannot be read.
    """

    def read() -> str:
        sha = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                sha.update(block)
        return sha.hexdigest()

    return retry_io(read)


@cache
def source_code(*modules: str) -> str:
    """Return the SHA-256 of loaded modules' source: what is kept of their work is made anew when they change."""
    files = [str(sys.modules[name].__file__) for name in modules]
    return digest([file_sha256(file) for file in files])


class DigestCache:
    """Digests of files by (path, size, mtime, ctime) in one JSON file; a damaged or unwritable file costs only time.

    Args:
        file: Where the cache lies.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._entries: dict[str, list[Any]] | None = None
        self._new: dict[str, list[Any]] = {}

    def of_file(self, path: str) -> str:
        """Return the digest of one file, read only if its size or times changed since it was last read."""
        if self._entries is None:
            self._entries = self._load()
        about = retry_io(lambda: os.stat(path))
        # The time of the last change of its entry, which no copying tool can set, shows a file put in another's place.
        mark = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
        known = self._new.get(path) or self._entries.get(path)
        if known is not None and known[:3] == mark:
            return str(known[3])
        sha = file_sha256(path)
        # A file written a moment ago may be written again within the clock's grain: do not trust its time yet.
        if time.time() - about.st_mtime > _RACY_SECONDS:
            self._new[path] = [*mark, sha]
        return sha

    def save(self) -> None:
        """Write what is new, atomically, over what other processes wrote meanwhile."""
        if not self._new:
            return
        entries = {**self._load(), **self._new}
        self._entries, self._new = entries, {}
        while len(entries) > _MAX_CACHED:
            del entries[next(iter(entries))]
        part = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(entries, separators=(",", ":")))
            part.replace(self.file)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()

    def _load(self) -> dict[str, list[Any]]:
        try:
            found = json.loads(self.file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return {path: e for path, e in found.items() if _is_entry(e)} if isinstance(found, dict) else {}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 4
        and all(isinstance(value, int) for value in entry[:3])
        and isinstance(entry[3], str)
        and _DIGEST.fullmatch(entry[3]) is not None
    )


def cache_folder() -> Path:
    """Return where what can be computed again is kept: `$XDG_CACHE_HOME/llavolta` or `~/.cache/llavolta`.

    Raises:
        UsageError: the environment names no home, and this machine knows none of this user.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return Path(base, "llavolta")
    home = os.path.expanduser("~")
    if home == "~":
        raise UsageError("this user has no home folder; set HOME to a folder that can be written")
    return Path(home, ".cache", "llavolta")


_shared_folder: Path | None = None


def share_caches(folder: Path | None) -> None:
    """Say where this process finds what all nodes share: a folder of the storage; None: `cache_folder()` again."""
    global _shared_folder
    _shared_folder = folder


def shared_cache_folder() -> Path:
    """Return where what can be computed again is kept for all nodes that work on one storage."""
    return _shared_folder or cache_folder()


_caches: dict[Path, DigestCache] = {}


def content_digest(path: str | os.PathLike[str], cache: DigestCache | None = None) -> str:
    """Return the SHA-256 of what a file or folder holds, not of where it lies.

    A folder's digest covers the relative names and contents of all files in it, links to files followed.

    Raises:
        OSError: it does not exist or cannot be read.
    """
    path = os.path.abspath(path)
    if stat.S_ISDIR(retry_io(lambda: os.stat(path)).st_mode):
        # A part of a folder that cannot be listed would pass for one that is not there.
        walk = os.walk(path, onerror=_raise)
        names = [os.path.relpath(os.path.join(folder, name), path) for folder, _, found in walk for name in found]
        return files_digest(path, names, cache)
    cache = cache or _shared_cache()
    try:
        return cache.of_file(path)
    finally:
        cache.save()


def _raise(error: OSError) -> None:
    raise error


def files_digest(folder: str | os.PathLike[str], names: list[str], cache: DigestCache | None = None) -> str:
    """Return the SHA-256 of the named files of a folder: relative names (with `/`) and contents.

    Raises:
        OSError: a file cannot be read.
    """
    cache = cache or _shared_cache()
    base = os.path.abspath(folder)
    try:
        listing = [[name.replace(os.sep, "/"), cache.of_file(os.path.join(base, name))] for name in sorted(names)]
    finally:
        cache.save()
    return digest({"files": listing})


def _shared_cache() -> DigestCache:
    file = cache_folder() / "digests.json"
    if file not in _caches:
        _caches[file] = DigestCache(file)
    return _caches[file]
