"""StepHistory: what was measured at every step on a cell's way, read from the ledger when it is asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.plan.io_retry import retry_io
from orchestrator.plan.ledger.files import is_there, storage_errors

Point = tuple[str, float, int, int]
_TRACKED = {
    "loss": "train/loss",
    "distill_loss": "train/distill_loss",
    "learning_rate": "train/learning_rate",
    "visual_tokens": "train/visual_tokens",
    "step_seconds": "train/step_seconds",
}
_TAIL_BYTES = 8192
_READ_THROUGH_BYTES = 1 << 16  # of a metrics file this much is read in order; what is before is skipped by halving


@dataclass(frozen=True)
class Stretch:
    """Steps of one metrics file on a cell's way.

    Attributes:
        first_step: First step of the phase that counts.
        last_step: The one after the last.
        offset: Steps of the phases before.
    """

    file: Path
    first_step: int
    last_step: int
    offset: int


class StepHistory:
    """Points of a cell's way in the order of steps, read from the ledger whenever they are asked for.

    A hundred thousand steps are neither held in memory nor read again for the few that are new.
    """

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self._stretches = tuple(stretches)

    def __iter__(self) -> Iterator[Point]:
        return self.since(0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepHistory) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def since(self, step: int) -> Iterator[Point]:
        """Return the points from a step on, up to the first gap, as where a damaged file was deleted.

        What lies beyond a gap would hide it from who looks for what follows the last point sent.

        Raises:
            StorageError: a file cannot be read: what follows must not be taken for all there is.
        """
        for stretch in self._stretches:
            first = max(stretch.first_step, step - stretch.offset)
            if first >= stretch.last_step:
                continue
            expected = first
            for line in _lines_from(stretch.file, first):
                if line["step"] >= stretch.last_step:
                    break
                if line["step"] > expected:
                    return
                yield from _points(line, stretch.offset)
                expected = line["step"] + 1
            if expected < stretch.last_step:
                return


def points_since(history: StepHistory | Sequence[Point], step: int) -> Iterable[Point]:
    """Return the points of a step and of those after it, in the order of steps."""
    if isinstance(history, StepHistory):
        return history.since(step)
    return sorted((point for point in history if point[2] >= step), key=lambda point: point[2])


def _points(line: dict[str, Any], offset: int) -> Iterable[Point]:
    for key, name in _TRACKED.items():
        value = line.get(key)
        # A trackers' database takes no NaN; why a run diverged stands in its failure.
        if isinstance(value, int | float) and math.isfinite(value):
            yield name, float(value), int(line["step"]) + offset, int(line.get("timestamp_ms", 0))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a line cut short by a crash ends it.

    Raises:
        StorageError: it is there and cannot be read: a part of a curve must not pass for all of it.
    """
    return list(_lines_from(file, 0))


def whole_metrics(file: Path, first_step: int, last_step: int) -> list[dict[str, Any]]:
    """Return the lines of these steps.

    Raises:
        StorageError: not each step has one line, or the file cannot be read.
    """
    found = [line for line in _lines_from(file, first_step) if first_step <= line["step"] < last_step]
    if [line["step"] for line in found] != list(range(first_step, last_step)):
        raise StorageError(
            f"{file}: of the steps {first_step} to {last_step - 1} it has {len(found)} lines; without one for each, "
            f"cost and curve would be wrong; put the file back, or delete {file.parent} to train the stage run again"
        )
    return found


def last_metrics(file: Path) -> dict[str, Any] | None:
    """Return the last complete line of a metrics file; None where there is none, or it cannot be read now."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, opened.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = opened.read().split(b"\n")[:-1]
    except OSError:
        return None
    return _line(lines[-1]) if lines else None


def _lines_from(file: Path, step: int) -> Iterator[dict[str, Any]]:
    """Return the lines of a metrics file from a step on, up to one that a crash cut short; their steps rise.

    Raises:
        StorageError: the file is there and cannot be read.
    """
    path = file if is_there(file) else os.devnull
    with storage_errors(file.parent), retry_io(lambda: open(path, "rb")) as opened:
        low, high = 0, opened.seek(0, os.SEEK_END)
        while high - low > _READ_THROUGH_BYTES:  # every line that begins before `low` is of an earlier step
            opened.seek((low + high) // 2)
            opened.readline()
            begin = opened.tell()
            line = _line(opened.readline())
            if line is not None and line["step"] < step and begin < high:
                low = begin
            else:
                high = (low + high) // 2
        opened.seek(low)
        for text in opened:
            if (line := _line(text)) is None:
                return
            if line["step"] >= step:
                yield line


def _line(text: bytes) -> dict[str, Any] | None:
    """Return one line; None where it is none of ours."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
