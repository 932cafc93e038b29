"""File helpers of the ledger: atomic writes, checksummed folders, storage errors a user can act on.

Unless it says otherwise, a function raises StorageError where a file or folder is there and cannot be read, cannot be
written, or where its disk is full.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from orchestrator.errors import StorageError
from orchestrator.plan.identity import digest, file_sha256
from orchestrator.plan.io_retry import ABSENT, retry_io, stat_or_none

T = TypeVar("T")
MANIFEST = "manifest.json"
Files = dict[str, dict[str, Any]]
"""Name of a file to its size in bytes and its SHA-256."""
_SEAL = "seal"
_READERS = 8
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TRIES = 100
_LEFT_BYTES = 2**20  # a writer that failed for want of space has left no more than this
_CHANGE_PLACE = "or give another folder with cluster.storage_path or $LLAVOLTA_STORAGE"


def stat_of(path: str | Path) -> os.stat_result | None:
    """Return what a path leads to; None where nothing is there. What cannot be asked is an error, never a no."""
    try:
        return stat_or_none(path)
    except OSError as error:
        raise storage_error(Path(path).parent, error) from error


def is_there(path: str | Path) -> bool:
    """Return True where a path leads to something, false where to nothing."""
    return stat_of(path) is not None


def log_path(work_folder: Path, rank: int = 0) -> Path:
    """Return the log of one rank of a job; rank 0's is the one people are shown."""
    return work_folder / (f"log_rank{rank}.txt" if rank else "log.txt")


def names_in(folder: str | Path) -> list[str]:
    """Return the names in a folder, hidden ones too, sorted; empty where there is no folder."""
    with storage_errors(Path(folder)):
        try:
            return sorted(retry_io(lambda: os.listdir(folder)))
        except ABSENT:
            return []


