"""Sends what a worker prints while a job runs (Python, C++ and child processes alike) to the job's own log."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.plan.ledger.files import write_atomic
from orchestrator.redaction import redacted

LOG_FILE = "log.txt"


def log_path(work_folder: Path, rank: int) -> Path:
    """Return the log of one rank; rank 0's is the one people are shown."""
    return work_folder / (LOG_FILE if rank == 0 else f"log_rank{rank}.txt")


@contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """Redirect file descriptors 1 and 2 to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        _flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, log):
            os.close(descriptor)
        _blot_out(path)


def _blot_out(path: Path) -> None:
    """Take secrets out of what libraries and plug-ins printed; most logs hold none and stay as they are."""
    with suppress(OSError):  # the job's result does not hang on its log
        with path.open(encoding="utf-8", errors="surrogateescape") as log:
            if all(redacted(line) == line for line in log):
                return
        with path.open(encoding="utf-8", errors="surrogateescape") as log:
            text = "".join(map(redacted, log))
        write_atomic(path, text.encode(errors="surrogateescape"))


def append_traceback(path: Path, error: BaseException, rank: int) -> None:
    """Write an exception with its traceback to the end of a log; a log that cannot be written is no second error."""
    text = redacted("".join(traceback.format_exception(error)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="replace") as log:
            log.write(f"[{now()}] rank {rank} failed:\n{text}")
    except OSError:
        if not isinstance(error, StorageError):  # a full disk is told already, in one sentence
            print(text, end="", file=sys.stderr)


def now() -> str:
    """Return the time for a log line, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
