"""What a bucket held at one moment, by one listing: a plan of 10,000 cells asks for as many notes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.plan.identity import digest
from orchestrator.plan.ledger.storage import storage_errors

_AT_ONCE = 8


class Snapshot:
    """Values below some prefixes as one listing found them; what is not listed is not asked for.

    Values are kept on disk by their ETag, so that the next plan on this machine asks for new ones only; a value
    written meanwhile by this process is asked for again.

    Args:
        listed: Key to ETag, of all keys below the prefixes.
        prefixes: What the listing covers.
        read: Reads a value from the bucket.
        folder: Where values are kept.

    Raises:
        StorageError: the bucket cannot be read or the folder cannot be written.
    """

    def __init__(
        self, listed: Mapping[str, str], prefixes: Iterable[str], read: Callable[[str], bytes | None], folder: Path
    ) -> None:
        self._listed = dict(listed)
        self._prefixes = tuple(f"{prefix}/" for prefix in prefixes)
        self._read, self._folder = read, folder
        self._values: dict[str, bytes | None] = {}
        self._children: dict[str, set[str]] = {}
        for key in self._listed:
            parts = key.split("/")
            for depth in range(1, len(parts)):
                self._children.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            kept = set(os.listdir(folder))
        new = [key for key, etag in self._listed.items() if _file_name(etag) not in kept]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(self.read, new):
                pass

    def covers(self, key: str) -> bool:
        """True where the listing tells whether a key is there."""
        return key.startswith(self._prefixes)

    def read(self, key: str) -> bytes | None:
        """A covered value; None where there was none."""
        if key not in self._listed:
            return None
        if key not in self._values:
            self._values[key] = self._load(key, self._folder / _file_name(self._listed[key]))
        return self._values[key]

    def names(self, prefix: str) -> list[str]:
        """Names directly below a covered prefix, sorted."""
        return sorted(self._children.get(prefix, ()))

    def _load(self, key: str, file: Path) -> bytes | None:
        try:
            return file.read_bytes()
        except OSError:  # a copy only: the bucket has it
            value = self._read(key)
        if value is not None:
            part = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
            with storage_errors(file.parent):
                part.write_bytes(value)
                part.replace(file)
        return value


def _file_name(etag: str) -> str:
    return digest(etag)[:40]
