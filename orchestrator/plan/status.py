"""The state of every job and cell: what the ledger holds, what is still needed, who works on it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.tree import StageTree

State = Literal["new", "running", "failed", "done"]
CellStatus = Literal["new", "running", "interrupted", "trained", "finished", "failed", "stopped"]


def cell_status(cell: Cell, tree: StageTree, ledger: Ledger) -> CellStatus:
    """Return the status of one cell, quickly: its own jobs are looked up, no metrics are read.

    `finished`, or `stopped` where it is planned up to a rung of a search alone, only when the cell's state and all its
    evaluations are there. `running` where it was begun and a living driver works on the tree; where none does,
    `trained` if only evaluations are missing, else `interrupted`.
    """
    path = tree.path_of[cell.id]
    tests = [ledger.evaluation(job.id) is not None for job in cell.tests]
    trained = not path or ledger.is_done(cell.state)
    if all(tests) and trained:
        return "finished" if cell.rung is None else "stopped"
    if failure_of(cell, tree, ledger) is not None:
        return "failed"
    if not any(tests) and not any(ledger.is_done(run) or ledger.is_begun(run) for run in path):
        return "new"
    if not ledger.living_holders().keys().isdisjoint((*tree.order, *tree.evaluations)):
        return "running"
    return "trained" if trained else "interrupted"


def failure_of(cell: Cell, tree: StageTree, ledger: Ledger) -> tuple[str, str] | None:
    """Return the first job of a cell that failed, and why; None where none did."""
    for job in tree.jobs_of(cell):
        if (failure := ledger.failure(job)) is not None:
            return job, failure_reason(failure)
    return None


def failure_reason(failure: Mapping[str, object]) -> str:
    """Return the recorded reason of a failure."""
    return str(failure.get("error", "")).strip() or "no reason recorded"


class TreeStatus:
    """The state of all jobs and cells of a tree; each question is put to the ledger once.

    Attributes:
        needed: States to be written.
        blocked: States and evaluations that failed, and those that stand on them.
        holders: Jobs under way to who works on them.
    """

    def __init__(self, tree: StageTree, ledger: Ledger) -> None:
        self.tree, self.ledger = tree, ledger
        self.needed = frozenset(tree.needed(ledger))
        self.blocked = frozenset(tree.blocked(ledger, self.needed))
        self.holders = ledger.living_holders()
        self._cells: dict[tuple[str, str], tuple[tuple[str, ...], State]] = {}

    def state(self, identity: str) -> State:
        """Return the state of a root, a start or a stage run."""
        return self._open(identity) if identity in self.needed else "done"

    def evaluation(self, identity: str) -> State:
        """Return the state of an evaluation."""
        return self._evaluations[identity]

    @cached_property
    def _evaluations(self) -> dict[str, State]:
        found = self.ledger.evaluation
        return {job: "done" if found(job) is not None else self._open(job) for job in self.tree.evaluations}

    def _open(self, job: str) -> State:
        return "running" if job in self.holders else "failed" if job in self.blocked else "new"

    @cached_property
    def trained(self) -> set[str]:
        """Stage runs whose result is there, if perhaps not all that is wanted of them."""
        return {run for run in self.tree.stage_runs if run not in self.needed or self.ledger.is_done(run)}

    @cached_property
    def begun(self) -> set[str]:
        """Stage runs that were begun and are not finished."""
        return {run for run in self.tree.stage_runs if run in self.needed and self.ledger.is_begun(run)}

    def needed_of(self, cell: Cell) -> tuple[str, ...]:
        """Return the stage runs a cell waits for, in order; what lies before a stored state is not its business."""
        ends = {cell.state, *(each.job.state for each in cell.along if self.evaluation(each.job.id) != "done")}
        found: list[str] = []
        waits = False
        for run in reversed(self.tree.path_of[cell.id]):  # from each state that it wants back to a stored one
            waits = run in self.needed and (waits or run in ends)
            found += [run] if waits else []
        return tuple(found[::-1])

    def jobs(self, cell: Cell) -> tuple[str, ...]:
        """Return all that a cell waits for, in order; other experiments' states that it starts from included."""
        return self._of_cell(cell)[0]

    def cell(self, cell: Cell) -> State:
        """Return a cell's state: failed or running where anything it waits for is, done where it waits for nothing."""
        return self._of_cell(cell)[1]

    def _of_cell(self, cell: Cell) -> tuple[tuple[str, ...], State]:
        key = (cell.id, cell.name)
        if key not in self._cells:
            path, needed, tests = self.tree.path_of[cell.id], self.needed_of(cell), self._evaluations
            before = self.tree.before(cell) if len(needed) == len(path) else ()
            open_tests = (job.id for job in cell.tests if tests[job.id] != "done")
            jobs = (*(state for state in before if state in self.needed), *needed, *open_tests)
            states = {tests[job] if job in tests else self.state(job) for job in jobs}
            order: tuple[State, ...] = ("failed", "running", "new")
            self._cells[key] = jobs, next((state for state in order if state in states), "done")
        return self._cells[key]

    def failure(self, cell: Cell) -> tuple[str, str] | None:
        """Return the job that a cell waits for and that failed, and why."""
        for job in self.jobs(cell):
            if job in self.blocked and (failure := self.ledger.failure(job)) is not None:
                return job, failure_reason(failure)
        return None

    @cached_property
    def passed(self) -> set[str]:
        """Stage runs without a result that a finished one of their phase went through: their steps were trained."""
        found: set[str] = set()
        for state in reversed(self.tree.order):
            job = self.tree.stage_runs.get(state)
            if job is not None and not job.starts_phase and (state in found or state in self.trained):
                found |= {job.parent} & self.needed
        return found - self.trained
