"""Backends of the ledger: one interface, a folder (local or NFS) and a bucket (S3)."""

from __future__ import annotations

import stat
from pathlib import Path

from orchestrator.errors import StorageError, UsageError
from orchestrator.plan.ledger.backends.base import Backend
from orchestrator.plan.ledger.backends.folder import FolderBackend
from orchestrator.plan.ledger.backends.s3 import S3Backend
from orchestrator.plan.ledger.files import stat_of

__all__ = ["Backend", "open_backend"]


def open_backend(storage: str | Path) -> Backend:
    """Return the backend that a folder or an `s3://bucket/prefix` names; nothing is made by it.

    Raises:
        UsageError: it is another URL, or boto3 is not installed.
        StorageError: it can be no storage: a file, or a URL without a bucket.
    """
    text = str(storage)
    if text.startswith("s3://"):
        return S3Backend(text)
    if "://" in text:
        raise UsageError(f"storage {text}: name a folder (local or NFS) or s3://bucket/prefix")
    about = stat_of(text)
    if about is not None and not stat.S_ISDIR(about.st_mode):
        raise StorageError(f"{text}: is a file; cluster.storage_path names a folder")
    return FolderBackend(text)
