"""Where each job of a plan stands in the ledger, and why a cell has work to do, in words for people."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from orchestrator.plan.cell import Cell
from orchestrator.plan.differences import Nearest
from orchestrator.plan.holders import living_holders
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.leases import Holder
from orchestrator.plan.tree import StageTree

State = Literal["new", "running", "failed", "done"]


@dataclass(frozen=True)
class Standing:
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
    def of(cls, tree: StageTree, ledger: Ledger) -> Standing:
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


class Reasons:
    """Says why a cell has work to do.

    Args:
        cells: All cells of the experiment; a new one is compared with those that are finished.
        experiment: Its name; cells it recorded earlier are compared with first. None compares nothing.
    """

    def __init__(self, standing: Standing, cells: Sequence[Cell], experiment: str | None) -> None:
        self._standing = standing
        done = (cell for cell in cells if standing.cell(cell) == "done")
        records = standing.ledger.storage / "cells"
        self._nearest = Nearest(done, records, experiment) if experiment is not None else None

    def of(self, cell: Cell) -> list[str]:
        """Return `["done"]`, or all that is to be told of a cell, the weightiest first."""
        standing = self._standing
        if standing.cell(cell) == "done":
            return ["done"]
        path = standing.tree.path_of[cell.id]
        needed = standing.needed_of(cell)
        reasons = list(self._failure(cell))
        reasons += _elsewhere(standing.holders[job] for job in standing.jobs(cell) if job in standing.holders)
        begun = list(self._continues(needed))
        untouched = len(needed) == len(path) and path and standing.trained.isdisjoint(path)
        if untouched and not reasons and not begun:
            reasons.append("new")
        elif needed and not untouched:
            reasons.append(f"{len(path) - len(needed)} of {len(path)} stage runs are done")
        reasons += [*self._again(needed), *begun]
        if needed and self._nearest is not None and (difference := self._nearest.reason(cell)) is not None:
            reasons.append(difference)
        first = [job for job in standing.tree.origins_of.get(cell.id, ()) if job in standing.needed and needed]
        if runs := sum(job in standing.tree.stage_runs for job in first):
            reasons.append(f"{runs} stage run{'s' if runs > 1 else ''} of the cell it starts from first")
        if not needed:
            missing = (job for job in cell.evaluations if standing.evaluation(job.id) != "done")
            reasons += [f"evaluation {job.name} under {job.under} is missing" for job in missing]
        return reasons or ["new"]

    def _failure(self, cell: Cell) -> Iterable[str]:
        if (failure := self._standing.failure(cell)) is not None:
            yield f"failed: {failure[1].splitlines()[0]} (--retry-failed takes it up again)"

    def _continues(self, needed: Sequence[str]) -> Iterable[str]:
        for run in needed:
            if run in self._standing.begun and (steps := self._standing.ledger.checkpoint_steps(run)):
                yield f"continues at step {steps[0]:,}"

    def _again(self, needed: Sequence[str]) -> Iterable[str]:
        """Return steps that were trained before and are trained once more, since the state they led to was not kept."""
        runs = self._standing.tree.stage_runs
        dropped = [runs[run] for run in needed if run in self._standing.trained]
        if dropped:
            steps = sum(job.last_step - job.first_step for job in dropped)
            yield f"checkpoint dropped: {steps:,} steps again"
        passed = [runs[run] for run in needed if run in self._standing.passed]
        if passed:
            steps = sum(job.last_step - job.first_step for job in passed)
            yield f"leaves finished work at step {passed[-1].last_step}, not stored: {steps:,} steps again"


def _elsewhere(holders: Iterable[Holder]) -> list[str]:
    return list(dict.fromkeys(f"runs elsewhere: pid {holder.pid} on {holder.host}" for holder in holders))
