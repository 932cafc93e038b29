"""One job on one worker, whoever started it: its run, its log, how it failed, and the end of one that hangs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from orchestrator.dispatch.failures import describe
from orchestrator.errors import StorageError
from orchestrator.plan.jobs import Job
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import log_path, write_atomic
from orchestrator.plan.ledger.process import start_ticks
from orchestrator.redaction import redacted
from orchestrator.registry import load_object

DEFAULT_EXECUTOR = "orchestrator.dispatch.run_job:execute"


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
        _redact(path)


def _redact(path: Path) -> None:
    """Remove secrets from what libraries and plug-ins printed; most logs hold none and stay as they are."""
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
        if not isinstance(error, StorageError):  # a full disk is reported already, in one sentence
            print(text, end="", file=sys.stderr)


def now() -> str:
    """Return the time for a log line, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def do_job(
    executor: str,
    job: Job,
    ledger: Ledger,
    memory: dict[str, Any],
    should_stop: Callable[[], bool],
    *,
    rank: int = 0,
    printing: AbstractContextManager[None] | None = None,
) -> str | dict[str, Any]:
    """Do one job on this rank and return what to report to the conductor: how it ended, or a `Failure` as JSON.

    Args:
        executor: `module:function` (`run_job.execute`).
        memory: What this worker keeps from job to job; emptied when the job fails.
        printing: Where what it prints goes; the log is complete when this has closed.
    """
    try:
        with printing or nullcontext():
            return str(load_object(executor)(job, ledger, memory, should_stop))
    except Exception as error:
        forget(memory)
        append_traceback(log_path(ledger.work_folder(job.id), 0), error, rank)
        if rank == 0:
            with suppress(StorageError):
                ledger.share_progress(job.id)
        return describe(error).to_json()


def forget(memory: dict[str, Any]) -> None:
    """Release all that a worker kept: after a failure none of it can be trusted."""
    for value in memory.values():
        with suppress(Exception):
            value.release()
    memory.clear()


def end_process(rank: Mapping[str, Any], url: str) -> None:
    """Kill one rank's process on this node; what could not write its stacks itself gets what the system knows.

    Args:
        rank: `pid` and `started` (ticks) of the process, its `rank` and `job`, whether it is `silent`, and `why`.
    """
    if start_ticks(rank["pid"]) != rank["started"]:
        return  # another process got its number
    if rank["job"] is not None:
        _note_kill(log_path(Ledger(url).work_folder(rank["job"]), rank["rank"]), rank)
    with suppress(ProcessLookupError):
        os.kill(rank["pid"], signal.SIGKILL)


def _note_kill(log: Path, rank: Mapping[str, Any]) -> None:
    lines = [f"[{now()}] rank {rank['rank']}, process {rank['pid']}, is killed: {rank['why']}"]
    if rank["silent"]:
        lines += [f"it is silent; {line}" for line in _state_of(rank["pid"])]
    with suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _state_of(pid: int) -> list[str]:
    """Return what /proc knows of a process that says nothing: its state and where in the kernel it waits."""
    found = []
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        found += [line for line in status if line.startswith("State:")]
    with suppress(OSError):
        found.append(f"wchan: {Path(f'/proc/{pid}/wchan').read_text() or '0'}")
    return found


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
