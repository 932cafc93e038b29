"""A small key-value face over a folder or a bucket: notes, leases and signs of life, each whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path
from typing import Protocol

from orchestrator.errors import StorageError
from orchestrator.plan.io_retry import retry_io
from orchestrator.plan.ledger.files import (
    Listings,
    fsync_folder,
    is_there,
    names_in,
    storage_errors,
    write_aside,
    write_atomic,
)

_KEY = re.compile(r"(?!\.)[^/\\]+(/(?!\.)[^/\\]+)*")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Store(Protocol):
    """Small values under keys such as `failures/ID.json`; safe between processes and machines.

    Attributes:
        url: What names it: a folder or `s3://bucket/prefix`.
    """

    url: str

    def read(self, key: str) -> bytes | None:
        """Return a value; None where there is none."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Write a value; readers see the old one or the new one, and the last writer wins."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a value if there is none; of several at once one is told True."""
        ...

    def delete(self, key: str) -> None:
        """Take a value away; it need not be there."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Return the names directly below a prefix, sorted; empty where there are none."""
        ...


class FolderStore:
    """A store in a local folder or on NFS; nothing is made before something is written.

    Args:
        folder: The folder.

    Attributes:
        url: The folder's absolute path.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()
        self.url = self._base = str(self._folder)
        self.listings = Listings()

    def read(self, key: str) -> bytes | None:
        """Return a value; None where there is none.

        Raises:
            StorageError: it is there and cannot be read.
        """
        path = f"{self._base}/{_checked(key)}"
        if self.listings.lacks(*path.rsplit("/", 1)):
            return None
        if not is_there(path):  # cheaper than to open it: most notes that a plan asks for are not there
            return None
        with storage_errors(self._folder):
            try:
                return retry_io(Path(path).read_bytes)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, key: str, data: bytes) -> None:
        """Write a value through a rename.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        write_atomic(self._folder / _checked(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write a value if there is none; of several at once one is told True.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        path = self._folder / _checked(key)
        with storage_errors(path.parent):
            part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
            try:
                write_aside(part, data)
                made = _link(part, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    part.unlink()
            if made:
                fsync_folder(path.parent)
            return made

    def delete(self, key: str) -> None:
        """Take a value away; it need not be there.

        Raises:
            StorageError: the folder cannot be written.
        """
        path = self._folder / _checked(key)
        with storage_errors(path.parent), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def names(self, prefix: str) -> list[str]:
        """Return the names directly below a prefix, sorted; empty where there are none.

        Raises:
            StorageError: the folder cannot be read.
        """
        return [name for name in names_in(self._folder / _checked(prefix.rstrip("/"))) if not name.startswith(".")]


def open_store(url_or_path: str | Path) -> Store:
    """Return the store that a folder or an `s3://bucket/prefix` names.

    Raises:
        StorageError: it is neither.
    """
    text = str(url_or_path)
    if text.startswith("s3://"):
        from orchestrator.plan.ledger.store_s3 import S3Store

        return S3Store(text)
    if "://" in text:
        raise StorageError(f"{text}: a storage is a folder or s3://bucket/prefix")
    return FolderStore(text)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise StorageError(f"{key!r} is no key of a store; it is names joined by `/`, none beginning with a dot")
    return key


def _link(part: Path, path: Path) -> bool:
    """Give a whole file a name that nobody has; False where somebody has it."""
    try:
        os.link(part, path)
    except FileExistsError:
        # A file server that answers late is asked again by the system: then the name is there and is ours.
        return os.stat(part).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _copy_exclusively(part, path)
    return True


def _copy_exclusively(part: Path, path: Path) -> bool:
    """For file systems without hard links: a reader may see the file for a moment before its content is there."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as file:
        file.write(part.read_bytes())
    return True
