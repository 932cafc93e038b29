"""The index of a data set's rows, images and videos: built once, cached by content, mapped into memory by all readers.

Planning, checks, training and evaluation read it, so that all see the same rows, and none parses the data again.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import count, islice, takewhile
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.progress import progress
from orchestrator.data.records import image_files, video_files
from orchestrator.data.records.columns import Chunks, Columns, batch, build_columns, keep_columns, open_columns
from orchestrator.data.records.image_files import BadImage, file_of, image_size, part_sha256, verify_image
from orchestrator.data.records.video_files import Clip, frames_of, read_clip
from orchestrator.data.rows import (
    AS_IT_IS,
    DataSet,
    ImageReading,
    ImageRef,
    Row,
    Turn,
    described,
    evenly_spread,
    open_data_set,
    raise_for_errors,
)
from orchestrator.errors import DataError
from orchestrator.plan.cells.identity_fields import data_identity
from orchestrator.plan.identity import digest, file_sha256, source_code
from orchestrator.spec.components import DataSpec


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


_VIDEO = b"\0"
"""Begins the name of a video in the index; no path holds it."""


@dataclass(frozen=True)
class Folders:
    """Where a data set's files are: paths below a folder are stored relative to it, so that the data may move.

    Attributes:
        images: Of images.
        videos: Of videos.
    """

    images: str = ""
    videos: str = ""

    def name_of(self, image: ImageRef) -> bytes:
        """Return the name of an image or a video in the index.

        Raises:
            UnicodeEncodeError: its path is not Unicode.
        """
        folder = self.videos if image.video else self.images
        path = "." if image.path == folder else image.path.removeprefix(os.path.join(folder, "") if folder else "")
        return (_VIDEO if image.video else b"") + os.fsencode(path)

    def path_of(self, name: bytes) -> str:
        """Return the path of an image or a video by its name in the index."""
        folder = self.videos if is_video(name) else self.images
        return os.path.join(folder, os.fsdecode(name.removeprefix(_VIDEO)))


def is_video(name: bytes) -> bool:
    """Return whether a name in the index is of a video."""
    return name.startswith(_VIDEO)


CHUNK_IMAGES = 1024
_THREADS = 8
_RACY_NS = 2 * 10**9
# Errors that mean that there is no such file. Others may be temporary.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_MISSING = (-1, -1)
_IMAGE_SCHEMA = pa.schema(
    [
        ("name", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("sha256", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("frames", pa.int32()),
        ("rate", pa.float64()),
        ("reason", pa.string()),
    ]
)


class ImageTable:
    """The images and videos of a data set.

    Args:
        columns: The table, sorted by name; of an image `frames` and `rate` are 0.
        folders: What names are relative to.
    """

    def __init__(self, columns: Columns, folders: Folders) -> None:
        self._columns, self._folders = columns, folders

    @property
    def digest(self) -> str:
        """SHA-256 over names and contents."""
        return self._columns.metadata["digest"]

    def not_named_by_content(self) -> list[bytes]:
        """Return the names of which the last part is not the file's SHA-256: it is missing, or another file."""
        pairs = zip(self._columns.column("name").to_pylist(), self._columns.column("sha256").to_pylist(), strict=True)
        return [name for name, sha in pairs if name.rsplit(b"/", 1)[-1] != (sha or "").encode()]

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
        return {path: (clip.height, clip.width) for path, clip in self._usable(videos=False)}

    @cached_property
    def clips(self) -> dict[str, Clip]:
        """By path, what each video that can be used holds."""
        return dict(self._usable(videos=True))

    def _usable(self, videos: bool) -> list[tuple[str, Clip]]:
        fields = [self._columns.column(name).to_pylist() for name in ("name", "reason", *Clip._fields)]
        return [
            (self._folders.path_of(name), Clip(*clip))
            for name, reason, *clip in zip(*fields, strict=True)
            if reason is None and is_video(name) == videos
        ]

    @cached_property
    def num_videos(self) -> int:
        """Number of videos, usable or not."""
        return sum(map(is_video, self._columns.column("name").to_pylist()))

    def shapes_of(self, names: pa.Array, reading: ImageReading) -> np.ndarray:
        """Return of images and videos by name the frames that are taken (0 of an image), height and width (M, 3)."""
        known = self._columns.column("name").combine_chunks()
        places = np.asarray(pc.index_in(names, value_set=known), dtype=np.int64)
        shapes = np.stack([self._columns.numpy(name)[places] for name in ("frames", "height", "width")], axis=1)
        rates = self._columns.numpy("rate")[places]
        for number in np.flatnonzero(shapes[:, 0]).tolist():
            frames, height, width = shapes[number].tolist()
            shapes[number, 0] = len(frames_of(Clip(frames, height, width, float(rates[number])), reading))
        return shapes


