"""A lock file that one process holds: it tells who, and lets go when that process dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.plan.storage import read_json, storage_errors


@contextlib.contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Holds the lock of a file while the block runs.

    Args:
        path: The lock file; made where it is missing, never taken away.
        what: What is held, for the error.

    Raises:
        UsageError: another process holds it.
        StorageError: the file cannot be written.
    """
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _flock(descriptor):
            other = read_json(path) or {}
            raise UsageError(
                f"{what}: a run is under way already (process {other.get('pid', 'unknown')} on "
                f"{other.get('host', 'an unknown host')}); wait for it or stop it, then run again"
            )
        with storage_errors(path.parent):
            os.ftruncate(descriptor, 0)
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(path: Path) -> dict[str, Any] | None:
    """`pid`, `host` and `since` of the process that holds a lock; None where none does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return read_json(path) or {}
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _flock(descriptor: int) -> bool:
    # A reader that looks who holds the lock has it for a moment: try a few times.
    for _ in range(5):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False
