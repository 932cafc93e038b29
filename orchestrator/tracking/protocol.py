"""What cells are recorded with: `Recorder`, which the queue drives, and `Tracker`, which an extension writes.

A tracker is found by an entry point `orchestrator.trackers` or in a file that `plugins` names; `tracking.also` lists
those that an experiment uses beside MLflow.
"""

from __future__ import annotations

import importlib.util
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

from orchestrator import registry
from orchestrator.errors import UsageError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.identity import digest
from orchestrator.plan.ledger.ledger import as_name
from orchestrator.plan.step_history import Point, points_since


class Recorder(Protocol):
    """Where records of cells are written; all calls come from one thread.

    Attributes:
        notes: Messages for the user.
    """

    notes: Sequence[str] = ()

    @property
    def experiment_id(self) -> str | None:
        """MLflow's number of the experiment, where there is one and it is known."""
        return None

    def open_runs(self, records: Sequence[CellRecord]) -> None:
        """Create what these cells are recorded in, where that goes faster than one by one."""

    @abstractmethod
    def log_some(self, record: CellRecord, points: int) -> bool:
        """Record a cell as it stands, with at most about `points` points that are new; return whether that is all."""

    def describe(self, tags: Mapping[str, str]) -> None:
        """Write what the experiment as a whole has."""

    def close(self) -> None:
        """End what is open."""


class Tracker(Recorder, ABC):
    """Records cells beside MLflow.

    A subclass sets `kind` and writes `log`; its module imports the tracker's own library inside methods only, since a
    spec is read without it. What was recorded is noted in `folder`, cell by cell, so that another session goes on from
    there. One that is killed before it could note that hands the same points over again.

    Args:
        experiment: Name of the experiment.
        folder: Where it may keep files, on this machine: `<storage>/<kind>/<experiment>`.
    """

    registry_group: ClassVar[str] = registry.TRACKERS
    kind: ClassVar[str]
    requires: ClassVar[Mapping[str, str]] = {}
    """Modules that it imports and that may be missing, to what `pip install` takes."""

    def __init__(self, experiment: str, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder

    @classmethod
    def kind_name(cls) -> str:
        """Return the name that stands in `tracking.also`."""
        return cls.kind

    def folder_of(self, record: CellRecord) -> Path:
        """Return a folder for a cell, with the cell's name as far as a folder can have it."""
        return self.folder / as_name(record.cell_name)

    @abstractmethod
    def log(self, record: CellRecord, points: Sequence[Point]) -> None:
        """Record a cell as it stands; what is raised is told to the user, and tried again later.

        Args:
            record: The cell: status, params, tags, and with `summary` the final scores and costs there are.
            points: `(name, value, step, timestamp in ms)` that are new: of training in the order of steps, then scores
                along the way, which may be of earlier steps.
        """

    def log_some(self, record: CellRecord, points: int) -> bool:
        """Hand over what was not recorded yet; nothing where the cell is recorded as it stands."""
        file = self.folder / "recorded" / f"{record.cell_id}.json"
        known = _Recorded.read(file)
        new = list(islice(known.fresh(record), points + 1))
        rest = digest([record.status, record.cell_name, record.params, record.tags, sorted(record.summary.items())])
        if not new and rest == known.rest:
            return True
        self.log(record, new[:points])
        known.note(record, new[:points], rest if len(new) <= points else known.rest)
        file.parent.mkdir(parents=True, exist_ok=True)
        known.write(file)
        return len(new) <= points


def open_trackers(kinds: Sequence[str], experiment: str, storage: Path) -> list[Tracker]:
    """Return a tracker of each kind.

    Args:
        kinds: What `tracking.also` lists.
        experiment: Name of the experiment.
        storage: Folder of the storage, of a bucket the one on this machine.

    Raises:
        UsageError: a tracker's library is not installed.
    """
    found = []
    for kind in kinds:
        cls = registry.spec_class(registry.TRACKERS, kind)
        for module, package in cls.requires.items():
            if importlib.util.find_spec(module) is None:
                raise UsageError(
                    f"tracking.also: {kind} needs {module}, which is not installed: pip install '{package}'"
                )
        found.append(cls(experiment, storage / kind / as_name(experiment)))
    return found


@dataclass
class _Recorded:
    """What a tracker has of a cell: the last step of each curve, the steps of scores along the way, all else."""

    last: dict[str, int] = field(default_factory=dict)
    along: dict[str, list[int]] = field(default_factory=dict)
    rest: str = ""

    @classmethod
    def read(cls, file: Path) -> _Recorded:
        try:
            found: Any = json.loads(file.read_text(encoding="utf-8"))
            return cls(**found)
        except (OSError, ValueError, TypeError):
            return cls()  # damaged or not there: the same points once more do less harm than none

    def write(self, file: Path) -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(vars(self)), encoding="utf-8")
        part.replace(file)

    def fresh(self, record: CellRecord) -> Iterator[Point]:
        # Points come step by step, so that at most the last step is recorded in part.
        for point in points_since(record.history, max(self.last.values(), default=0)):
            if point[2] > self.last.get(point[0], -1):
                yield point
        for point in record.along:
            if point[2] not in self.along.get(point[0], ()) and math.isfinite(point[1]):
                yield point

    def note(self, record: CellRecord, points: Sequence[Point], rest: str) -> None:
        curves = set(record.along)
        for point in points:
            name, _, step, _ = point
            if point in curves:
                self.along.setdefault(name, []).append(step)
            else:
                self.last[name] = max(step, self.last.get(name, -1))
        self.rest = rest