def image_table(key: str, folders: Folders, names: Callable[[], list[bytes]], reading: ImageReading) -> ImageTable:
    """Return the current table of a data set's images; files that changed since they were last read are read again.

    Args:
        key: Key of the rows that name them.
        folders: What names are relative to.
        names: Returns their sorted names; called if there is no table yet.
        reading: How they are read.

    Raises:
        OSError: the storage fails, which says nothing about the images.
        DataError: the storage fails while an image is decoded, or an image changes while it is read.
    """
    code = source_code(__name__, image_files.__name__, video_files.__name__)
    places = [os.path.abspath(folder) if folder else "" for folder in (folders.images, folders.videos)]
    file = f"images-{digest([code, key, places, repr(reading)])}.arrow"
    known = open_columns(file, _IMAGE_SCHEMA)
    wanted: list[bytes] = known.column("name").to_pylist() if known is not None else names()
    now = _stats(folders, wanted)
    if known is not None:
        then = np.stack([known.numpy("size"), known.numpy("mtime_ns")], axis=1)
        if np.array_equal(then, now):
            return ImageTable(known, folders)
    return ImageTable(_refresh(file, folders, wanted, now, known, reading), folders)


def _stats(folders: Folders, names: Sequence[bytes]) -> np.ndarray:
    """Return size and time of each file (N, 2), (-1, -1) for a missing one.

    Raises:
        OSError: the storage fails.
    """

    def some(part: Sequence[bytes]) -> list[tuple[int, int]]:
        return [_stat(folders.path_of(name)) for name in part]

    each = max(1, -(-len(names) // _THREADS))
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(some, [names[first : first + each] for first in range(0, len(names), each)]))
    return np.array([entry for part in parts for entry in part], dtype=np.int64).reshape(-1, 2)


def _stat(path: str) -> tuple[int, int]:
    try:
        found = os.stat(file_of(path))
    except ValueError:  # a name that no file can have
        return _MISSING
    except OSError as error:
        if error.errno in _ABSENT:
            return _MISSING
        raise
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else _MISSING


_Entry = tuple[int, int, str | None, int, int, int, float, str | None]


def _refresh(
    file: str, folders: Folders, names: list[bytes], now: np.ndarray, known: Columns | None, reading: ImageReading
) -> Columns:
    """Read new and changed images, in chunks that survive an interruption, and write the table."""
    chunks = Chunks(file, _IMAGE_SCHEMA)
    entries: dict[bytes, _Entry] = {}
    earlier = list(takewhile(lambda found: found is not None, map(chunks.get, count())))
    for columns in filter(None, (known, *earlier)):
        rows = zip(*(columns.column(name).to_pylist() for name in _IMAGE_SCHEMA.names), strict=True)
        entries.update({name: tuple(rest) for name, *rest in rows})
    stale = [
        name
        for name, stat_now in zip(names, map(tuple, now.tolist()), strict=True)
        if (entry := entries.get(name)) is None or entry[:2] != stat_now
    ]
    with progress("images read", len(stale)) as advance:
        for number, first in enumerate(range(0, len(stale), CHUNK_IMAGES), start=len(earlier)):
            some = stale[first : first + CHUNK_IMAGES]
            found = _look(folders, some, reading)
            entries.update(zip(some, found, strict=True))
            if len(stale) > CHUNK_IMAGES:
                chunks.put(number, _image_batch(some, found))
            advance(len(some))
    chosen = [entries[name] for name in names]
    content = sha256()
    for name, entry in zip(names, chosen, strict=True):
        content.update(name + b"\0" + (entry[2] or "missing").encode() + b"\n")
    schema = _IMAGE_SCHEMA.with_metadata({"digest": content.hexdigest()})
    kept = keep_columns(file, lambda: [_image_batch(names, chosen)], schema)
    chunks.forget()
    return kept


def _image_batch(names: Sequence[bytes], entries: Sequence[_Entry]) -> pa.RecordBatch:
    columns = [names, *zip(*entries, strict=True)] if entries else [[] for _ in _IMAGE_SCHEMA.names]
    return batch(_IMAGE_SCHEMA, columns)


def _look(folders: Folders, names: Sequence[bytes], reading: ImageReading) -> list[_Entry]:
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")  # of Pillow: what it warns of is refused, or harmless
        return list(pool.map(lambda name: _entry(folders.path_of(name), is_video(name), reading), names))


def _entry(path: str, video: bool, reading: ImageReading) -> _Entry:
    before = _stat(path)
    clip, reason = Clip(0, 0, 0, 0.0), None if video else image_error(path, reading)
    sha = None
    if before != _MISSING:
        sha = part_sha256(path) or file_sha256(path)
    if reason is None:
        try:
            clip = read_clip(path) if video else Clip(0, *image_size(path, reading), 0.0)
        except BadImage as error:
            reason = str(error)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if _stat(path) != before:
        raise DataError(f"{path} changes while it is read; wait until it is complete, then try again")
    size, mtime_ns = before
    # A file written just now may be written again within the clock's resolution: do not trust its time yet.
    trusted = mtime_ns if before == _MISSING or time.time_ns() - mtime_ns > _RACY_NS else -2
    shape = (clip.height, clip.width, clip.frames, clip.rate)
    return size, trusted, sha, *shape, reason or ("is missing" if before == _MISSING else None)


CHUNK_ROWS = 32_768
_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("reason", pa.string()),
        ("words", pa.int32()),
        ("images", pa.list_(pa.binary())),
        ("roles", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
        ("answer_type", pa.string()),
        ("columns", pa.string()),
        ("checksum", pa.int64()),
    ]
)
_ROW = ("index", "images", "roles", "texts", "answer_type", "columns", "checksum")
# Few bytes per row, verified whenever an index is opened. The rest is verified row by row, when a row is read.
_ALWAYS_CHECKED = ("index", "reason", "words", "images", "checksum")

