"""Files in a bucket, each under the hash of its content: sent, brought and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.plan.identity import digest, file_sha256
from orchestrator.plan.ledger import storage
from orchestrator.plan.ledger.states import Files
from orchestrator.plan.ledger.storage import changed_files, is_there, list_files, parse_json, stat_of, storage_errors
from orchestrator.plan.ledger.store_s3 import S3Store
from orchestrator.plan.steady import steady


class S3Objects:
    """The files that manifests name, below `objects/STATE/TOKEN/`.

    Each writer has a prefix of its own, that of its token: what one that lost its lease uploads or takes away is
    never what the new holder's manifests name. The entry of a file in a manifest holds the token beside size and hash.

    Args:
        store: The bucket's store.
    """

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._shared: tuple[Path, Files] | None = None

    def are_stored(self, state: str, files: Files) -> bool:
        """True where all files are there with their sizes."""
        sizes = self._store.sizes(f"objects/{state}")
        return all(sizes.get(object_key(state, entry)) == entry["size"] for entry in files.values())

    def send(self, job_id: str, folder: Path, files: Files) -> None:
        """Uploads those of the files that lie here, but for those just shared."""
        shared = self._just_shared(folder)
        here = {name: entry for name, entry in files.items() if shared.get(name) != entry and is_there(folder / name)}
        self._store.upload({object_key(job_id, entry): folder / name for name, entry in here.items()})
        self._shared = None

    def share(self, job_id: str, folder: Path, token: int) -> Files:
        """Uploads all files of a folder that is soon sealed; `files_of` and `send` need not read them again."""
        files = _files_of(folder, {}, token)
        self.send(job_id, folder, files)
        self._shared = (folder, files)
        return files

    def files_of(self, folder: Path, token: int) -> Files:
        """Size, SHA-256 and token of each file of a folder, but for its manifest."""
        return _files_of(folder, self._just_shared(folder), token)

    def _just_shared(self, folder: Path) -> Files:
        return self._shared[1] if self._shared is not None and self._shared[0] == folder else {}

    def bring(self, state: str, folder: Path, files: Files) -> list[str]:
        """Downloads what is missing or changed here; returns what is damaged in the bucket."""
        damaged = sorted(files)
        for _ in range(2):  # a damaged copy is downloaded again
            lacking = [name for name, entry in files.items() if _size(folder / name) != entry["size"]]
            self.download({(folder / name): object_key(state, files[name]) for name in lacking})
            damaged = changed_files(folder, files)
            if not damaged:
                break
            with storage_errors(folder):
                for name in damaged:
                    (folder / name).unlink(missing_ok=True)
        return damaged

    def download(self, files: Mapping[Path, str]) -> None:
        """Reads keys into files; a key that is not there leaves no file."""
        for folder in {file.parent for file in files}:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self._store.download(files)


def object_key(state: str, entry: Mapping[str, Any]) -> str:
    """Key of a file by its manifest's entry."""
    return f"objects/{state}/{entry.get('token', 0):06d}/{entry['sha256']}"


def token_of_key(key: str) -> int:
    """The token of the writer that uploaded an object; -1 where its key tells none."""
    *_, token, _ = key.split("/")
    return int(token) if token.isdecimal() and len(token) < 64 else -1


def _files_of(folder: Path, known: Files, token: int) -> Files:
    found: Files = {}
    with storage_errors(folder):
        for name in list_files(folder):
            if name != storage.MANIFEST:
                sha = known[name]["sha256"] if name in known else file_sha256(folder / name)
                found[name] = {"sha256": sha, "size": steady((folder / name).stat).st_size, "token": token}
    return found


def whole_manifest(data: bytes | None) -> dict[str, Any] | None:
    """A manifest as it was written; None where there is none or it is damaged."""
    found = parse_json(data)
    files = found.get("files") if found else None
    return found if found and isinstance(files, dict) and digest(files) == found.get("sha256") else None


def _size(file: Path) -> int:
    about = stat_of(file)
    return -1 if about is None else about.st_size
