"""The trials of a search as the ledger notes them: what was drawn, before it runs; what came of it, when it ends."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from orchestrator.errors import LlavoltaError, StorageError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.cells.cell import PROMOTED, Cell
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.cells.rungs import planned_up_to
from orchestrator.plan.identity import digest
from orchestrator.plan.ledger.backends import Backend
from orchestrator.plan.ledger.files import dump_note, parse_note
from orchestrator.registry import did_you_mean
from orchestrator.spec.search import SchedulerSpec, SearchSpec
from orchestrator.spec.search_space import reference_path, trial_cells, trial_name

if TYPE_CHECKING:
    from orchestrator.spec.loaded import LoadedExperiment


Key = TypeVar("Key", bound=Hashable)
Direction = Literal["max", "min"]


def pareto_front(points: Mapping[Key, Sequence[float]], directions: Sequence[Direction]) -> set[Key]:
    """Return the keys of the points that no other point beats; equal points stay together.

    Args:
        points: Key to one value for each objective, all finite.
        directions: Whether more or less of each objective is better.
    """
    costs = {
        key: tuple(value if way == "min" else -value for value, way in zip(values, directions, strict=True))
        for key, values in points.items()
    }
    return {key for key, own in costs.items() if not any(_beats(other, own) for other in costs.values())}


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """At least as low everywhere and lower somewhere."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


ADDED = "cost/added_train_tflops"
"""Metric of a trial's cells: an equal part of what the trial added to the work that was stored or planned."""
STOPPED = "stopped"
"""Tag of a trial's cells: the rung where it stopped and its value there; `no` where it passed all of its rungs."""
SPACE_VERSION = 1
"""Raised when parameters of the same names come to mean other recipes."""


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    Attributes:
        number: Counts from 0 in the order of proposal.
        params: What the sampler drew, by parameter.
        values: The recipe made of it: dotted path to a value as a file would write it.
        state: `finished` once all objectives are there; `stopped` where a scheduler stopped it at a rung.
        cells: Ids of its cells, one a seed; none where the recipe cannot be a cell.
        objectives: Mean over its cells.
        excess: By how much it is beyond the limit of each constraint; at most 0 where it meets it.
        error: Why it failed.
        sampler_state: What Optuna's sampler noted of it when it drew it: the generation of `nsga2`.
        added_train_tflops: Planned operations of the stage runs that were neither stored nor planned when it was
            proposed, or when it went on from a rung; None where they are not known.
        stored_gpu_hours: Measured hours of the stage runs that it found stored, of which no earlier trial made use;
            noted where hours are limited.
        rungs: What it was compared by at each rung that it reached (`rung_name`): the mean over its cells.
        promoted: Whether it is run again as `search.promote` says.
    """

    number: int
    params: dict[str, Any]
    values: dict[str, Any]
    state: Literal["proposed", "finished", "stopped", "failed"] = "proposed"
    cells: tuple[str, ...] = ()
    objectives: dict[str, float] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    sampler_state: dict[str, Any] = field(default_factory=dict)
    added_train_tflops: float | None = None
    stored_gpu_hours: float = 0.0
    rungs: dict[str, float] = field(default_factory=dict)
    promoted: bool = False

    def planned_rung(self, scheduler: SchedulerSpec | None) -> Fraction | None:
        """Return the rung that it is trained up to, where it waits or stopped; None for its end."""
        furthest = max((Fraction(name.split()[0]) for name in self.rungs), default=Fraction(0))
        if self.state == "stopped":
            return furthest
        if scheduler is None or self.state == "finished":
            return None
        later = (rung for rung in scheduler.rungs if rung >= furthest)
        return next((rung for rung in later if rung_name(rung, scheduler) not in self.rungs), None)

    def compared_at(self, scheduler: SchedulerSpec | None) -> tuple[Fraction, ...]:
        """Return the rungs of a scheduler at which it was compared."""
        rungs = () if scheduler is None else scheduler.rungs
        return tuple(rung for rung in rungs if scheduler is not None and rung_name(rung, scheduler) in self.rungs)

    def rung_steps(self) -> dict[int, float]:
        """Return its values at rungs, as intermediate values of Optuna: by the share of its steps in 1/10,000."""
        return {int(10_000 * Fraction(name.split()[0])): value for name, value in self.rungs.items()}

    @property
    def violated(self) -> tuple[str, ...]:
        """Metrics whose constraints it does not meet."""
        return tuple(metric for metric, excess in self.excess.items() if excess > 0)

    def failed(self, error: str) -> Trial:
        """Return the trial once it failed."""
        return replace(self, state="failed", objectives={}, excess={}, error=error)

    def ended(self, records: Sequence[CellRecord], search: SearchSpec, references: Mapping[str, float]) -> Trial:
        """Return the trial once all its cells are finished.

        Args:
            records: Its cells.
            search: The search.
            references: What each constraint compares with, by metric; 0 where that is a plain number.
        """
        found: dict[str, float] = {}
        for name in (*search.objectives, *search.constraints):
            numbers = [record.summary.get(name, math.nan) for record in records]
            if not all(map(math.isfinite, numbers)):
                measured = sorted(records[0].summary)
                hints = [hint for hint in [did_you_mean(name, measured)] if hint]
                has = f"this trial has {', '.join(measured)}"
                what = "objective" if name in search.objectives else "constraint's metric"
                return self.failed("; ".join([f"the {what} {name} was not measured", has, *hints]))
            found[name] = mean(numbers)
        objectives = {name: found[name] for name in search.objectives}
        excess = {name: each.excess(found[name], references[name]) for name, each in search.constraints.items()}
        return replace(self, state="finished", objectives=objectives, excess=excess, error=None)


def rung_name(rung: Fraction, scheduler: SchedulerSpec) -> str:
    """Return what a trial's value at a rung is noted under; another variant gives other values."""
    return f"{rung} under {scheduler.under}"