Entry = Row | tuple[int, str]
"""A row, or the index of a bad one and the reason."""


class RowIndex:
    """The rows of a data set, good and bad, and its images.

    Args:
        columns: One entry per row, in the order of the file.
        images: Their images and videos.
        folders: What their names are relative to.
        reading: How they are read.
    """

    def __init__(self, columns: Columns, images: ImageTable, folders: Folders, reading: ImageReading) -> None:
        self._columns, self.images, self._folders, self._reading = columns, images, folders, reading

    def __len__(self) -> int:
        return len(self._columns)

    @cached_property
    def unreadable(self) -> dict[int, str]:
        """By index, why a row cannot be used, whatever its images are."""
        reasons = self._columns.column("reason")
        positions = np.flatnonzero(np.asarray(pc.is_valid(reasons))).tolist()
        return {int(self.numbers[position]): str(reasons[position]) for position in positions}

    @cached_property
    def bad(self) -> dict[int, str]:
        """By index, why a row cannot be used."""
        found = dict(self.unreadable)
        for position in self._with_broken_images() if self.images.errors else ():
            found.setdefault(int(self.numbers[position]), self._image_error(position))
        return dict(sorted(found.items()))

    def _with_broken_images(self) -> list[int]:
        names = self._columns.column("images")
        broken = pa.array(list(self.images.errors), type=pa.binary())
        hits = np.asarray(pc.is_in(pc.list_flatten(names), value_set=broken))
        counts = self.num_images
        return np.unique(np.repeat(np.arange(len(self)), counts)[hits]).tolist()

    def _image_error(self, position: int) -> str:
        names: Any
        (names,) = self._columns.values(position, "images")
        name = next(name for name in names if name in self.images.errors)
        return f"{self._folders.path_of(name)} {self.images.errors[name]}"

    @cached_property
    def good(self) -> np.ndarray:
        """Positions of the rows that can be used."""
        return np.flatnonzero(~np.isin(self.numbers, list(self.bad)))

    @cached_property
    def parsed(self) -> np.ndarray:
        """Positions of the rows that can be used if their images can."""
        return np.flatnonzero(np.asarray(pc.is_null(self._columns.column("reason"))))

    @cached_property
    def words(self) -> np.ndarray:
        """Number of words of each row, by position."""
        return self._columns.numpy("words")

    @cached_property
    def num_images(self) -> np.ndarray:
        """Number of images and videos of each row, by position."""
        return np.asarray(pc.list_value_length(self._columns.column("images")).to_numpy())

    def image_shapes(self, positions: np.ndarray) -> np.ndarray:
        """Return frames (0 of an image), height and width of all images and videos of some rows, in order (M, 3)."""
        names = self._columns.column("images").take(pa.array(positions)).combine_chunks()
        return self.images.shapes_of(pc.list_flatten(names), self._reading)

    @cached_property
    def unanswered(self) -> np.ndarray:
        """Whether a row ends with a question without an answer, by position."""
        roles = self._columns.column("roles")
        lengths = pc.list_value_length(roles).to_numpy()
        found = lengths > 0
        last = pc.list_flatten(roles).take(pa.array(np.cumsum(lengths)[found] - 1))
        found[found] = np.asarray(pc.equal(last, "user"))
        return np.asarray(found)

    @cached_property
    def numbers(self) -> np.ndarray:
        """Index of each row in its file, by position."""
        return self._columns.numpy("index")

    def row(self, position: int) -> Row:
        """Return a row.

        Raises:
            DataError: the index is damaged; it is deleted, so that it is built again.
        """
        values: list[Any] = self._columns.values(position, *_ROW)
        index, names, roles, texts, answer_type, columns, checksum = values
        if _checksum(index, names, roles, texts, answer_type, columns) != checksum:
            self._columns.file.unlink(missing_ok=True)
            raise DataError(f"{self._columns.file}: the index of the rows is damaged; run again to rebuild it")
        images = tuple(ImageRef(self._folders.path_of(name), self._reading, is_video(name)) for name in names)
        return Row(index, images, tuple(map(Turn, roles, texts)), answer_type, json.loads(columns or "{}"))

    def digest(self, source: str, with_bad_rows: bool) -> str:
        """Return a digest of the data set: of its source, its images, and which rows are dropped.

        Args:
            source: Digest of the file that the rows were read from.
            with_bad_rows: Whether bad rows are dropped; otherwise none may be bad.
        """
        left_out = list(self.bad) if with_bad_rows else []
        return digest([source, self.images.digest, left_out])


