"""Cell: one recipe of the grid with every name resolved, every phase a table of steps, and an identity."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from orchestrator.plan.cells.compiled_schedule import CHAINED, CompiledSchedule, next_state
from orchestrator.plan.identity import digest
from orchestrator.plan.jobs import Action, EvaluationJob, RootJob, StartJob
from orchestrator.spec.cell_reference import by_axis, by_name
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.model_facts import ModelFacts
from orchestrator.spec.phase import PhaseSpec

PROMOTED = "promoted"
"""Axis of the cells of a trial that is run again: the trial's name; of what these are compared with, that one's."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a cell, resolved.

    Attributes:
        total_steps: Optimizer steps of the phase (see `spec/steps.py: epoch_steps` for the rule of epochs).
        schedule: What every step does.
        data: `{"name", "share", "spec"}` of each set, in an order that names do not change.
        seed: The phase's own, or the top-level seed.
        start: State the phase starts from: the root or the state before, or what `start_from` names.
        lineage: Digest of (start, recipe with total_steps and data, seed): two phases of one lineage share states
            as far as their tables agree.
        before: Identity of the state before each of the first `CHAINED` actions and after the last of these; the
            lineage before the first one.
        end: State the phase ends in, as far as it is planned.
        planned_steps: Steps of it that are planned, where the cell waits at a rung of a search or stopped there; None
            for all.
    """

    name: str
    total_steps: int
    schedule: CompiledSchedule
    recipe: PhaseSpec
    data: tuple[dict[str, Any], ...]
    seed: int
    start: str
    lineage: str
    before: tuple[str, ...]
    end: str
    planned_steps: int | None = None

    @property
    def last_step(self) -> int:
        """Steps it has as far as it is planned."""
        return self.total_steps if self.planned_steps is None else self.planned_steps

    @property
    def table(self) -> tuple[Action, ...]:
        """What every step does; neighbours that do the same are one action."""
        return self.schedule.actions

    def state_at(self, step: int) -> str:
        """Return the identity of the state after `step` steps (1 to `total_steps`); what comes later does not count."""
        at = bisect.bisect_left(self.table, step, key=lambda action: action.last_step)
        before = self.before[at] if at < CHAINED else self.schedule.tails[at - CHAINED]
        state = next_state(before, self.table[at].first_step, step, self.schedule.ids[at])
        if at < CHAINED:
            return state
        return next_state(self.before[CHAINED], self.table[CHAINED].first_step, step, state)


@dataclass(frozen=True)
class Along:
    """An evaluation of a state on a cell's way, before its end.

    Attributes:
        step: Optimizer steps of the phase that the state has behind it.
        last_step: The last of them, counted from the cell's first step: where its result stands in a curve.
        rung: Share of the steps at which a search compares its trials by it; None for what `evaluate` asks for.
    """

    step: int
    last_step: int
    job: EvaluationJob
    rung: Fraction | None = None


@dataclass(frozen=True)
class Cell:
    """One recipe of the grid.

    Attributes:
        id: Hash of the values it reaches; cells of one id are the same work under several names.
        spec: The experiment as this cell sees it, its axis values applied.
        state: The state whose weights are the cell's result; the root where there is no phase.
        evaluations: One job for each entry and each `under`; jobs of equal setting share their id. Of the final state.
        notices: What could not be resolved here.
        starts: What is put together for phases to start from.
        sources: Cells of other experiments that phases start from, each up to the phase after which its weights are
            taken.
        along: Evaluations of states before the final one, by step.
        rung: Share of its steps up to which it is planned (`rungs.py`); None for all of them.
    """

    id: str
    name: str
    axes: dict[str, Any]
    spec: ExperimentSpec
    root: RootJob
    phases: tuple[PhasePlan, ...]
    evaluations: tuple[EvaluationJob, ...]
    state: str
    facts: ModelFacts | None = None
    notices: tuple[str, ...] = ()
    starts: tuple[StartJob, ...] = ()
    sources: tuple[Cell, ...] = ()
    along: tuple[Along, ...] = ()
    rung: Fraction | None = None

    @property
    def tests(self) -> tuple[EvaluationJob, ...]:
        """All of its evaluations: those along the way, then those of the final state."""
        return (*(each.job for each in self.along), *self.evaluations)

    def __repr__(self) -> str:
        return f"<Cell {self.name} of {self.spec.name}: {self.id[:12]}>"

    def origins(self) -> Iterator[Cell]:
        """Return the cells it starts from, what these start from before them."""
        for source in self.sources:
            yield from source.origins()
            yield source


def cell_id(phases: Sequence[PhasePlan], root: RootJob) -> str:
    """Return the identity of the cell that runs these phases; the root's where there is none."""
    return digest({"cell": [[phase.lineage, phase.end] for phase in phases] or root.id})


def distinct_cells(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Return one cell for each id: of cells that are the same work the first, whose name MLflow's run has."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.id, cell)
    return tuple(first.values())


def tested_differently(cells: Iterable[Cell]) -> list[str]:
    """Return a sentence for each cell that has an earlier one's id, and so its run in MLflow, but other evaluations."""
    first: dict[str, Cell] = {}
    pairs = ((cell, first.setdefault(cell.id, cell)) for cell in cells)
    return [
        f"{cell.name} is {one.name} tested in another way: the table has both, MLflow one run with the scores of the "
        f"latter"
        for cell, one in pairs
        if {test.id for test in cell.tests} != {test.id for test in one.tests}
    ]


def find_cells(cells: Sequence[Cell], wanted: str) -> list[Cell]:
    """Return the cells that a name, an id's beginning (four characters or more) or `axis=value` fits.

    Of cells that are the same work, an id or a value fits the first alone.
    """
    by_id = [cell for cell in cells if len(wanted) >= 4 and cell.id.startswith(wanted)]
    return by_name(cells, wanted) or list(distinct_cells(by_id or by_axis(cells, wanted)))
