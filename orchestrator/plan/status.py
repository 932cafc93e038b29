"""The state of every job and cell: what the ledger holds, what is still needed, who works on it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.leases import Holder, Leases
from orchestrator.plan.tree import StageTree

State = Literal["new", "running", "failed", "done"]


@dataclass(frozen=True)
class TreeStatus:
    """What the ledger says of a tree's jobs, read once.

    Attributes:
        needed: States to be written.
        blocked: States and evaluations that failed, and those that stand on them.
        holders: Jobs under way to who works on them.
    """

    tree: StageTree
    ledger: Ledger
    needed: frozenset[str]
    blocked: frozenset[str]
    holders: Mapping[str, Holder]

    @classmethod
    def of(cls, tree: StageTree, ledger: Ledger) -> TreeStatus:
        """Return the standing now."""
        needed = tree.needed(ledger)
        blocked = tree.blocked(ledger, needed)
        return cls(tree, ledger, frozenset(needed), frozenset(blocked), living_holders(ledger))

    def state(self, identity: str) -> State:
        """Of a state: a root or a stage run."""
        if identity in self.needed:
            return "running" if identity in self.holders else "failed" if identity in self.blocked else "new"
        return "done"

    def evaluation(self, identity: str) -> State:
        """Of an evaluation."""
        return self._evaluations[identity]

    @cached_property
    def _evaluations(self) -> dict[str, State]:
        found: dict[str, State] = {}
        for job in self.tree.evaluations:
            if self.ledger.evaluation(job) is not None:
                found[job] = "done"
            else:
                found[job] = "running" if job in self.holders else "failed" if job in self.blocked else "new"
        return found

    @cached_property
    def trained(self) -> set[str]:
        """Stage runs whose result is there, if perhaps not all that is wanted of them."""
        return {run for run in self.tree.stage_runs if run not in self.needed or self.ledger.is_done(run)}

    @cached_property
    def begun(self) -> set[str]:
        """Stage runs that were begun and are not finished."""
        return {run for run in self.tree.stage_runs if run in self.needed and self.ledger.is_begun(run)}

    def needed_of(self, cell: Cell) -> tuple[str, ...]:
        """Return the stage runs that a cell waits for, in order: what lies before a state that is there is others'
        business.
        """
        path = self.tree.path_of[cell.id]
        return tuple(itertools.takewhile(self.needed.__contains__, reversed(path)))[::-1]

    def jobs(self, cell: Cell) -> tuple[str, ...]:
        """Return all that a cell waits for, in order; other experiments' states that it starts from included."""
        key = (cell.id, cell.name)
        if key not in self._jobs:
            self._jobs[key] = self._jobs_of(cell)
        return self._jobs[key]

    @cached_property
    def _jobs(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {}

    def _jobs_of(self, cell: Cell) -> tuple[str, ...]:
        path, needed = self.tree.path_of[cell.id], self.needed_of(cell)
        before = (cell.root.id, *self.tree.origins_of.get(cell.id, ())) if len(needed) == len(path) else ()
        tests = (job.id for job in cell.evaluations if self._evaluations[job.id] != "done")
        return (*(state for state in before if state in self.needed), *needed, *tests)

    def cell(self, cell: Cell) -> State:
        """Of a cell: failed or running where anything it waits for is, done where it waits for nothing."""
        key = (cell.id, cell.name)
        if key not in self._cells:
            self._cells[key] = self._cell(cell)
        return self._cells[key]

    @cached_property
    def _cells(self) -> dict[tuple[str, str], State]:
        return {}

    def _cell(self, cell: Cell) -> State:
        jobs = self.jobs(cell)
        if not jobs:
            return "done"
        parts = {self.evaluation(job) if job in self._evaluations else self.state(job) for job in jobs}
        return "failed" if "failed" in parts else "running" if "running" in parts else "new"

    def failure(self, cell: Cell) -> tuple[str, str] | None:
        """Return the job of a cell that failed, and why."""
        for identity in self.jobs(cell):
            if identity in self.blocked and (failure := self.ledger.failure(identity)) is not None:
                return identity, str(failure.get("error", "")).strip() or "no reason recorded"
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


def living_holders(ledger: Ledger) -> dict[str, Holder]:
    """Return the jobs under way to who works on them; what a driver left behind that was killed does not count."""
    return _onlooker(ledger).holders()


@functools.lru_cache(maxsize=4)
def _onlooker(ledger: Ledger) -> Leases:
    """Kept, so that of an owner on another machine that was waited for once the answer is known."""
    return Leases(ledger.store, "onlooker")


def is_worked_on(tree: StageTree, ledger: Ledger) -> bool:
    """Return True while a living driver holds any job of a tree."""
    held = living_holders(ledger)
    return any(job in held for job in (*tree.order, *tree.evaluations)) if held else False