class IndexedRows(Sequence[Row]):
    """Some rows of an index, each read when it is used.

    Attributes:
        origin: The index.
        positions: The rows' positions in it (N,).
    """

    def __init__(self, origin: RowIndex, positions: np.ndarray) -> None:
        self.origin, self.positions = origin, positions

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> IndexedRows: ...
    def __getitem__(self, at: int | slice) -> Row | IndexedRows:
        if isinstance(at, slice):
            return IndexedRows(self.origin, self.positions[at])
        return self.origin.row(int(self.positions[at]))

    @property
    def num_words(self) -> np.ndarray:
        """Number of words of each row (N,)."""
        return self.origin.words[self.positions]

    @property
    def num_images(self) -> np.ndarray:
        """Number of images of each row (N,)."""
        return self.origin.num_images[self.positions]

    @property
    def image_shapes(self) -> np.ndarray:
        """Frames that are taken (0 of an image), height and width in pixels of the images and videos of all rows, row
        after row (M, 3).
        """
        return self.origin.image_shapes(self.positions)

    @property
    def numbers(self) -> np.ndarray:
        """Index of each row in its file (N,)."""
        return self.origin.numbers[self.positions]

    def without(self, numbers: Iterable[int]) -> IndexedRows:
        """Return these rows without those of some indices in the file."""
        left_out = list(numbers)
        if not left_out:
            return self
        return IndexedRows(self.origin, self.positions[~np.isin(self.numbers, left_out)])

    def spread(self, wanted: int | None) -> IndexedRows:
        """Return `wanted` of these rows at equal distances."""
        if wanted is None or wanted >= len(self):
            return self
        return IndexedRows(self.origin, self.positions[np.asarray(evenly_spread(len(self), wanted), dtype=np.int64)])


