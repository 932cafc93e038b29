"""Columns in cached Apache Arrow files: written in chunks that survive an interruption, read through a memory map."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from orchestrator.data.progress import progress
from orchestrator.errors import StorageError
from orchestrator.plan.identity import cache_folder, shared_cache_folder

_Item = TypeVar("_Item")
_CHECKSUMS = b"checksums"
_UNREADABLE = (OSError, ValueError, KeyError)  # Arrow's own errors are OSErrors and ValueErrors


class DamagedColumns(ValueError):
    """A file of columns is not what was written."""


class Columns:
    """A file of columns, mapped into memory: only columns that are used are read.

    A column of a chunk is verified by its checksum when it is first used.

    Args:
        file: The Arrow file.

    Raises:
        DamagedColumns: it is missing, or not what was written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with pa.memory_map(str(file)) as source:
                reader = pa.ipc.open_file(source)
                self.schema: pa.Schema = reader.schema
                found = [reader.get_batch_with_custom_metadata(n) for n in range(reader.num_record_batches)]
            self._batches = [batch for batch, _ in found]
            self._checksums = [json.loads(metadata[_CHECKSUMS]) for _, metadata in found]
        except (*_UNREADABLE, TypeError) as error:
            raise DamagedColumns(f"{file}: {error}") from error
        self._checked: set[tuple[int, str]] = set()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return {key.decode(): value.decode() for key, value in (self.schema.metadata or {}).items()}

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column.

        Raises:
            DamagedColumns: it is not what was written.
        """
        arrays = [self._column(number, name) for number in range(len(self._batches))]
        return pa.chunked_array(arrays, type=self.schema.field(name).type)

    def numpy(self, name: str) -> np.ndarray:
        """Return a column of numbers without nulls."""
        return np.asarray(self.column(name).to_numpy())

    def values(self, position: int, *names: str) -> list[object]:
        """Return the values of one row, unverified: callers store a checksum with the row if they need one."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        inside = position - int(self._starts[number])
        return [self._batches[number].column(name)[inside].as_py() for name in names]

    def _column(self, number: int, name: str) -> pa.Array:
        array = self._batches[number].column(name)
        if (number, name) not in self._checked:
            if _checksum(array) != self._checksums[number].get(name):
                raise DamagedColumns(f"{self.file}: column {name}, chunk {number}")
            self._checked.add((number, name))
        return array


def _checksum(array: pa.Array) -> int:
    found = 0
    for buffer in array.buffers():
        if buffer is not None:
            found = zlib.crc32(memoryview(buffer), found)
    return found


def write_columns(file: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write a temporary file, then rename it.

    Raises:
        OSError: the folder cannot be written.
    """
    aside = file.with_name(f"{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                # Serialised and read back, so that the checksum is over the bytes of the file.
                plain = pa.ipc.read_record_batch(pa.ipc.read_message(batch.serialize()), batch.schema)
                sums = {name: _checksum(plain.column(name)) for name in schema.names}
                writer.write_batch(plain, custom_metadata={_CHECKSUMS: json.dumps(sums).encode()})
        aside.replace(file)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def open_columns(name: str, schema: pa.Schema, verified: Iterable[str] | None = None) -> Columns | None:
    """Return the cached file of this name; None if no cache has it intact.

    Args:
        name: Name in the caches.
        schema: Its columns.
        verified: Columns to verify now; None verifies all.
    """
    for folder in _folders():
        with contextlib.suppress(DamagedColumns):
            found = Columns(folder / name)
            if found.schema.names == schema.names:
                for column in schema.names if verified is None else verified:
                    found.column(column)
                return found
    return None


def keep_columns(name: str, batches: Callable[[], Iterable[pa.RecordBatch]], schema: pa.Schema) -> Columns:
    """Write a file to the first cache that is writable, and open it.

    Raises:
        StorageError: no folder is writable, not even a temporary one.
    """
    failure: Exception | None = None
    for folder in _folders():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_columns(folder / name, batches(), schema)
            return Columns(folder / name)
        except (OSError, DamagedColumns) as error:  # damaged: another process has just removed its chunks
            failure = error
    raise StorageError(f"the index of the rows cannot be written to any cache: {failure}")


class Chunks:
    """Finished chunks of a file in the making: kept when the work is interrupted, and reused when it resumes.

    Two processes that do the same work write the same chunks.

    Args:
        name: Name of the file that the chunks will become.
        schema: Schema of the chunks.
    """

    def __init__(self, name: str, schema: pa.Schema) -> None:
        self._name, self._schema = name, schema

    def get(self, number: int) -> Columns | None:
        """Return a chunk finished earlier; None if there is none."""
        return open_columns(f"{self._name}.part/{number:06}", self._schema)

    def put(self, number: int, batch: pa.RecordBatch) -> Columns:
        """Keep a chunk."""
        return keep_columns(f"{self._name}.part/{number:06}", lambda: [batch], self._schema)

    def forget(self) -> None:
        """Remove the chunks once the file is complete. A temporary folder is removed with its process."""
        for folder in _folders()[:-1]:
            shutil.rmtree(folder / f"{self._name}.part", ignore_errors=True)


def build_columns(
    name: str,
    schema: pa.Schema,
    parts: Iterable[Sequence[_Item]],
    batch_of: Callable[[Sequence[_Item]], pa.RecordBatch],
    what: str,
    total: int | None,
) -> Columns:
    """Write a file part by part, in chunks that survive an interruption, and open it.

    Args:
        name: Name in the caches.
        schema: Its columns.
        parts: What the chunks are made of, one entry for each of their rows.
        batch_of: Makes a chunk; not called for one that is there.
        what: The unit of work, for the progress that is shown.
        total: Number of all rows; None if it is not known.
    """
    chunks, done = Chunks(name, schema), list[Columns]()
    with progress(what, total) as advance:
        for number, part in enumerate(parts):
            kept = chunks.get(number)
            if kept is None or len(kept) != len(part):
                kept = chunks.put(number, batch_of(part))
            done.append(kept)
            advance(len(part))
    made = keep_columns(name, lambda: _batches_of(done), schema)
    chunks.forget()
    return made


def batch(schema: pa.Schema, columns: Iterable[Sequence[object]]) -> pa.RecordBatch:
    """Return a chunk with these values, column by column."""
    return pa.RecordBatch.from_pydict(dict(zip(schema.names, columns, strict=True)), schema=schema)


def _batches_of(found: Iterable[Columns]) -> Iterator[pa.RecordBatch]:
    """Return the chunks of some files, their columns verified."""
    for columns in found:
        table = pa.table({name: columns.column(name) for name in columns.schema.names}, schema=columns.schema)
        yield from table.to_batches()


def _folders() -> list[Path]:
    """Return the caches in order: the one all nodes share, this machine's, and a temporary one of this process."""
    shared, own = shared_cache_folder() / "rows", cache_folder() / "rows"
    return [*dict.fromkeys((shared, own)), _temporary()]


@cache
def _temporary() -> Path:
    folder = Path(tempfile.gettempdir()) / f"llavolta-rows-{os.getpid()}-{secrets.token_hex(4)}"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
