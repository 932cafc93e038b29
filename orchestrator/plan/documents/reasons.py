"""Where each job of a plan stands in the ledger, and why a cell has work to do, in words for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.documents.differences import Nearest
from orchestrator.plan.ledger.leases import Holder
from orchestrator.plan.status import TreeStatus


class Reasons:
    """Says why a cell has work to do.

    Args:
        cells: All cells of the experiment; a new one is compared with those that are finished.
        experiment: Its name; cells it recorded earlier are compared with first. None compares nothing.
    """

    def __init__(self, standing: TreeStatus, cells: Sequence[Cell], experiment: str | None) -> None:
        self._standing = standing
        done = (cell for cell in cells if standing.cell(cell) == "done")
        records = standing.ledger.storage / "cells"
        self._nearest = Nearest(done, records, experiment) if experiment is not None else None

    def of(self, cell: Cell) -> list[str]:
        """Return `["done"]`, or all reasons why a cell has work to do, the most important first."""
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