class JoinedRows(Sequence[Row]):
    """Rows of several sets, one set after the other."""

    def __init__(self, sets: Sequence[Sequence[Row]]) -> None:
        self.sets = tuple(sets)
        self._starts = np.cumsum([0, *map(len, sets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[position] for position in range(*at.indices(len(self)))]
        position = range(len(self))[at]
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.sets[number][position - int(self._starts[number])]


def num_words(rows: Sequence[Row]) -> np.ndarray:
    """Return the number of words of each row (N,)."""
    return _counts(rows, lambda indexed: indexed.num_words, lambda row: row.num_words)


def num_images(rows: Sequence[Row]) -> np.ndarray:
    """Return the number of images of each row (N,)."""
    return _counts(rows, lambda indexed: indexed.num_images, lambda row: len(row.images))


def _counts(
    rows: Sequence[Row], of_index: Callable[[IndexedRows], np.ndarray], of_row: Callable[[Row], int]
) -> np.ndarray:
    if isinstance(rows, JoinedRows):
        return np.concatenate([np.zeros(0, dtype=np.int64), *(_counts(s, of_index, of_row) for s in rows.sets)])
    if isinstance(rows, IndexedRows):
        return of_index(rows)
    return np.fromiter(map(of_row, rows), dtype=np.int64, count=len(rows))


def open_rows(spec: DataSpec, content: str | None = None, left_out: Iterable[int] = ()) -> IndexedRows:
    """Return the rows of a data set, of any kind.

    Args:
        spec: The data set.
        content: Its planned content digest; None compares nothing.
        left_out: Indices of rows to drop.

    Raises:
        DataError: the rows cannot be used, or are not what was planned.
        OSError: the storage fails.
    """
    if content is not None and (now := _content_here(spec)) != content:
        raise DataError(
            f"{described(spec)} has changed since it was planned (content {content[:12]}, now {now and now[:12]}): "
            "rows or images are others, or missing on this machine; restore them, or run again to plan with these"
        )
    implementation = open_data_set(spec)
    found = implementation.rows() if hasattr(implementation, "index") else _index_of(spec, implementation)
    if not isinstance(found, IndexedRows):
        raise DataError(f"data of kind {spec.kind}: `index` belongs to kinds whose rows are an index's")
    return found.without(left_out)


def _content_here(spec: DataSpec) -> str | None:
    try:
        return spec.content_digest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _index_of(spec: DataSpec, implementation: DataSet) -> IndexedRows:
    """Return an index of the `rows` of a data kind without an index of its own, cached by the rows themselves.

    The kind's content digest is not enough: equal content may be in another folder, and its images with it.
    """
    _, absent = data_identity(spec)
    if absent is not None:
        raise DataError(absent)
    rows, content = implementation.rows(), sha256()
    for row in rows:
        content.update(repr(row).encode("utf-8", "backslashreplace") + b"\n")
    reading = next((image.reading for row in rows for image in row.images), AS_IT_IS)
    found = row_index({"rows": content.hexdigest()}, lambda: (partial(_itself, row) for row in rows), reading=reading)
    raise_for_errors(f"data of kind {spec.kind}", [f"row {number}: {why}" for number, why in found.bad.items()])
    return IndexedRows(found, found.good)


def _itself(row: Row) -> Row:
    return row


def row_index(
    source: Mapping[str, Any],
    entries: Callable[[], Iterable[Callable[[], Entry]]],
    folder: str = "",
    reading: ImageReading = AS_IT_IS,
    video_folder: str = "",
) -> RowIndex:
    """Return the index of some rows, cached or newly built, with the current state of their images.

    Args:
        source: All that the rows depend on, such as the digest of their file.
        entries: Reads the rows: returns for each a function that makes its entry, not called for rows that are cached.
        folder: Image paths below it are stored relative to it, so that the data may move.
        reading: How images and videos are read.
        video_folder: Likewise the paths of videos.

    Raises:
        DataError: the rows cannot be read.
        OSError: the storage fails.
    """
    folders = Folders(folder, video_folder)
    key = digest([source_code(__name__), source])
    name = f"rows-{key}.arrow"
    columns = open_columns(name, _SCHEMA, _ALWAYS_CHECKED)
    if columns is None:
        stream = iter(entries())
        parts = iter(lambda: list(islice(stream, CHUNK_ROWS)), [])
        columns = build_columns(name, _SCHEMA, parts, partial(_batch, folders, reading), "rows read", None)

    def names() -> list[bytes]:
        found: set[bytes] = set()
        for chunk in columns.column("images").chunks:
            found.update(pc.unique(pc.list_flatten(chunk)).to_pylist())
        return sorted(found)

    return RowIndex(columns, image_table(key, folders, names, reading), folders, reading)


def _checksum(*values: Any) -> int:
    return zlib.crc32(repr(values).encode())


def _batch(folders: Folders, reading: ImageReading, readers: Sequence[Callable[[], Entry]]) -> pa.RecordBatch:
    return batch(_SCHEMA, zip(*(_values(read(), folders, reading) for read in readers), strict=True))


def _values(entry: Entry, folders: Folders, reading: ImageReading) -> tuple[Any, ...]:
    """Return what the index holds of an entry, column by column."""
    if not isinstance(entry, Row):
        index, reason = entry
        return index, reason.encode("utf-8", "backslashreplace").decode(), 0, [], [], [], None, None, 0
    if any(image.reading != reading for image in entry.images):
        raise DataError(f"row {entry.index}: its images have another `ImageReading` than the data set")
    try:
        names = [folders.name_of(image) for image in entry.images]
        for turn in entry.turns:
            turn.text.encode()
    except UnicodeEncodeError as error:
        return entry.index, f"it holds text that is not Unicode: {error.reason}", 0, [], [], [], None, None, 0
    columns = json.dumps(dict(entry.columns)) if entry.columns else None
    kept = (names, [turn.role for turn in entry.turns], [turn.text for turn in entry.turns], entry.answer_type, columns)
    return entry.index, None, entry.num_words, *kept, _checksum(entry.index, *kept)
