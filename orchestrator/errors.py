"""What can go wrong and how it is told.

LlavoltaError                 one readable block for the user, exit code in `exit_code`
├── SpecError                 errors in an experiment file: all of them at once        (2)
├── UsageError                the call is wrong: verb, option, cell, missing folder    (2)
├── DataError                 rows or images that cannot be used                       (1)
├── StorageError              the ledger or a checkpoint cannot be read or written     (1)
│   ├── DamagedStateError     a finished state is damaged and must be trained again    (1)
│   └── StaleWriterError      another driver has taken the work over                   (1)
├── StageRunError             a stage run or an evaluation failed                      (1)
├── TrackingError             MLflow refused or is unreachable                         (1)
└── Interrupted               Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP                        (130 / 75)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.redaction import HIDDEN, is_secret_name, redacted

OTHER_STORAGE = "run this command in the folder it ran in, or set cluster.storage_path or $LLAVOLTA_STORAGE"
"""What to do where results are searched in another storage than they are in; ends a message that names the storage."""
LONGEST_VALUE = 80
_LONGEST_LIST = 600
_QUOTED = re.compile(r"`([^`]+)`")
_LONG_WORD = re.compile(r"\S{300,}")  # paths of usual length stay whole


def shorten(text: str, limit: int = LONGEST_VALUE) -> str:
    """Return a value from outside on one line, cut where it is longer than `limit`; for whatever a message quotes."""
    line = text.replace("\r", "\\r").replace("\n", "\\n")
    return line if len(line) <= limit else line[: limit - 3] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _shorten_list(text: str) -> str:
    """Return the names to choose from, as many as can be read."""
    if len(text) <= _LONGEST_LIST:
        return text
    names = text.split(", ")
    kept = [name for index, name in enumerate(names) if len(", ".join(names[: index + 1])) <= _LONGEST_LIST]
    if not kept:
        return shorten(text, _LONGEST_LIST)
    return f"{', '.join(kept)}, ... ({len(names) - len(kept):,} more)"


@dataclass(frozen=True)
class ErrorDetail:
    """One error in an experiment file; no secret that stands there is told.

    Attributes:
        message: What is wrong, one sentence.
        file: File that holds the value; None for a value given by `--set`.
        line: 1-based line of the value, None where there is none.
        column: 1-based column of the value.
        path: Dotted key path, e.g. `phases.finetune.learning_rate`.
        value: The value as written, shortened; None where a key is missing.
        allowed: What would be accepted.
        hint: What to do; the nearest known name where there is one.
        about: The key and what it is, e.g. `max_steps: Length of the phase in optimizer steps.`
    """

    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None
    path: str = ""
    value: str | None = None
    allowed: str | None = None
    hint: str | None = None
    about: str | None = None

    def __post_init__(self) -> None:
        said = {name: getattr(self, name) for name in ("message", "path", "value", "allowed", "hint")}
        said = {name: redacted(text) for name, text in said.items() if text is not None}
        if "value" in said and is_secret_name(self.path.rpartition(".")[2]):
            said["value"] = HIDDEN
        quoted = _QUOTED.sub(lambda match: f"`{shorten(match.group(1))}`", said["message"])
        said["message"] = _LONG_WORD.sub(lambda match: shorten(match.group()), quoted)
        limits = {"path": 2 * LONGEST_VALUE, "value": LONGEST_VALUE, "hint": _LONGEST_LIST}
        said |= {name: shorten(said[name], limit) for name, limit in limits.items() if name in said}
        if "allowed" in said:
            said["allowed"] = _shorten_list(said["allowed"])
        for name, text in said.items():
            object.__setattr__(self, name, text)

    def __str__(self) -> str:
        where = self.file or "--set"
        if self.line is not None:
            where += f":{self.line}:{self.column}"
        head = f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"
        rest = (("value", self.value), ("allowed", self.allowed), ("hint", self.hint))
        lines = [f"    {name}: {text}" for name, text in rest if text]
        return "\n".join([head, *lines, *([f"    {self.about}"] if self.about else [])])


class LlavoltaError(Exception):
    """Base of all errors told to the user as one block, without a traceback and without the secrets in an address."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))


class SpecError(LlavoltaError):
    """An experiment file has errors; `errors` holds all of them."""

    exit_code = 2

    def __init__(self, errors: Sequence[ErrorDetail]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))

    @property
    def faults(self) -> tuple[ErrorDetail, ...]:
        """The same errors, by the name of their key in JSON documents."""
        return self.errors

    def __reduce__(self) -> tuple[type[SpecError], tuple[tuple[ErrorDetail, ...]]]:
        return (SpecError, (self.errors,))


class UsageError(LlavoltaError):
    """The call is wrong: an unknown cell, a missing file, an option that does not fit."""

    exit_code = 2


class DataError(LlavoltaError):
    """Rows or images of a data set cannot be used."""


class StorageError(LlavoltaError):
    """The ledger or a checkpoint cannot be read or written."""


class DamagedStateError(StorageError):
    """Files of a finished state are missing, cut short or changed; `state` is its id."""

    def __init__(self, message: str, state: str) -> None:
        self.state = state
        super().__init__(message)

    def __reduce__(self) -> tuple[type[DamagedStateError], tuple[str, str]]:
        return (DamagedStateError, (str(self), self.state))


class StaleWriterError(StorageError):
    """Another driver took this work over while this one was thought dead; what it wrote here is not kept."""


class StageRunError(LlavoltaError):
    """A stage run or an evaluation failed."""


class TrackingError(LlavoltaError):
    """The tracking server refused a record or cannot be reached."""


class Interrupted(LlavoltaError):
    """Work was stopped by Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP; finished work is in the ledger.

    Args:
        exit_code: 130 after Ctrl-C, 75 after another signal or the last hour.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
