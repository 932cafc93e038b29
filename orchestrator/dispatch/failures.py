"""Turns an exception on a worker into plain values: what to tell the user and whether another attempt can help."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import LlavoltaError

LOST_WORKER = "LostWorker"

# The same input gives the same error again: trying costs time and changes nothing.
_WILL_FAIL_AGAIN = (
    LlavoltaError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Failure:
    """Why a job failed.

    Attributes:
        kind: Class of the exception; `LostWorker` when a worker process died.
        message: One readable sentence or block.
        retry: Whether another attempt can help.
    """

    kind: str
    message: str
    retry: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON mapping."""
        return asdict(self)


def describe(error: BaseException) -> Failure:
    """The failure an exception stands for.

    A worker that was killed or lost can be tried again, and so can what the operating system or the network may have
    caused. What the spec, the data or the code caused, and memory that did not suffice, comes back the same.
    """
    kind = type(error).__name__
    text = str(error).strip()
    if isinstance(error, LlavoltaError):
        return Failure(kind, text or kind, retry=False)
    out_of_memory = kind == "OutOfMemoryError" or isinstance(error, MemoryError)
    first_line = text.splitlines()[0] if text else ""
    message = f"{kind}: {first_line}" if first_line else kind
    if out_of_memory:
        message = f"out of memory ({message}); a smaller phases.*.per_device_train_batch_size needs less"
    return Failure(kind, message, retry=not out_of_memory and not isinstance(error, _WILL_FAIL_AGAIN))
