"""run_experiment(): the whole walk from an experiment file to its table, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from orchestrator.errors import SpecError
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.jobs import Job
from orchestrator.plan.tree import build_stage_tree
from orchestrator.session import RunOutcome, Session, check_data
from orchestrator.smoke import prepare_smoke
from orchestrator.spec.checks.unsupported import unsupported_keys
from orchestrator.spec.loaded import Source


def run_experiment(
    source: Source,
    overrides: Sequence[str] = (),
    *,
    local: bool = False,
    retry_failed: bool = False,
    fail_fast: bool = False,
    max_hours: float | None = None,
    smoke: bool = False,
    console: Console | None = None,
) -> RunOutcome:
    """Run what is missing of an experiment, record it, and return its table.

    Args:
        source: The experiment: its file, a mapping, or a loaded one.
        overrides: `a.b=c` settings over the file's.
        local: In this process, without Ray, for a debugger.
        retry_failed: Takes up what failed in an earlier run.
        fail_fast: Stops at the first failure.
        max_hours: After so many hours it stops as at the first SIGTERM.
        smoke: The experiment made small, in a storage of its own: every code path in a minute or two.
        console: Where progress is shown.

    Raises:
        SpecError: the file has errors, or uses a key whose machinery this version lacks.
        DataError: rows or images cannot be used.
        Interrupted: a signal stopped it; finished work stays.
    """
    console, began = console or Console(), time.monotonic()
    walk = _smoke_walk(source, overrides, console) if smoke else prepare(source, overrides)
    if errors := unsupported_keys(walk.loaded):
        raise SpecError(errors)
    work = walk.tree.work(walk.ledger, retry_failed=retry_failed)
    if check_data(work, lambda text: console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)):
        walk = _smoke_walk(source, overrides, console) if smoke else prepare(source, overrides)
        work = walk.tree.work(walk.ledger, retry_failed=retry_failed)
    session = GridSession(walk, console, retry_failed, max_hours, began)
    session.show(work)
    with session.recording():
        if work:
            session.execute(work, local=local, fail_fast=fail_fast)
    walk = session.walk
    failed = walk.failures()
    open_cells = [cell for cell in walk.cells if cell.name not in failed and walk.status(cell) != "finished"]
    problems = session.problems
    waiting = {c.name: next((problems[i] for i in walk.jobs_of(c) if i in problems), "") for c in open_cells}
    return session.outcome(failed, waiting)


def _smoke_walk(source: Source, overrides: Sequence[str], console: Console) -> ExperimentPlan:
    walk, notes = prepare_smoke(source, overrides)
    text = "trial run, small model, few steps, 64 rows: it shows whether everything works; its numbers mean nothing"
    console.print("\n".join([text, *(f"    {note}" for note in notes)]), highlight=False, markup=False)
    return walk


class GridSession(Session):
    """The session of a grid: the work is known from the start, and planned again where a stored state is damaged."""

    replans = True

    def __init__(
        self,
        walk: ExperimentPlan,
        console: Console,
        retry_failed: bool,
        max_hours: float | None = None,
        began: float = 0.0,
    ) -> None:
        super().__init__(walk, console, max_hours, began)
        self._retry_failed = retry_failed
        self._is_damaged = False

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Plan again after damage: what needs the state is to be planned with it."""
        super().on_event(event)
        self._is_damaged |= event["event"] == "damaged"

    def newer_work(self) -> Sequence[Job] | None:
        """Return the plan made anew after damage."""
        if not self._is_damaged:
            return None
        self._is_damaged = False
        self.walk = replace(self.walk, tree=build_stage_tree(self.walk.cells, self.walk.ledger))
        work = self.walk.tree.work(self.walk.ledger, retry_failed=self._retry_failed)
        self.show(work)
        return work

    def is_closed(self) -> bool:
        """Return whether no new plan is due."""
        return not self._is_damaged
