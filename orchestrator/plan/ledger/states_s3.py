"""Where finished states and sealed in-stage checkpoints lie in a bucket: objects by content, named by one manifest.

```
manifests/STATE.json          makes a state finished: name, size and SHA-256 of each file, small files whole
cells/EXPERIMENT/CELL.json    a cell's record and the addresses of its files, for people
objects/STATE/TOKEN/SHA256    files of a state or of its in-stage checkpoints, as the holder of a token wrote them
aside/STATE.json              a manifest that a gc has taken away while it asks who wants the state
work/JOB/step_000200.json     manifest of an in-stage checkpoint
work/JOB/metrics.jsonl …      what a stage run under way told by its last checkpoint
work/JOB/shared/FOLDER/NODE.json   what another machine put into an unsealed folder
logs/JOB/log.txt              what a finished job printed
```
Objects are there before the manifest that names them, so a reader never sees a part of a state.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.plan.identity import digest, file_sha256
from orchestrator.plan.io_retry import retry_io
from orchestrator.plan.ledger.copies import copies_folder, mark_used
from orchestrator.plan.ledger.files import (
    MANIFEST,
    changed_files,
    dump_json,
    is_there,
    list_files,
    parse_json,
    read_manifest,
    stat_of,
    storage_errors,
    write_json,
)
from orchestrator.plan.ledger.heartbeat import machine_id
from orchestrator.plan.ledger.states import PARTS, Files, FolderStates, Part, superseded, token_in
from orchestrator.plan.ledger.store import Store
from orchestrator.plan.ledger.store_s3 import S3Store


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
        """Return True where all files are there with their sizes."""
        sizes = self._store.sizes(f"objects/{state}")
        return all(sizes.get(object_key(state, entry)) == entry["size"] for entry in files.values())

    def send(self, job_id: str, folder: Path, files: Files) -> None:
        """Upload those of the files that lie here, but for those just shared."""
        shared = self._just_shared(folder)
        here = {name: entry for name, entry in files.items() if shared.get(name) != entry and is_there(folder / name)}
        self._store.upload({object_key(job_id, entry): folder / name for name, entry in here.items()})
        self._shared = None

    def share(self, job_id: str, folder: Path, token: int) -> Files:
        """Upload all files of a folder that is soon sealed; `files_of` and `send` need not read them again."""
        files = _files_of(folder, {}, token)
        self.send(job_id, folder, files)
        self._shared = (folder, files)
        return files

    def files_of(self, folder: Path, token: int) -> Files:
        """Return the size, SHA-256 and token of each file of a folder, but for its manifest."""
        return _files_of(folder, self._just_shared(folder), token)

    def _just_shared(self, folder: Path) -> Files:
        return self._shared[1] if self._shared is not None and self._shared[0] == folder else {}

    def bring(self, state: str, folder: Path, files: Files) -> list[str]:
        """Download what is missing or changed here; returns what is damaged in the bucket."""
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
        """Read keys into files; a key that is not there leaves no file."""
        for folder in {file.parent for file in files}:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self._store.download(files)


def object_key(state: str, entry: Mapping[str, Any]) -> str:
    """Return the key of a file by its manifest's entry."""
    return f"objects/{state}/{entry.get('token', 0):06d}/{entry['sha256']}"


def token_of_key(key: str) -> int:
    """Return the token of the writer that uploaded an object; -1 where its key tells none."""
    *_, token, _ = key.split("/")
    return int(token) if token.isdecimal() and len(token) < 64 else -1


def _files_of(folder: Path, known: Files, token: int) -> Files:
    found: Files = {}
    with storage_errors(folder):
        for name in list_files(folder):
            if name != MANIFEST:
                sha = known[name]["sha256"] if name in known else file_sha256(folder / name)
                found[name] = {"sha256": sha, "size": retry_io((folder / name).stat).st_size, "token": token}
    return found


def whole_manifest(data: bytes | None) -> dict[str, Any] | None:
    """Return a manifest as it was written; None where there is none or it is damaged."""
    found = parse_json(data)
    files = found.get("files") if found else None
    return found if found and isinstance(files, dict) and digest(files) == found.get("sha256") else None


def _size(file: Path) -> int:
    about = stat_of(file)
    return -1 if about is None else about.st_size


