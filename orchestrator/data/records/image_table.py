"""A cached table of a data set's images: file size and time, content digest, size in pixels, error."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import pyarrow as pa

from orchestrator.data.progress import progress
from orchestrator.data.records import image_files
from orchestrator.data.records.columns import Chunks, Columns, DamagedColumns, keep_columns, open_columns
from orchestrator.data.records.image_files import BadImage, image_size, verify_image
from orchestrator.data.rows import AS_IT_IS, ImageReading
from orchestrator.errors import DataError
from orchestrator.plan.identity import digest, file_sha256, source_code


def image_error(path: str, reading: ImageReading = AS_IT_IS) -> str | None:
    """Return why an image cannot be used, None where it can; the file is decoded completely, as training will.

    Raises:
        DataError: the storage fails, which says nothing about the image; another attempt may succeed.
    """
    try:
        verify_image(path, reading)
    except BadImage as error:
        return str(error)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return None


_CHUNK_IMAGES = 1024
_THREADS = 8
_RACY_NS = 2 * 10**9
# Errors that mean that there is no such file. Others may be temporary.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_MISSING = (-1, -1)
_SCHEMA = pa.schema(
    [
        ("name", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("sha256", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("reason", pa.string()),
    ]
)


class ImageTable:
    """The images of a data set.

    Args:
        columns: The table, sorted by name.
        folder: Folder that names are relative to.
    """

    def __init__(self, columns: Columns, folder: str) -> None:
        self._columns, self._folder = columns, folder

    @property
    def digest(self) -> str:
        """SHA-256 over names and contents."""
        return self._columns.metadata["digest"]

    @cached_property
    def errors(self) -> dict[bytes, str]:
        """By name, the error of each image that cannot be used."""
        errors = self._columns.column("reason")
        if errors.null_count == len(errors):
            return {}
        pairs = zip(self._columns.column("name").to_pylist(), errors.to_pylist(), strict=True)
        return {name: reason for name, reason in pairs if reason is not None}

    @cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """By path, height and width of each image that can be used."""
        names, errors = self._columns.column("name").to_pylist(), self._columns.column("reason").to_pylist()
        heights, widths = self._columns.numpy("height").tolist(), self._columns.numpy("width").tolist()
        return {
            path_of(self._folder, name): (height, width)
            for name, reason, height, width in zip(names, errors, heights, widths, strict=True)
            if reason is None
        }


def path_of(folder: str, name: bytes) -> str:
    """Return the path of an image by its name in the table."""
    return os.path.join(folder, os.fsdecode(name))


def image_table(key: str, folder: str, names: Callable[[], list[bytes]], reading: ImageReading) -> ImageTable:
    """Return the current table of a data set's images; files that changed since they were last read are read again.

    Args:
        key: Key of the rows that name them.
        folder: Folder that names are relative to.
        names: Returns their sorted names; called if there is no table yet.
        reading: How they are read.

    Raises:
        OSError: the storage fails, which says nothing about the images.
        DataError: the storage fails while an image is decoded, or an image changes while it is read.
    """
    code = source_code(__name__, image_files.__name__)
    file = f"images-{digest([code, key, os.path.abspath(folder) if folder else '', repr(reading)])}.arrow"
    known = open_columns(file, _check)
    wanted: list[bytes] = known.column("name").to_pylist() if known is not None else names()
    now = _stats(folder, wanted)
    if known is not None:
        then = np.stack([known.numpy("size"), known.numpy("mtime_ns")], axis=1)
        if np.array_equal(then, now):
            return ImageTable(known, folder)
    return ImageTable(_refresh(file, folder, wanted, now, known, reading), folder)


def _check(columns: Columns) -> None:
    if columns.schema.names != _SCHEMA.names or "digest" not in columns.metadata:
        raise DamagedColumns("another table")
    for name in _SCHEMA.names:
        columns.column(name)


def _stats(folder: str, names: Sequence[bytes]) -> np.ndarray:
    """Return size and time of each file (N, 2), (-1, -1) for a missing one.

    Raises:
        OSError: the storage fails.
    """

    def some(part: Sequence[bytes]) -> list[tuple[int, int]]:
        return [_stat(path_of(folder, name)) for name in part]

    each = max(1, -(-len(names) // _THREADS))
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(some, [names[first : first + each] for first in range(0, len(names), each)]))
    return np.array([entry for part in parts for entry in part], dtype=np.int64).reshape(-1, 2)


def _stat(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except ValueError:  # a name that no file can have
        return _MISSING
    except OSError as error:
        if error.errno in _ABSENT:
            return _MISSING
        raise
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else _MISSING


_Entry = tuple[int, int, str | None, int, int, str | None]


def _refresh(
    file: str, folder: str, names: list[bytes], now: np.ndarray, known: Columns | None, reading: ImageReading
) -> Columns:
    """Read new and changed images, in chunks that survive an interruption, and write the table."""
    chunks = Chunks(file, _SCHEMA)
    entries: dict[bytes, _Entry] = {}
    first_free = 0
    for columns in _earlier(chunks, known):
        first_free += columns is not known
        rows = zip(*(columns.column(name).to_pylist() for name in _SCHEMA.names), strict=True)
        entries.update({name: tuple(rest) for name, *rest in rows})
    stale = [
        name
        for name, stat_now in zip(names, map(tuple, now.tolist()), strict=True)
        if (entry := entries.get(name)) is None or entry[:2] != stat_now
    ]
    with progress("images read", len(stale)) as advance:
        for number, first in enumerate(range(0, len(stale), _CHUNK_IMAGES), start=first_free):
            some = stale[first : first + _CHUNK_IMAGES]
            found = _look(folder, some, reading)
            entries.update(zip(some, found, strict=True))
            if len(stale) > _CHUNK_IMAGES:
                chunks.put(number, _batch(some, found))
            advance(len(some))
    chosen = [entries[name] for name in names]
    content = hashlib.sha256()
    for name, entry in zip(names, chosen, strict=True):
        content.update(name + b"\0" + (entry[2] or "missing").encode() + b"\n")
    schema = _SCHEMA.with_metadata({"digest": content.hexdigest()})
    batch = pa.RecordBatch.from_arrays(_batch(names, chosen).columns, schema=schema)
    kept = keep_columns(file, lambda: [batch], schema)
    chunks.forget()
    return kept


def _earlier(chunks: Chunks, known: Columns | None) -> Iterator[Columns]:
    if known is not None:
        yield known
    number = 0
    while (found := chunks.get(number)) is not None:
        yield found
        number += 1


def _batch(names: Sequence[bytes], entries: Sequence[_Entry]) -> pa.RecordBatch:
    columns = [names, *zip(*entries, strict=True)] if entries else [[] for _ in _SCHEMA.names]
    arrays = [pa.array(values, type=field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _look(folder: str, names: Sequence[bytes], reading: ImageReading) -> list[_Entry]:
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")  # of Pillow: what it warns of is refused, or harmless
        return list(pool.map(lambda name: _entry(path_of(folder, name), reading), names))


def _entry(path: str, reading: ImageReading) -> _Entry:
    before = _stat(path)
    reason = image_error(path, reading)
    height = width = 0
    sha = None
    if before != _MISSING:
        sha = file_sha256(path)
        if reason is None:
            try:
                height, width = image_size(path, reading)
            except BadImage as error:
                reason = str(error)
    if _stat(path) != before:
        raise DataError(f"{path} changes while it is read; wait until it is complete, then try again")
    size, mtime_ns = before
    # A file written just now may be written again within the clock's resolution: do not trust its time yet.
    trusted = mtime_ns if before == _MISSING or time.time_ns() - mtime_ns > _RACY_NS else -2
    return size, trusted, sha, height, width, reason or ("is missing" if before == _MISSING else None)