class TrialNotes:
    """Notes of one search below `searches/SEARCH_ID/` of a ledger's store."""

    def __init__(self, store: Backend, search_id: str) -> None:
        self._store, self._folder = store, f"searches/{search_id}"

    def read(self) -> list[Trial]:
        """Return all trials, by number.

        Raises:
            StorageError: the storage cannot be read, or a note is damaged.
        """
        found = []
        for name in self._store.names(self._folder):
            key = f"{self._folder}/{name}"
            data = self._store.read(key) if name.startswith("trial_") else None
            if data is not None:
                if (note := parse_note(key, data)) is None:
                    raise StorageError(
                        f"{self._store.url}/{key} is damaged; take it away, and the trial is drawn again"
                    )
                found.append(Trial(**{**note, "cells": tuple(note["cells"])}))
        return sorted(found, key=lambda trial: trial.number)

    def write(self, trial: Trial) -> None:
        """Note a trial as it stands.

        Raises:
            StorageError: the storage cannot be written.
        """
        key = f"{self._folder}/trial_{trial.number:03d}.json"
        self._store.write(key, dump_note(key, asdict(trial), sort_keys=False))


def search_id(loaded: LoadedExperiment) -> str:
    """Return what makes a search the same one: its base, space, objectives and algorithm; not the number of trials."""
    search = loaded.spec.search
    assert search is not None
    asked = search.model_dump(mode="json", include={"objectives", "algorithm"})
    for name in search.algorithm.as_before():
        del asked["algorithm"][name]
    asked["space"] = {path: e.model_dump(mode="json", exclude=set(e.as_before())) for path, e in search.space.items()}
    if search.constraints:
        asked |= search.model_dump(mode="json", include={"constraints"})
    base = [cell.id for cell in expand_cells(loaded)]
    return digest({"search": asked, "base": base, "space_version": SPACE_VERSION})[:16]


def cells_of_trials(
    loaded: LoadedExperiment, trials: Sequence[Trial], known: Mapping[int, tuple[Cell, ...]]
) -> Iterator[tuple[Trial, tuple[Cell, ...]]]:
    """Return each trial with its cells, whole; one whose recipe cannot be a cell comes back failed and has none.

    Args:
        loaded: The experiment, with its search.
        trials: The trials.
        known: By number the cells of those that were planned before.
    """
    for trial in trials:
        if cells := known.get(trial.number, ()):
            yield replace(trial, cells=tuple(cell.id for cell in cells)), cells
            continue
        try:
            resolved = trial_cells(loaded, trial_name(trial.number), trial.values)
            cells = expand_cells(replace(loaded, cells=resolved))
        except LlavoltaError as error:
            yield trial.failed(str(error)), ()
        else:
            yield replace(trial, cells=tuple(cell.id for cell in cells)), cells


def reference_cells(loaded: LoadedExperiment) -> dict[str, tuple[Cell, ...]]:
    """Return the cells that constraints compare with, one a seed, by the name of their schedule."""
    search = loaded.spec.search
    assert search is not None
    found: dict[str, tuple[Cell, ...]] = {}
    for name in [each.reference for each in search.constraints.values()]:
        if name is not None and name not in found:
            resolved = trial_cells(loaded, name, {reference_path(loaded.spec): name})
            cells = expand_cells(replace(loaded, cells=resolved))
            found[name] = tuple(planned_up_to(cell, None, ()) for cell in cells)
    return found


def promoted_cells(loaded: LoadedExperiment, trials: Sequence[Trial]) -> Iterator[Cell]:
    """Yield the cells of promoted trials, and then of what they are compared with, one a seed; some may be a trial's
    own, under another name.

    Raises:
        LlavoltaError: what `search.promote` sets cannot stand in its place.
    """
    search = loaded.spec.search
    if search is None or search.promote is None:
        return
    again = [(f"{trial.number:03d}", trial_name(trial.number), trial.values) for trial in trials if trial.promoted]
    if again and (baseline := search.promote.baseline) is not None:
        again.append((baseline, baseline, {reference_path(loaded.spec): baseline}))
    for name, axis, values in again:
        recipe = {**values, **{path: value for path, value in search.promote.set.items() if path not in values}}
        resolved = tuple(
            replace(cell, axes={**cell.axes, PROMOTED: axis})
            for cell in trial_cells(loaded, f"{PROMOTED}-{name}", recipe, search.promote.seeds)
        )
        for cell in expand_cells(replace(loaded, cells=resolved)):
            yield planned_up_to(cell, None, ())


def best_trials(trials: Sequence[Trial], search: SearchSpec, top: int) -> list[Trial]:
    """Return the best distinct trials that meet all constraints: of the front, by the first objective."""
    (objective, way), *others = search.objectives.items()
    fit = {trial.cells: trial for trial in reversed(trials) if trial.state == "finished" and not trial.violated}
    front = front_of(trials, search)
    found = [trial for trial in fit.values() if not others or front.issuperset(trial.cells)]
    sign = 1 if way == "min" else -1
    return sorted(found, key=lambda trial: (sign * trial.objectives[objective], trial.number))[:top]


def front_of(trials: Sequence[Trial], search: SearchSpec) -> set[str]:
    """Return the ids of the cells of the trials that meet all constraints and that no other such one beats."""
    finished = {trial.number: trial for trial in trials if trial.state == "finished" and not trial.violated}
    points = {number: [trial.objectives[name] for name in search.objectives] for number, trial in finished.items()}
    best = pareto_front(points, list(search.objectives.values()))
    return {identity for number in best for identity in finished[number].cells}