_STEP = re.compile(r"step_([0-9]+)\.json")
_SMALL = ("job.json", "result.json")
_LOOK_SECONDS = 5.0
_LISTED = ("manifests", "evaluations", "failures", "work")


class S3States(FolderStates):
    """States of a storage in a bucket, with a copy of what was needed or written in this machine's cache folder.

    The copy may be deleted whenever nothing runs; `ledger gc` clears what was not used for long.
    Names of files are told apart by content, never by time.

    Args:
        store: The bucket's store.
    """

    def __init__(self, store: Store) -> None:
        assert isinstance(store, S3Store)
        super().__init__(copies_folder() / digest(store.url)[:32])
        self._store = store
        self._node = digest([machine_id(), str(self.folder)])[:16]
        self._known: dict[str, dict[str, Any]] = {}
        self._objects = S3Objects(store)
        self._looked: dict[Path, float] = {}

    def snapshot(self) -> AbstractContextManager[None]:
        """Within it, questions about many states are answered from one listing."""
        return self._store.snapshot(_LISTED, self.folder / "etags")

    def names(self) -> list[str]:
        """Return all states, sorted."""
        return [name.removesuffix(".json") for name in self._store.names("manifests")]

    def is_whole(self, state: str) -> bool:
        """Return True where a state's manifest is there; an object is whole or not there at all."""
        return self._manifest(state) is not None

    def has(self, state: str, part: Part) -> bool:
        """Return True where a finished state has its weights, or its full checkpoint."""
        manifest = self._manifest(state)
        return manifest is not None and any(name.startswith(f"{part}/") for name in manifest["files"])

    def small_file(self, state: str, name: str) -> Path:
        """Return a small file of a finished state, brought here if it is not; it need not exist."""
        file = self.state_folder(state) / name
        if state not in self._known and is_there(self.work_folder(state) / name):
            return file  # under way on this machine; the live view asks several times a second
        manifest = self._manifest(state)
        if manifest is None:
            return file
        if name in manifest["files"]:
            wanted = {name: manifest["files"][name]}
            if name in manifest["small"] and changed_files(file.parent, wanted):
                _write(file, manifest["small"][name].encode())
            self._objects.bring(state, file.parent, wanted)
        elif not is_there(file):
            self._objects.download({file: f"logs/{state}/{name}"})
        return file

    def work_file(self, job_id: str, name: str) -> Path:
        """Return the metrics or log of a stage run under way: this machine's, else as its last checkpoint left them."""
        file = self.work_folder(job_id) / name
        if is_there(file):
            return file
        copy = self.folder / "elsewhere" / job_id / name  # a stage run that begins here has a folder of its own
        now = time.monotonic()
        if now - self._looked.get(copy, -_LOOK_SECONDS) >= _LOOK_SECONDS:
            self._looked[copy] = now
            if name in self._store.names(f"work/{job_id}"):
                self._objects.download({copy: f"work/{job_id}/{name}"})
        return copy if is_there(copy) else file

    def is_begun(self, job_id: str) -> bool:
        """Return True where a stage run is under way."""
        return is_there(self.work_folder(job_id)) or bool(self._store.names(f"work/{job_id}"))

    def begin(self, job_id: str, token: int) -> None:
        """Forget what machines of earlier attempts shared."""
        for place in self._store.names(f"work/{job_id}/shared"):
            if token_in(Path(place)) <= token:
                self._store.delete_all(f"work/{job_id}/shared/{place}")

    def fetch(self, state: str, part: Part) -> list[str]:
        """Download what is missing of a part, and reads every byte of it."""
        damaged: list[str] = []
        for _ in range(2):  # another commit may take its place meanwhile
            manifest = self._manifest(state)
            if manifest is None:
                return [MANIFEST]
            wanted = {name: entry for name, entry in manifest["files"].items() if name.startswith(f"{part}/")}
            folder = self.state_folder(state)
            damaged = self._objects.bring(state, folder, wanted) if wanted else [part]
            if not damaged:
                _keep_manifest(folder, manifest)
                mark_used(folder)
                break
            self._known.pop(state, None)
        return damaged

    def point_to(self, state: str, cell_folder: Path, record: dict[str, Any]) -> None:
        """Write `cells/EXPERIMENT/CELL.json`: the cell's record, and the address of each file of its state."""
        manifest = self._manifest(state) or {"files": {}}
        files = {name: f"{self._store.url}/{object_key(state, entry)}" for name, entry in manifest["files"].items()}
        place = cell_folder.relative_to(self.folder).as_posix()
        self._store.write(f"{place}.json", dump_json({**record, "state": state, "files": files}))

    def share(self, folder: Path) -> None:
        """Upload what this machine wrote into an unsealed folder, and lists it for the machine that seals it."""
        job_id, place = self._place(folder)
        for done in (*folder.parent.glob("step_*"), *folder.glob("step_*")):  # sealed by another machine, or given up
            if done != folder:
                shutil.rmtree(done, ignore_errors=True)
        files = self._objects.share(job_id, folder, token_in(folder))
        self._tell(job_id, "log_rank*.txt")
        self._store.write(f"work/{job_id}/shared/{place}/{self._node}.json", json.dumps(files).encode())

    def tell(self, job_id: str) -> None:
        """Upload what a stage run under way told on this machine, so that curves and logs outlive it."""
        self._tell(job_id, "*.jsonl", "*.txt")

    def write_manifest(self, folder: Path) -> None:
        """List all files of an unsealed folder, also other machines'."""
        job_id, place = self._place(folder)
        files: Files = {}
        for name in self._store.names(f"work/{job_id}/shared/{place}"):
            if name != f"{self._node}.json":
                files |= parse_json(self._store.read(f"work/{job_id}/shared/{place}/{name}")) or {}
        files |= self._objects.files_of(folder, token_in(folder))
        write_json(folder / MANIFEST, {"files": files, "sha256": digest(files)})

    def commit(self, state: str, sealed: Path) -> None:
        """Upload a folder with a manifest; of a state that is there and whole only the parts that it lacks."""
        files = read_manifest(sealed) or {}
        self._known.pop(state, None)
        before = self._manifest(state)
        if before is not None and self._objects.are_stored(state, before["files"]):
            lacks = {part for part in PARTS if not self.has(state, part)}
            files = {name: entry for name, entry in files.items() if name.partition("/")[0] in lacks}
            if not files:
                return
            self._objects.send(state, sealed, files)
            files, small = before["files"] | files, before["small"]
        else:
            self._objects.send(state, sealed, files)
            small = {name: (sealed / name).read_text() for name in _SMALL if name in files}
        self._send_log(state)
        data = json.dumps({"files": files, "sha256": digest(files), "small": small}).encode()
        key = f"manifests/{state}.json"
        if before is not None or not self._store.create(key, data):
            self._known.pop(state, None)
            # Of several at once the first counts, unless it is damaged or holds less.
            if before is not None or self._manifest(state) is None:
                self._store.write(key, data)
        self._known.pop(state, None)
        super().commit(state, sealed)

    def end_work(self, job_id: str, token: int) -> None:
        """Upload the log, and take away what the finished state does not name."""
        self._send_log(job_id)
        self._store.delete_all(f"work/{job_id}")
        self._sweep(job_id, token)
        super().end_work(job_id, token)

    def seal_checkpoint(self, job_id: str, step: int, sealed: Path) -> Path:
        """Upload an in-stage checkpoint."""
        self._objects.send(job_id, sealed, read_manifest(sealed) or {})
        self.tell(job_id)
        self._store.write(f"work/{job_id}/step_{step:06d}.json", (sealed / MANIFEST).read_bytes())
        return super().seal_checkpoint(job_id, step, sealed)

    def prune(self, job_id: str, step: int, keep: int, token: int) -> None:
        """Take in-stage checkpoints away that are superseded, but for those of a later holder."""
        for other in superseded(self.steps(job_id), step, keep):
            key = f"work/{job_id}/step_{other:06d}.json"
            found = whole_manifest(self._store.read(key)) or {"files": {}}
            if all(entry.get("token", 0) <= token for entry in found["files"].values()):
                self._store.delete(key)
                shutil.rmtree(self.work_folder(job_id) / f"step_{other:06d}", ignore_errors=True)
        self._sweep(job_id, token)

    def steps(self, job_id: str) -> list[int]:
        """Return the steps of the sealed in-stage checkpoints, newest first; they may be damaged."""
        found = (_STEP.fullmatch(name) for name in self._store.names(f"work/{job_id}"))
        return sorted((int(fit.group(1)) for fit in found if fit), reverse=True)

    def checkpoints(self, job_id: str) -> Iterator[Path]:
        """In-stage checkpoints, downloaded, newest first, every byte read; a damaged one is passed over."""
        for step in self.steps(job_id):
            folder = self.work_folder(job_id) / f"step_{step:06d}"
            if not self._bring_checkpoint(folder):
                yield folder

    def bring_checkpoint(self, folder: Path) -> None:
        """Download a checkpoint that is trained on from, and the metrics until it."""
        if damaged := self._bring_checkpoint(folder):
            raise StorageError(f"{self._store.url}: {folder.name} of {folder.parent.name} is damaged: {damaged[:3]}")
        job_id, name = folder.parent.name, "metrics.jsonl"
        self._objects.download({folder.parent / name: f"work/{job_id}/{name}"})

    def discard(self, state: str) -> None:
        """Take a state away, with the objects that it alone names: others may be those of a writer at work."""
        self._known.pop(state, None)
        manifest = self._manifest(state) or {"files": {}}
        self._store.delete(f"manifests/{state}.json")
        self._known.pop(state, None)
        keys = {object_key(state, entry) for entry in manifest["files"].values()}
        self._store.delete_keys(sorted(keys - self._named(state)))
        super().discard(state)

    def recover(self, state: str) -> bool:
        """Put a manifest back that a gc took aside, and was killed before it had asked who wants the state."""
        data = self._store.read(f"aside/{state}.json")
        manifest = whole_manifest(data)
        is_back = False
        if data is not None and manifest is not None and self._objects.are_stored(state, manifest["files"]):
            is_back = self._store.create(f"manifests/{state}.json", data)
            self._known.pop(state, None)
        if data is not None:
            self._store.delete(f"aside/{state}.json")
        return is_back

    def _manifest(self, state: str) -> dict[str, Any] | None:
        if state not in self._known:
            found = whole_manifest(self._store.read(f"manifests/{state}.json"))
            if found is None:
                return None
            self._known[state] = found
        return self._known[state]

    def _bring_checkpoint(self, folder: Path) -> list[str]:
        job_id = folder.parent.name
        manifest = whole_manifest(self._store.read(f"work/{job_id}/{folder.name}.json"))
        if manifest is None:
            return [MANIFEST]
        if damaged := self._objects.bring(job_id, folder, manifest["files"]):
            return damaged
        _keep_manifest(folder, manifest)
        return []

    def _sweep(self, job_id: str, token: int) -> None:
        """Take objects away that nothing names, but for those of a later holder, which are not named yet."""
        self._known.pop(job_id, None)
        # Listed first: what is uploaded after that cannot be taken for what nobody names.
        stored = [key for key in self._store.sizes(f"objects/{job_id}") if token_of_key(key) <= token]
        named = self._named(job_id) if stored else set()
        self._store.delete_keys(key for key in stored if key not in named)

    def _named(self, job_id: str) -> set[str]:
        manifests = [self._manifest(job_id)]
        manifests += [
            whole_manifest(self._store.read(f"work/{job_id}/step_{step:06d}.json")) for step in self.steps(job_id)
        ]
        return {object_key(job_id, entry) for found in manifests if found for entry in found["files"].values()}

    def _send_log(self, job_id: str) -> None:
        log = self.work_folder(job_id) / "log.txt"
        if is_there(log):
            self._store.upload({f"logs/{job_id}/log.txt": log})

    def _tell(self, job_id: str, *patterns: str) -> None:
        told = [file for pattern in patterns for file in self.work_folder(job_id).glob(pattern)]
        self._store.upload({f"work/{job_id}/{file.name}": file for file in told if not file.name.startswith(".")})

    def _place(self, folder: Path) -> tuple[str, str]:
        job_id, *rest = folder.relative_to(self.folder / "work").parts
        return job_id, "/".join(rest).replace(".writing", "writing")


def _keep_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    if read_manifest(folder) != manifest["files"]:
        write_json(folder / MANIFEST, {name: manifest[name] for name in ("files", "sha256")})


def _write(file: Path, data: bytes) -> None:
    """Return a copy of what the bucket holds: quicker than a file that must outlive a power cut."""
    part = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
    with storage_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(file)
