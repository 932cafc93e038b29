"""Bucket: small values and files by key in a bucket of S3, or of a server that speaks its language, through boto3."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from typing_extensions import override

from orchestrator.errors import StorageError, UsageError
from orchestrator.plan.identity import digest
from orchestrator.plan.ledger.backends.base import Backend
from orchestrator.plan.ledger.files import storage_errors, write_copy

_AT_ONCE = 8
_DELETE_AT_ONCE = 1000  # the most that one request may name
_ABSENT = {"NoSuchKey", "404"}
ATTEMPTS = 7  # pauses of up to 1, 2, 4, … 32 seconds between them
_CONNECTIONS = 32
_SAYS = {
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
        said = _SAYS.get(error_code(error)) or error.response.get("Error", {}).get("Message") or error_code(error)
        raise StorageError(f"{where}: {said}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"{where}: {error}. Finished work is safe; see that the server can be reached (AWS_ENDPOINT_URL names "
            "one that is not Amazon's), then run again"
        ) from error


def error_code(error: Any) -> str:
    """Return the server's word for what went wrong, such as `NoSuchKey`."""
    return str(error.response.get("Error", {}).get("Code", ""))


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
        """Return True where the listing says whether a key is there."""
        return key.startswith(self._prefixes)

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


class Bucket(Backend):
    """Keys below a bucket's prefix; `S3Backend` says what they hold.

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

    @contextlib.contextmanager
    def view_of(self, prefixes: Sequence[str], folder: Path) -> Iterator[None]:
        """Within it, values below `prefixes` are read as they were at its begin; a write of this store ends it early.

        Args:
            folder: Where values are kept for later views.
        """
        if self._view is not None:
            yield
            return
        cut = len(self._prefix)
        listed = {
            entry["Key"][cut:]: str(entry["ETag"])
            for prefix in prefixes
            for page in self._pages(f"{self._prefix}{prefix}/")
            for entry in page.get("Contents", ())
        }
        self._view = Snapshot(listed, prefixes, self._read, folder)
        try:
            yield
        finally:
            self._view = None

    def _changed(self, key: str) -> None:
        if self._view is not None and self._view.covers(key):
            self._view = None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the keys at any depth below a prefix, to their sizes in bytes, by one listing."""
        cut = len(self._prefix)
        pages = self._pages(f"{self._prefix}{prefix.strip('/')}/")
        return {entry["Key"][cut:]: int(entry["Size"]) for page in pages for entry in page.get("Contents", ())}

    def upload(self, files: Mapping[str, Path]) -> None:
        """Write files under keys, several at once, large ones in parts."""

        def one(item: tuple[str, Path]) -> None:
            with self._errors(item[0]), storage_errors(item[1].parent):
                self._client.upload_file(str(item[1]), self._bucket, self._prefix + item[0])

        _all_of(one, files)

    def download(self, files: Mapping[Path, str]) -> None:
        """Read keys into files whose folders exist, several at once; a key that is not there leaves no file."""

        def one(item: tuple[Path, str]) -> None:
            file, key = item
            with self._errors(key), storage_errors(file.parent), self._absent_is_none():
                self._client.download_file(self._bucket, self._prefix + key, str(file))

        _all_of(one, files)

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

    def _pages(self, prefix: str, **options: str) -> Iterator[Mapping[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2")
        with self._errors():
            yield from pages.paginate(Bucket=self._bucket, Prefix=prefix, **options)

    def _errors(self, key: str = "") -> contextlib.AbstractContextManager[None]:
        return s3_errors(f"{self.url}/{key}" if key else self.url)


def _all_of(one: Any, files: Mapping[Any, Any]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(one, files.items()):
            pass
