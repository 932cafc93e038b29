"""S3Backend: a storage in a bucket; objects by content, named by one manifest, and a copy of what is needed here.

```
manifests/STATE.json          makes a state finished: name, size and SHA-256 of each file, small files in full
cells/EXPERIMENT/CELL.json    a cell's record and the addresses of its files, for people
objects/STATE/TOKEN/SHA256    files of a state or of its in-stage checkpoints, as the holder of a token wrote them
aside/STATE.json              a manifest that a gc has deleted while it asks who wants the state
work/JOB/step_000200.json     manifest of an in-stage checkpoint
work/JOB/metrics.jsonl …      metrics and logs of a stage run under way, as of its last checkpoint
work/JOB/shared/FOLDER/NODE.json   what another machine put into an unsealed folder
logs/JOB/log.txt              what a finished job printed
```
Objects are there before the manifest that names them, so a reader never sees a part of a state.

This machine's copies (`~/.cache/llavolta/ledger`) may be deleted whenever nothing runs; `ledger gc` clears what was not
used for long. Files are compared by content, never by time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from typing_extensions import override

from orchestrator.errors import StorageError, UsageError
from orchestrator.plan.identity import cache_folder, digest, file_sha256
from orchestrator.plan.io_retry import retry_io
from orchestrator.plan.ledger.backends.base import (
    PARTS,
    Backend,
    Leftover,
    Part,
    files_of,
    step_name,
    steps_in,
    superseded,
    token_in,
    without,
)
from orchestrator.plan.ledger.backends.folder import FolderBackend
from orchestrator.plan.ledger.files import (
    MANIFEST,
    Files,
    changed_files,
    dump_json,
    files_below,
    is_there,
    list_files,
    manifest_of,
    names_in,
    parse_json,
    parse_manifest,
    read_manifest,
    stat_of,
    storage_errors,
    write_copy,
    write_json,
)
from orchestrator.plan.ledger.process import machine_id

_AT_ONCE = 8
_DELETE_AT_ONCE = 1000  # the most that one request may name
_ABSENT = {"NoSuchKey", "404"}
ATTEMPTS = 7  # pauses of up to 1, 2, 4, … 32 seconds between them
_CONNECTIONS = 32
_SMALL = ("job.json", "result.json")
_LOOK_SECONDS = 5.0
_LISTED = ("manifests/", "evaluations/", "failures/", "work/")
_ADVICE = {
    "NoSuchBucket": "there is no such bucket; make it, or correct cluster.storage_path",
    "AccessDenied": "access is denied; the credentials in use need to list, read, write and delete there",
    "403": "access is denied; the credentials in use need to list, read, write and delete there",
    "InvalidAccessKeyId": "the server does not know the access key in use",
    "SignatureDoesNotMatch": "the secret key in use does not fit its access key",
    "ExpiredToken": "the session's credentials have expired; renew them",
}


def s3_client() -> Any:
    """Return a client for S3 or the server that AWS_ENDPOINT_URL names; safe to share between threads."""
    import boto3
    from botocore.config import Config

    own_server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        # "standard" gives up within a second once some dozen requests had to be repeated: no server restarts that fast.
        retries={"mode": "legacy", "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS") or ATTEMPTS)},
        max_pool_connections=_CONNECTIONS,
        connect_timeout=10,
        read_timeout=60,
        # Servers of one's own seldom have a host name for each bucket.
        s3={"addressing_style": "path"} if own_server else {},
    )
    return boto3.session.Session().client("s3", config=config)


@contextlib.contextmanager
def s3_errors(where: str) -> Iterator[None]:
    """Turn what boto3 raises while working at an address into a StorageError that says what to do.

    Raises:
        StorageError: no credentials, no such bucket, access denied, no server, …
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StorageError(
            f"{where}: boto3 found no complete AWS credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "AWS_PROFILE, or use a machine with a role"
        ) from error
    except ClientError as error:
        code, answer = error_code(error), error.response.get("Error", {}).get("Message")
        raise StorageError(f"{where}: {_ADVICE.get(code) or answer or code}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"{where}: {error}. Finished work is safe; see that the server can be reached (AWS_ENDPOINT_URL names "
            "one that is not Amazon's), then run again"
        ) from error


def error_code(error: Any) -> str:
    """Return the server's error code, such as `NoSuchKey`."""
    return str(error.response.get("Error", {}).get("Code", ""))


class Snapshot:
    """Values of the listed kinds as one listing found them; what is not listed is not asked for.

    Values are kept on disk by their ETag, so that the next plan on this machine asks for new ones only; a value
    written meanwhile by this process is asked for again.

    Args:
        listed: Key to ETag, of all values of these kinds.
        read: Reads a value from the bucket.
        folder: Where values are kept.

    Raises:
        StorageError: the bucket cannot be read or the folder cannot be written.
    """

    def __init__(self, listed: Mapping[str, str], read: Callable[[str], bytes | None], folder: Path) -> None:
        self._listed, self._read, self._folder = listed, read, folder
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
            list(pool.map(self.read, new))

    def covers(self, key: str) -> bool:
        """Return True where the listing says whether a key is there."""
        return key.startswith(_LISTED)

    def read(self, key: str) -> bytes | None:
        """Return a covered value; None where there was none."""
        if key not in self._listed:
            return None
        if key not in self._values:
            self._values[key] = self._load(key, self._folder / _file_name(self._listed[key]))
        return self._values[key]

    def names(self, prefix: str) -> list[str]:
        """Return the names directly below a covered prefix, sorted."""
        return sorted(self._children.get(prefix, ()))

    def _load(self, key: str, file: Path) -> bytes | None:
        try:
            return file.read_bytes()
        except OSError:  # a copy only: the bucket has it
            value = self._read(key)
        if value is not None:
            write_copy(file, value)
        return value


def _file_name(etag: str) -> str:
    return digest(etag)[:40]


class S3Backend(Backend):
    """A storage in a bucket, with a copy of what was needed or written in this machine's cache folder.

    Each writer has a prefix of its own, that of its token: what one that lost its lease uploads or deletes is never
    what the new holder's manifests name. The entry of a file in a manifest holds the token beside size and hash.

    Credentials, region and endpoint are found in boto3's own ways (environment, `~/.aws`, instance role;
    `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` for another server); none is kept or shown here. Requests that meet a
    busy or absent server are repeated with growing pauses, `AWS_MAX_ATTEMPTS` times at most (7: half a minute).

    Args:
        url: `s3://bucket/prefix`.

    Raises:
        UsageError: boto3 is not installed.
        StorageError: the URL names no bucket, or boto3's configuration is wrong.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        prefix = parts.path.strip("/")
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise StorageError(f"{url}: give s3://bucket/prefix")
        self.url = f"s3://{parts.netloc}/{prefix}".rstrip("/")
        self._bucket, self._prefix = parts.netloc, f"{prefix}/" if prefix else ""
        self._conditional = False
        self._view: Snapshot | None = None
        if importlib.util.find_spec("boto3") is None:
            raise UsageError(f"{url}: needs boto3; run: pip install 'llavolta-orchestrator[s3]'")
        with self._errors():
            self._client = s3_client()
        self._copy = FolderBackend(copies_folder() / digest(self.url)[:32])
        self.folder = self._copy.folder
        self._node = digest([machine_id(), str(self.folder)])[:16]
        self._known: dict[str, dict[str, Any]] = {}
        self._looked: dict[Path, float] = {}
        self._shared: tuple[Path, Files] | None = None

    # Small values --------------------------------------------------------------------------------------------------

    @override
    def read(self, key: str) -> bytes | None:
        view = self._view
        if view is not None and view.covers(key):
            return view.read(key)
        return self._read(key)

    def _read(self, key: str) -> bytes | None:
        with self._errors(key), self._absent_is_none():
            return self._get(key)
        return None

    @contextlib.contextmanager
    def _absent_is_none(self) -> Iterator[None]:
        try:
            yield
        except self._client.exceptions.ClientError as error:
            if error_code(error) not in _ABSENT:
                raise

    def _get(self, key: str) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        for more in range(ATTEMPTS - 1, -1, -1):
            try:
                found: bytes = self._client.get_object(**self._at(key))["Body"].read()
                return found
            except (HTTPClientError, IncompleteReadError):  # boto3 repeats requests, but not the reading of an answer
                if not more:
                    raise
        raise AssertionError("unreachable")

    @override
    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client.put_object(**self._at(key), Body=data)
        self._changed(key)

    @override
    def create(self, key: str, data: bytes) -> bool:
        if not self._conditional:
            probe = f"conditional-put/{secrets.token_hex(8)}"
            both = self._create(probe, b""), self._create(probe, b"")
            self.delete(probe)
            if both != (True, False):
                raise StorageError(
                    f"{self.url}: its server ignores conditional puts (If-None-Match), needed for locking "
                    "between drivers. Use a newer server, or a folder (local or NFS)"
                )
            self._conditional = True
        created = self._create(key, data)
        self._changed(key)
        return created

    def _create(self, key: str, data: bytes) -> bool:
        writer = secrets.token_hex(8)
        while True:
            with self._errors(key):
                try:
                    self._client.put_object(
                        **self._at(key), Body=data, IfNoneMatch="*", Metadata={"llavolta-writer": writer}
                    )
                    return True
                except self._client.exceptions.ClientError as error:
                    if error_code(error) == "ConditionalRequestConflict":  # another is being decided: ask again
                        continue
                    if error_code(error) != "PreconditionFailed":
                        raise
                    # A repeated request meets its own first attempt where only the answer was lost.
                    again = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
                    return bool(again) and self._writer(key) == writer

    def _writer(self, key: str) -> str | None:
        found: str | None = None
        with self._absent_is_none():
            found = self._client.head_object(**self._at(key))["Metadata"].get("llavolta-writer")
        return found

    @override
    def delete(self, key: str) -> None:
        with self._errors(key):
            self._client.delete_object(**self._at(key))
        self._changed(key)

    @override
    def names(self, prefix: str) -> list[str]:
        view, prefix = self._view, prefix.strip("/")
        if view is not None and view.covers(f"{prefix}/"):
            return view.names(prefix)
        begin = f"{self._prefix}{prefix}/"
        found: set[str] = set()
        for page in self._pages(begin, Delimiter="/"):
            found.update(entry["Key"][len(begin) :] for entry in page.get("Contents", ()))
            found.update(entry["Prefix"][len(begin) : -1] for entry in page.get("CommonPrefixes", ()))
        return sorted(found - {""})

    @override
    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Within it, values of the listed kinds are read as they were at its begin; a write here ends it early."""
        if self._view is not None:
            yield
            return
        listed = {key: str(entry["ETag"]) for prefix in _LISTED for key, entry in self._entries(prefix)}
        self._view = Snapshot(listed, self._read, self.folder / "etags")
        try:
            yield
        finally:
            self._view = None

    def _changed(self, key: str) -> None:
        if self._view is not None and self._view.covers(key):
            self._view = None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the keys at any depth below a prefix, to their sizes in bytes, by one listing."""
        return {key: int(entry["Size"]) for key, entry in self._entries(f"{prefix.strip('/')}/")}

    def upload(self, files: Mapping[str, Path]) -> None:
        """Write files under keys, several at once, large ones in parts."""
        self._transfer(self._client.upload_file, files.keys(), files.values())

    def download(self, files: Mapping[Path, str]) -> None:
        """Read keys into files, several at once; a key that is not there leaves no file."""
        for folder in {file.parent for file in files}:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self._transfer(self._client.download_file, files.values(), files.keys())

    def _transfer(self, one: Callable[..., None], keys: Iterable[str], files: Iterable[Path]) -> None:
        def transfer(key: str, file: Path) -> None:
            with self._errors(key), storage_errors(file.parent), self._absent_is_none():
                one(Bucket=self._bucket, Key=self._prefix + key, Filename=str(file))

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(transfer, keys, files))

    def delete_all(self, prefix: str) -> None:
        """Delete everything below a prefix."""
        self.delete_keys(self.sizes(prefix))

    def delete_keys(self, keys: Iterable[str]) -> None:
        """Delete values, many with one request."""
        named = [{"Key": self._prefix + key} for key in keys]
        with self._errors():
            for first in range(0, len(named), _DELETE_AT_ONCE):
                chosen = {"Objects": named[first : first + _DELETE_AT_ONCE], "Quiet": True}
                answer = self._client.delete_objects(Bucket=self._bucket, Delete=chosen)
                for left in answer.get("Errors", ())[:1]:
                    raise StorageError(f"{self.url}: {left['Key']} cannot be deleted: {left.get('Message')}")
        self._view = None

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _entries(self, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for page in self._pages(f"{self._prefix}{prefix}"):
            yield from ((entry["Key"][len(self._prefix) :], entry) for entry in page.get("Contents", ()))

    def _pages(self, prefix: str, **options: str) -> Iterator[Mapping[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2")
        with self._errors():
            yield from pages.paginate(Bucket=self._bucket, Prefix=prefix, **options)

    def _errors(self, key: str = "") -> contextlib.AbstractContextManager[None]:
        return s3_errors(f"{self.url}/{key}" if key else self.url)

    # Finished states -----------------------------------------------------------------------------------------------

    @override
    def states(self) -> list[str]:
        return self._ids("manifests")

    @override
    def is_complete(self, state: str) -> bool:
        return self._manifest(state) is not None  # an object is complete or not there at all

    @override
    def has(self, state: str, part: Part) -> bool:
        manifest = self._manifest(state)
        return manifest is not None and bool(files_of(part, manifest["files"]))

    @override
    def fetch(self, state: str, part: Part) -> list[str]:
        damaged: list[str] = []
        for _ in range(2):  # another commit may take its place meanwhile
            manifest = self._manifest(state)
            if manifest is None:
                return [MANIFEST]
            wanted = files_of(part, manifest["files"])
            folder = self.state_folder(state)
            damaged = self._fetch_files(state, folder, wanted) if wanted else [part]
            if not damaged:
                _keep_manifest(folder, manifest)
                with contextlib.suppress(OSError):  # not noted as used: it may be downloaded again some day
                    os.utime(folder)
                break
            self._known.pop(state, None)
        return damaged

    @override
    def small_file(self, state: str, name: str) -> Path:
        file = self.state_folder(state) / name
        if state not in self._known and is_there(self.work_folder(state) / name):
            return file  # under way on this machine; the live view asks several times a second
        manifest = self._manifest(state)
        if manifest is None:
            return file
        if name in manifest["files"]:
            wanted = {name: manifest["files"][name]}
            if name in manifest["small"] and changed_files(file.parent, wanted):
                write_copy(file, manifest["small"][name].encode())
            self._fetch_files(state, file.parent, wanted)
        elif not is_there(file):
            self.download({file: f"logs/{state}/{name}"})
        return file

    @override
    def write_manifest(self, folder: Path, known: Files) -> None:
        job_id, place = self._place(folder)
        files: Files = {}
        for name in self.names(f"work/{job_id}/shared/{place}"):
            if name != f"{self._node}.json":
                files |= parse_json(self.read(f"work/{job_id}/shared/{place}/{name}")) or {}
        files |= _files_of(folder, {**known, **self._just_shared(folder)}, token_in(folder))
        write_json(folder / MANIFEST, manifest_of(files))

    @override
    def commit(self, state: str, sealed: Path) -> None:
        files = read_manifest(sealed) or {}
        self._known.pop(state, None)
        before = self._manifest(state)
        if before is not None and self._are_stored(state, before["files"]):
            lacks = {part for part in PARTS if not self.has(state, part)}
            files = {name: entry for name, entry in files.items() if name.partition("/")[0] in lacks}
            if not files:
                return
            self._send(state, sealed, files)
            files, small = before["files"] | files, before["small"]
        else:
            self._send(state, sealed, files)
            small = {name: (sealed / name).read_text() for name in _SMALL if name in files}
        self._send_log(state)
        data = json.dumps({**manifest_of(files), "small": small}).encode()
        key = f"manifests/{state}.json"
        if before is not None or not self.create(key, data):
            self._known.pop(state, None)
            # Of several at once the first counts, unless it is damaged or holds less.
            if before is not None or self._manifest(state) is None:
                self.write(key, data)
        self._known.pop(state, None)
        self._copy.commit(state, sealed)

    @override
    def discard(self, state: str) -> None:
        self._known.pop(state, None)
        # The objects that it alone names go with it: others may be those of a writer at work.
        manifest = self._manifest(state) or {"files": {}}
        self.delete(f"manifests/{state}.json")
        self._known.pop(state, None)
        self.delete_keys(sorted(_keys(state, manifest["files"]) - self._named(state)))
        self._copy.discard(state)

    @override
    def recover(self, state: str) -> bool:
        data = self.read(f"aside/{state}.json")
        manifest = parse_manifest(data)
        is_back = False
        if data is not None and manifest is not None and self._are_stored(state, manifest["files"]):
            is_back = self.create(f"manifests/{state}.json", data)
            self._known.pop(state, None)
        if data is not None:
            self.delete(f"aside/{state}.json")
        return is_back

    @override
    def point_to(self, state: str, cell_folder: Path, record: dict[str, Any]) -> None:
        manifest = self._manifest(state) or {"files": {}}
        files = {name: f"{self.url}/{object_key(state, entry)}" for name, entry in manifest["files"].items()}
        place = cell_folder.relative_to(self.folder).as_posix()
        self.write(f"{place}.json", dump_json({**record, "state": state, "files": files}))

    # Stage runs under way ------------------------------------------------------------------------------------------

    @override
    def work_file(self, job_id: str, name: str) -> Path:
        """Return this machine's file, else as the last checkpoint left it."""
        file = self.work_folder(job_id) / name
        if is_there(file):
            return file
        copy = self.folder / "elsewhere" / job_id / name  # a stage run that begins here has a folder of its own
        now = time.monotonic()
        if now - self._looked.get(copy, -_LOOK_SECONDS) >= _LOOK_SECONDS:
            self._looked[copy] = now
            if name in self.names(f"work/{job_id}"):
                self.download({copy: f"work/{job_id}/{name}"})
        return copy if is_there(copy) else file

    @override
    def is_begun(self, job_id: str) -> bool:
        return is_there(self.work_folder(job_id)) or bool(self.names(f"work/{job_id}"))

    @override
    def begin(self, job_id: str, token: int) -> None:
        for place in self.names(f"work/{job_id}/shared"):
            if token_in(Path(place)) <= token:
                self.delete_all(f"work/{job_id}/shared/{place}")

    @override
    def share_progress(self, job_id: str) -> None:
        self._share_files(job_id, "*.jsonl", "*.txt")

    @override
    def share(self, folder: Path, known: Files) -> None:
        job_id, place = self._place(folder)
        for done in (*folder.parent.glob("step_*"), *folder.glob("step_*")):  # sealed by another machine, or given up
            if done != folder:
                shutil.rmtree(done, ignore_errors=True)
        files = _files_of(folder, known, token_in(folder))
        self._send(job_id, folder, files)
        self._shared = (folder, files)  # sealed soon: they need not be read and sent again
        self._share_files(job_id, "log_rank*.txt")
        self.write(f"work/{job_id}/shared/{place}/{self._node}.json", json.dumps(files).encode())

    @override
    def seal_checkpoint(self, job_id: str, step: int, sealed: Path) -> Path:
        self._send(job_id, sealed, read_manifest(sealed) or {})
        self.share_progress(job_id)
        self.write(_step_key(job_id, step), (sealed / MANIFEST).read_bytes())
        return self._copy.seal_checkpoint(job_id, step, sealed)

    @override
    def prune(self, job_id: str, step: int, keep: int, token: int) -> None:
        for other in superseded(self.steps(job_id), step, keep):
            found = self._listed(_step_key(job_id, other)) or {}
            if all(entry.get("token", 0) <= token for entry in found.values()):  # others are a later holder's
                self.delete(_step_key(job_id, other))
                self._copy.drop_step(job_id, other)
        self._sweep(job_id, token)

    @override
    def steps(self, job_id: str) -> list[int]:
        return steps_in([name for name in self.names(f"work/{job_id}") if name.endswith(".json")])

    @override
    def checkpoints(self, job_id: str) -> Iterator[Path]:
        for step in self.steps(job_id):
            folder = self.work_folder(job_id) / step_name(step)
            if not self._fetch_checkpoint(folder):
                yield folder

    @override
    def download_checkpoint(self, folder: Path) -> None:
        """Download a checkpoint that is trained on from, and the metrics until it."""
        if damaged := self._fetch_checkpoint(folder):
            raise StorageError(f"{self.url}: {folder.name} of {folder.parent.name} is damaged: {damaged[:3]}")
        job_id, name = folder.parent.name, "metrics.jsonl"
        self.download({folder.parent / name: f"work/{job_id}/{name}"})

    @override
    def end_work(self, job_id: str, token: int | None = None) -> None:
        newest, key = self.token_of(job_id) if token is None else None, f"work/{job_id}/log.txt"
        if token is not None:
            self._send_log(job_id)
        elif self.files(job_id) is not None and not self.names(f"logs/{job_id}") and (log := self.read(key)):
            self.write(f"logs/{job_id}/log.txt", log)
        self.delete_all(f"work/{job_id}")
        self._sweep(job_id, token, newest)
        if token is not None:
            self._copy.end_work(job_id, token)

    # What can be verified and deleted; this machine's copy is not looked at -------------------------------

    @override
    def files(self, state: str) -> Files | None:
        return self._listed(f"manifests/{state}.json")

    @override
    def when(self, state: str) -> float | None:
        return None  # a listing of the bucket does not say it here

    @override
    def damaged(self, state: str) -> list[str]:
        return self._damaged(state, f"manifests/{state}.json")

    @override
    def damaged_step(self, job: str, step: int) -> list[str]:
        return self._damaged(job, _step_key(job, step))

    @override
    def work(self) -> dict[str, int]:
        found = {}
        for job in self.names("work"):
            steps = _keys(job, *(self._listed(_step_key(job, step)) or {} for step in self.steps(job)))
            state = _keys(job, self.files(job) or {})
            own = sum(size for key, size in self.sizes(f"objects/{job}").items() if key in steps and key not in state)
            found[job] = own + sum(self.sizes(f"work/{job}").values())
        return found

    @override
    def take_out(self, state: str, is_wanted: Callable[[], bool]) -> bool:
        key, aside = f"manifests/{state}.json", f"aside/{state}.json"
        data, newest = self.read(key), self.token_of(state)
        if data is None:
            return False
        self.write(aside, data)
        self.delete(key)
        if is_wanted():
            self.create(key, data)  # trained again meanwhile: then that one counts
            self.delete(aside)
            return False
        self._settle(state, newest)
        return True

    @override
    def aside(self) -> list[str]:
        return self._ids("aside")

    @override
    def drop(self, state: str, part: Part) -> None:
        key = f"manifests/{state}.json"
        found = parse_manifest(self.read(key))
        if found is None:
            return
        newest = self.token_of(state)
        self.write(key, json.dumps({**found, **manifest_of(without(part, found["files"]))}).encode())
        self._sweep(state, newest=newest)

    @override
    def drop_step(self, job: str, step: int) -> None:
        newest = self.token_of(job)
        self.delete(_step_key(job, step))
        self._sweep(job, newest=newest)

    @override
    def leftovers(self, is_held: Callable[[str], bool], older_seconds: float) -> Iterator[Leftover]:
        """Yield the objects that neither a state nor an in-stage checkpoint names; who writes them holds a lease."""
        for state in self.aside():  # of a gc that was killed; who wants one has had it put back
            if not is_held(state):
                yield Leftover(f"aside/{state}.json", 0, partial(self._settle, state, self.token_of(state)))
        for job in self.names("objects"):
            if not is_held(job) and (size := sum(self._unnamed(job).values())):
                yield Leftover(f"objects/{job}", size, partial(self._sweep, job, newest=self.token_of(job)))

    def _settle(self, state: str, newest: int) -> None:
        self.delete(f"aside/{state}.json")
        self._sweep(state, newest=newest)

    def _sweep(self, job: str, token: int | None = None, newest: int | None = None) -> None:
        """Delete the objects that nothing names.

        Args:
            token: The writer's: objects of a later holder, which are not named yet, stay. None for a gc.
            newest: The token that a gc saw before: nothing goes once a driver was given another since.
        """
        self._known.pop(job, None)
        unnamed = self._unnamed(job, token)
        if newest is None or self.token_of(job) == newest:
            self.delete_keys(unnamed)

    def _unnamed(self, job: str, token: int | None = None) -> dict[str, int]:
        # Listed first: what is uploaded after that cannot be taken for what nobody names.
        stored = self.sizes(f"objects/{job}")
        if token is not None:
            stored = {key: size for key, size in stored.items() if _token_of_key(key) <= token}
        named = self._named(job) if stored else set()
        return {key: size for key, size in stored.items() if key not in named}

    def _named(self, job: str) -> set[str]:
        """Return the objects that the state, one that a gc took aside, or an in-stage checkpoint names."""
        keys = (f"manifests/{job}.json", f"aside/{job}.json", *(_step_key(job, step) for step in self.steps(job)))
        return _keys(job, *(self._listed(key) or {} for key in keys))

    def _damaged(self, job: str, key: str) -> list[str]:
        files = self._listed(key)
        if files is None:
            return [MANIFEST]
        bad: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            for name, entry in files.items():  # one at a time: the largest decides what disk it takes
                copy = Path(folder) / "object"
                copy.unlink(missing_ok=True)
                self.download({copy: object_key(job, entry)})
                if _size(copy) != entry["size"] or file_sha256(copy) != entry["sha256"]:
                    bad.append(name)
        return bad

    # Manifests and objects ------------------------------------------------------------------------------------------

    def _ids(self, prefix: str) -> list[str]:
        return [name.removesuffix(".json") for name in self.names(prefix)]

    def _listed(self, key: str) -> Files | None:
        found = parse_manifest(self.read(key))
        return found["files"] if found is not None else None

    def _manifest(self, state: str) -> dict[str, Any] | None:
        """Return a state's manifest; one that was found is kept."""
        if state not in self._known:
            found = parse_manifest(self.read(f"manifests/{state}.json"))
            if found is None:
                return None
            self._known[state] = found
        return self._known[state]

    def _are_stored(self, state: str, files: Files) -> bool:
        """Return True where all files are there with their sizes."""
        sizes = self.sizes(f"objects/{state}")
        return all(sizes.get(object_key(state, entry)) == entry["size"] for entry in files.values())

    def _send(self, job_id: str, folder: Path, files: Files) -> None:
        """Upload those of the files that lie here, but for those just shared."""
        shared = self._just_shared(folder)
        here = {name: entry for name, entry in files.items() if shared.get(name) != entry and is_there(folder / name)}
        self.upload({object_key(job_id, entry): folder / name for name, entry in here.items()})
        self._shared = None

    def _just_shared(self, folder: Path) -> Files:
        return self._shared[1] if self._shared is not None and self._shared[0] == folder else {}

    def _fetch_files(self, state: str, folder: Path, files: Files) -> list[str]:
        """Download what is missing or changed here; return what is damaged in the bucket."""
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

    def _fetch_checkpoint(self, folder: Path) -> list[str]:
        job_id = folder.parent.name
        manifest = parse_manifest(self.read(f"work/{job_id}/{folder.name}.json"))
        if manifest is None:
            return [MANIFEST]
        if damaged := self._fetch_files(job_id, folder, manifest["files"]):
            return damaged
        _keep_manifest(folder, manifest)
        return []

    def _send_log(self, job_id: str) -> None:
        log = self.work_folder(job_id) / "log.txt"
        if is_there(log):
            self.upload({f"logs/{job_id}/log.txt": log})

    def _share_files(self, job_id: str, *patterns: str) -> None:
        files = [file for pattern in patterns for file in self.work_folder(job_id).glob(pattern)]
        self.upload({f"work/{job_id}/{file.name}": file for file in files if not file.name.startswith(".")})

    def _place(self, folder: Path) -> tuple[str, str]:
        job_id, *rest = folder.relative_to(self.folder / "work").parts
        return job_id, "/".join(rest).replace(".writing", "writing")


@dataclass(frozen=True)
class Copy:
    """One state's files, one stage run's, or one small value on this machine, which the bucket has or had.

    Attributes:
        storage: Folder of all copies of one bucket's storage.
        kind: `stage_runs`, `work`, `elsewhere` or `etags`.
        used: When it was last written or fetched, by this machine's clock.
    """

    storage: Path
    kind: str
    name: str
    path: Path
    size: int
    used: float


def copies_folder() -> Path:
    """Return where all copies of buckets are on this machine."""
    return cache_folder() / "ledger"


def copies() -> Iterator[Copy]:
    """Yield all copies on this machine, of whatever bucket."""
    base = copies_folder()
    for storage in names_in(base):
        for kind in ("stage_runs", "work", "elsewhere", "etags"):
            for name in names_in(base / storage / kind):
                path = base / storage / kind / name
                if found := [about for _, about in files_below(path)]:
                    size, used = sum(about.st_size for about in found), max(about.st_mtime for about in found)
                    yield Copy(base / storage, kind, name, path, size, used)


def object_key(state: str, entry: Mapping[str, Any]) -> str:
    """Return the key of a file by its manifest's entry."""
    return f"objects/{state}/{entry.get('token', 0):06d}/{entry['sha256']}"


def _keys(state: str, *manifests: Files) -> set[str]:
    return {object_key(state, entry) for files in manifests for entry in files.values()}


def _step_key(job: str, step: int) -> str:
    return f"work/{job}/{step_name(step)}.json"


def _token_of_key(key: str) -> int:
    """Return the token of the writer that uploaded an object; -1 where its key has none."""
    *_, token, _ = key.split("/")
    return int(token) if token.isdecimal() and len(token) < 64 else -1


def _files_of(folder: Path, known: Files, token: int) -> Files:
    """Return the size, SHA-256 and token of each file of a folder, but for its manifest."""
    found: Files = {}
    with storage_errors(folder):
        for name in list_files(folder):
            if name != MANIFEST:
                sha = known[name]["sha256"] if name in known else file_sha256(folder / name)
                found[name] = {"sha256": sha, "size": retry_io((folder / name).stat).st_size, "token": token}
    return found


def _keep_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    if read_manifest(folder) != manifest["files"]:
        write_json(folder / MANIFEST, {name: manifest[name] for name in ("files", "sha256")})


def _size(file: Path) -> int:
    about = stat_of(file)
    return -1 if about is None else about.st_size
