"""Turns an exception on a worker into plain values: the message for the user, and whether another attempt can help."""

from __future__ import annotations

import errno
import re
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import DamagedStateError, LlavoltaError, StageRunError, StaleWriterError
from orchestrator.redaction import redacted

LOST_WORKER = "LostWorker"
TAKEN_OVER = StaleWriterError.__name__

# What the network, a file server or another process may have caused: it can be gone a moment later.
_MAY_PASS = (OSError, EOFError)
_STAYS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_STAYING_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# By name: they come from what this file does not import. The last one notes a smaller size for the next attempt.
_PASSING_KINDS = {
    "DistError",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "RayActorError",
    "MicroBatchTooLarge",
}
_PASSING_MODULES = ("httpx", "httpcore", "requests", "urllib3", "botocore")
# A RuntimeError of torch says only in words whether a peer, the network or the device is the cause.
_PASSING_WORDS = re.compile(
    r"closed by peer|connection (reset|refused|closed|aborted)|broken pipe|timed out|nccl|gloo"
    r"|uncorrectable ecc|unspecified launch failure|socket",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """Why a job failed.

    Attributes:
        kind: Class of the exception; `LostWorker` when a worker process died.
        message: One readable sentence or block.
        retry: Whether another attempt can help.
        damaged: Id of the stored state that turned out to be damaged, where that is the cause.
    """

    kind: str
    message: str
    retry: bool
    damaged: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON mapping."""
        return asdict(self)


def describe(error: BaseException) -> Failure:
    """Return the failure an exception stands for.

    A worker that was killed or lost can be tried again, and so can what the operating system or the network may have
    caused. What the spec, the data, the code or a plug-in caused, and memory that did not suffice, comes back the same.
    """
    kind = type(error).__name__
    if isinstance(error, LlavoltaError):
        text = redacted(str(error).strip())
        # What rank 0 met alone is raised on all ranks as a StageRunError; its own cause says what it was.
        passing = type(error) is StageRunError and error.__cause__ is not None and _may_pass(error.__cause__)
        return Failure(kind, text or kind, passing, error.state if isinstance(error, DamagedStateError) else None)
    message = one_line(error)
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        advice = "a smaller phases.*.per_device_train_batch_size needs less"
        return Failure(kind, f"out of memory ({message}); {advice}", retry=False)
    return Failure(kind, message, retry=_may_pass(error))


def one_line(error: BaseException, number: int = 0) -> str:
    """Return the kind of an error and one line of its text, the first or that of another number."""
    lines = redacted(str(error).strip()).splitlines()
    return f"{type(error).__name__}: {lines[number].strip()}" if lines else type(error).__name__


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, _MAY_PASS):
        return not isinstance(error, _STAYS) and getattr(error, "errno", None) not in _STAYING_NUMBERS
    kinds = type(error).__mro__
    if any(kind.__name__ in _PASSING_KINDS or kind.__module__.startswith(_PASSING_MODULES) for kind in kinds):
        return True
    return isinstance(error, RuntimeError) and _PASSING_WORDS.search(str(error)) is not None
