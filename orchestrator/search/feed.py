"""SearchFeed: proposals become cells of the one tree; trials whose cells are finished or failed are answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from orchestrator.errors import StorageError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.experiment_plan import ExperimentPlan, plan_trials
from orchestrator.plan.jobs import Job
from orchestrator.plan.trials import Trial, TrialNotes
from orchestrator.search.desk import FAILED


class Proposals(Protocol):
    """Where trials come from, and where their answers go (`Tuning`)."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will be proposed."""

    def take(self) -> list[dict[str, Any]]:
        """Return the trials proposed since the last call: `number`, `params`, `values`."""

    def answer(self, number: int, answer: dict[str, Any]) -> None:
        """End a trial: with its objectives, or with `failed` and the reason."""


class SearchFeed:
    """The work of a search while it goes on: the whole tree again with every proposal.

    Args:
        walk: The trials known so far.
        notes: Where every trial is noted before it runs and when it ends.
        on_proposed: Called with a new trial.
        on_plan: Called with each new plan.
        on_end: Called with a trial that ended.

    Attributes:
        broken: Why nothing more can be stored; no trial is at fault, and none that needs it would ever end.
    """

    def __init__(
        self,
        walk: ExperimentPlan,
        notes: TrialNotes,
        on_proposed: Callable[[Trial], None],
        on_plan: Callable[[ExperimentPlan], None],
        on_end: Callable[[Trial], None],
    ) -> None:
        self.walk, self._notes = walk, notes
        self._on_proposed, self._on_plan, self._on_end = on_proposed, on_plan, on_end
        self._proposals: Proposals | None = None
        self.broken: str | None = None
        self._asked: set[int] = set()
        self._not_done: dict[str, str] = {}
        self._look = self._again = False

    def begin(self, proposals: Proposals) -> None:
        """Return where trials come from, from now on."""
        self._proposals = proposals

    def heard(self, event: Mapping[str, Any]) -> None:
        """Hear what became of a job: trials may have ended with it, and around damage it is planned anew."""
        self._look = True
        if event["event"] == "damaged":
            self._again = True
        elif event["event"] == "failed" and event["kind"] == StorageError.__name__:
            self.broken = event["error"]
        elif event["event"] in ("failed", "skipped"):
            self._not_done[event["id"]] = event["error"]

    def work(self) -> Sequence[Job] | None:
        """Return the newest plan where something was proposed; answers what has ended."""
        assert self._proposals is not None
        new = self._proposals.take()
        for proposal in new:
            self._take(Trial(**proposal))
        if self._again:
            self.walk = plan_trials(self.walk.loaded, self.walk.ledger, self.walk.trials)
        planned = bool(new) or self._again
        if planned:
            self._again = False
            self._on_plan(self.walk)
        if planned or self._look:
            self._look = False
            self._answer(self._proposals)
        return self.walk.tree.work(self.walk.ledger) if planned else None

    def closed(self) -> bool:
        """Return whether every trial is answered and none will come."""
        assert self._proposals is not None
        return self._proposals.ended

    def _take(self, proposed: Trial) -> None:
        trials = {trial.number: trial for trial in self.walk.trials} | {proposed.number: proposed}
        self.walk = plan_trials(self.walk.loaded, self.walk.ledger, [trials[number] for number in sorted(trials)])
        trial = next(trial for trial in self.walk.trials if trial.number == proposed.number)
        self._notes.write(trial)
        self._asked.add(trial.number)
        self._on_proposed(trial)

    def _answer(self, proposals: Proposals) -> None:
        for trial in self.walk.trials:
            if trial.number not in self._asked:
                continue
            now = standing(self.walk, trial)
            if now.state == "proposed" and self.broken is None and (error := self._why_not(trial)) is not None:
                now = trial.failed(error)
            if now.state == "proposed":
                continue
            self.walk = self.walk.with_trial(now)
            self._notes.write(now)
            self._asked.discard(now.number)
            proposals.answer(now.number, dict(now.objectives) if now.state == "finished" else {FAILED: now.error})
            self._on_end(now)

    def _why_not(self, trial: Trial) -> str | None:
        """Return why a trial will never end: a job it needs stands on one, such as a rehearsal, that no cell is known
        by.
        """
        jobs = (job for cell in self.walk.cells if cell.id in trial.cells for job in self.walk.jobs_of(cell))
        return next((self._not_done[job] for job in jobs if job in self._not_done), None)


def standing(walk: ExperimentPlan, trial: Trial) -> Trial:
    """Return a trial as the ledger has it: finished with all its cells, failed with one of them."""
    if not trial.cells:
        return trial  # it could not be planned
    known = {cell.id: cell for cell in walk.cells}
    cells: list[Cell] = [known[identity] for identity in trial.cells]
    states = {walk.status(cell) for cell in cells}
    if "failed" in states:
        failures = walk.failures()
        return trial.failed(next((failures[cell.name] for cell in cells if cell.name in failures), "a cell failed"))
    if states != {"finished"}:
        return replace(trial, state="proposed", objectives={}, error=None)
    assert walk.loaded.spec.search is not None
    return trial.ended([walk.record(cell) for cell in cells], walk.loaded.spec.search)