def files_below(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Return a file, or a folder with all that lies below it, hidden too; what goes meanwhile is left out."""
    about = stat_of(path)
    if about is not None:
        yield path, about
        if stat.S_ISDIR(about.st_mode):
            for name in names_in(path):
                yield from files_below(path / name)


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError met while working in `folder` into a StorageError that says what to do.

    Raises:
        StorageError: the disk is full, or the folder cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(folder, error) from error


def storage_error(folder: Path, error: Exception) -> StorageError:
    """Return what went wrong in a folder and what to do; a full disk is named, whatever the library calls it."""
    number = getattr(error, "errno", None)
    if number in _FULL or os.strerror(errno.ENOSPC) in str(error) or (number is None and _is_full(folder)):
        return StorageError(
            f"{folder}: no space left on its disk ({os.strerror(number or errno.ENOSPC)}). Finished work is safe. Free "
            f"some space there (`llavolta ledger gc` shows what can go), {_CHANGE_PLACE}; then run again"
        )
    if isinstance(error, OSError):
        what = f"{error.strerror or error} ({error.filename or folder})"
    else:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
    return StorageError(f"{folder}: {what}. Make it a folder that this user can read and write, {_CHANGE_PLACE}")


def _is_full(folder: Path) -> bool:
    try:
        about = os.statvfs(folder)
    except OSError:
        return False
    return about.f_bavail * about.f_frsize < _LEFT_BYTES


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = retry_io(lambda: os.open(folder, os.O_RDONLY))
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, whose names last."""
    if is_there(folder):
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        fsync_folder(folder.parent)


def fsync_file(path: Path) -> None:
    """Make a file's content last."""
    with retry_io(lambda: open(path, "rb")) as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file aside, then rename it: readers see the old one or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    with storage_errors(path.parent):
        try:
            write_aside(part, data)
            try:
                part.replace(path)
            except FileNotFoundError:
                # A file server whose answer was lost is asked again by the system: then the file is in its place.
                if is_there(part) or path.read_bytes() != data:
                    raise
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        fsync_folder(path.parent)


def write_aside(part: Path, data: bytes) -> None:
    """Write a file that nobody reads yet, in a folder made for it, and make its content last."""
    with _open_new(part) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _open_new(path: Path) -> BinaryIO:
    for _ in range(_TRIES):
        # The folder may go again before there is a file in it: a store takes empty ones away.
        with contextlib.suppress(FileNotFoundError):
            make_folder(path.parent)
            return open(path, "wb")
    make_folder(path.parent)
    return open(path, "wb")


def write_copy(file: Path, data: bytes) -> None:
    """Write a copy of what lies elsewhere too: quicker than a file that must outlive a power cut."""
    part = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
    with storage_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(file)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused."""
    write_atomic(path, dump_json(value))


def dump_json(value: Any) -> bytes:
    """Return the JSON for a file.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def parse_json(data: bytes | None) -> dict[str, Any] | None:
    """Return a JSON mapping; None where there is none or it is damaged."""
    try:
        found = json.loads(data) if data is not None else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def dump_note(key: str, note: Mapping[str, Any], *, sort_keys: bool = True) -> bytes:
    """Return the JSON of a note with its seal, a SHA-256 over its key and content: a changed digit is still JSON.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    note = json.loads(json.dumps(note, allow_nan=False))  # as it will be read: keys are text, tuples are lists
    sealed = {**note, _SEAL: _seal(key, note)}
    return (json.dumps(sealed, indent=1, sort_keys=sort_keys) + "\n").encode()


def parse_note(key: str, data: bytes | None) -> dict[str, Any] | None:
    """Return a note without its seal; None where there is none, it is damaged, or it is another's.

    One without a seal is from a version that wrote none, and is taken as it stands.
    """
    note = parse_json(data)
    if note is None or _SEAL not in note:
        return note
    seal = note.pop(_SEAL)
    return note if seal == _seal(key, note) else None


def _seal(key: str, note: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{key}\n".encode() + dump_json(note)).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON mapping; None where there is none or it is damaged."""
    return parse_json(_read_bytes(path))


def _read_bytes(path: Path) -> bytes | None:
    with storage_errors(path.parent):
        try:
            return retry_io(path.read_bytes)
        except ABSENT:
            return None


def list_files(folder: Path) -> list[str]:
    """Return the names of all files below a folder, with `/`, sorted; hidden ones, which are temporary, left out."""
    return sorted(name for name, is_folder in _below(folder, "") if not is_folder)


def _below(folder: Path, prefix: str) -> Iterator[tuple[str, bool]]:
    with storage_errors(folder):  # a listing that lacks files would pass for a complete one
        found = retry_io(lambda: [(entry.name, entry.is_dir()) for entry in os.scandir(folder)])
    for name, is_folder in found:
        if not name.startswith("."):
            yield prefix + name, is_folder
            if is_folder:
                yield from _below(folder / name, f"{prefix}{name}/")


def seal_file(file: Path) -> dict[str, Any]:
    """Make a file last, and return its size and SHA-256, a manifest's entry."""
    fsync_file(file)
    return {"sha256": file_sha256(file), "size": retry_io(file.stat).st_size}


def write_manifest(folder: Path, known: Files) -> None:
    """List size and SHA-256 of every file of a folder, made to last first; the manifest itself is written last.

    Args:
        folder: Holds the files.
        known: Entries of those that their writers made to last and hashed; they are not read again.

    Raises:
        StorageError: one of those is not here as it was written.
    """
    with storage_errors(folder):
        if cut := cut_files(folder, known):
            raise StorageError(f"{folder / cut[0]}: a worker wrote it, and it is not here; is the storage shared?")
        names = [name for name in list_files(folder) if name != MANIFEST and name not in known]
        sealed = _side_by_side(lambda name: seal_file(folder / name), names)
        for name, is_folder in [*_below(folder, ""), ("", True)]:
            if is_folder:
                fsync_folder(folder / name)
    write_json(folder / MANIFEST, manifest_of({**known, **dict(zip(names, sealed, strict=True))}))


def manifest_of(files: Files) -> dict[str, Any]:
    """Return the manifest that lists some files."""
    return {"files": files, "sha256": digest(files)}


def parse_manifest(data: bytes | None) -> dict[str, Any] | None:
    """Return a manifest as it was written; None where there is none or it is damaged."""
    found = parse_json(data)
    files = found.get("files") if found else None
    try:
        return found if found and isinstance(files, dict) and digest(files) == found.get("sha256") else None
    except (TypeError, ValueError):
        return None


def read_manifest(folder: Path) -> Files | None:
    """Return the name to size and SHA-256; None where the manifest is missing or damaged."""
    found = parse_manifest(_read_bytes(folder / MANIFEST))
    return found["files"] if found is not None else None


def damaged_files(folder: Path) -> list[str]:
    """Return the files that are missing, cut short or changed; empty when the folder is complete. Reads every byte."""
    files = read_manifest(folder)
    return [MANIFEST] if files is None else changed_files(folder, files)


def changed_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return those of a manifest's files that are missing, cut short or changed. Reads every byte."""

    def is_changed(name: str) -> bool:
        with storage_errors((folder / name).parent):
            try:
                return file_sha256(folder / name) != files[name].get("sha256")
            except ABSENT:
                return True

    bad = cut_files(folder, files)
    rest = [name for name in files if name not in bad]
    return sorted([*bad, *(name for name, is_bad in zip(rest, _side_by_side(is_changed, rest), strict=True) if is_bad)])


def _side_by_side(read: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """Return what comes of each file, several read at a time: one thread hashes less than a disk or network gives."""
    if len(names) < 2:
        return [read(name) for name in names]
    with ThreadPoolExecutor(min(_READERS, len(names))) as pool:
        return list(pool.map(read, names))


def cut_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return those of a manifest's files that are missing or cut short; contents are not read."""
    sizes = {name: stat_of(folder / name) for name in files}
    return [name for name, about in sizes.items() if (about.st_size if about else -1) != files[name].get("size")]
