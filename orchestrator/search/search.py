"""search_experiment(): a search from its file to its front; its trials are cells of one tree and one ledger."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orchestrator.dispatch.driver import Outcome, run_local
from orchestrator.dispatch.ray.placement import lanes_on
from orchestrator.dispatch.ray.session import ray_session, run_on_ray
from orchestrator.dispatch.signals import DeferredInterrupt, deadline_after
from orchestrator.errors import DataError, StageRunError, StorageError, UsageError
from orchestrator.plan.cells.cell import PROMOTED
from orchestrator.plan.experiment_plan import ExperimentPlan, plan_trials, prepare, record_experiment
from orchestrator.plan.jobs import Job
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.trials import Trial, TrialNotes, best_trials, search_id
from orchestrator.run import RunOutcome, Session, check_data, run_grid
from orchestrator.search.budget import Budget, most_trials
from orchestrator.search.halving import is_at_rung, judged
from orchestrator.search.trial_mailbox import EXCESS, FAILED, RUNG
from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.search_space import summary, trial_name

if TYPE_CHECKING:
    from orchestrator.search.tuning import LocalTuning, Tuning


def search_experiment(
    loaded: LoadedExperiment,
    *,
    local: bool = False,
    retry_failed: bool = False,
    fail_fast: bool = False,
    max_hours: float | None = None,
    console: Console | None = None,
) -> RunOutcome:
    """Propose and run trials up to `num_trials` or a budget, mark the front, and return the table.

    Arguments and errors are those of `Experiment.search`, which passes them on.
    """
    console, deadline = console or Console(), deadline_after(max_hours)
    search = loaded.spec.search
    if search is None:
        raise UsageError(f"{loaded.path}: there is no `search` in it; `llavolta run` runs a grid")
    walk = prepare(loaded)
    with _alone(walk, search_id(walk.loaded)) as notes:
        walk = plan_trials(walk.loaded, walk.ledger, notes.read())  # another driver may just have ended
        record_experiment(walk)
        say = partial(console.print, highlight=False, markup=False)
        session = SearchSession(updated(walk, notes, say, retry_failed), notes, console, deadline)
        if (error := unmeasured(session.walk)) is not None:
            raise StageRunError(error)
        session.walk.reference_values()
        with session.recording():
            if (left := most_trials(loaded.spec) - session.num_ended) > 0:
                session.search(left, local=local, fail_fast=fail_fast)
            else:
                console.print(_all_ended(session.walk), highlight=False)
        outcome = _outcome_of(session)
        if not outcome.waiting and search.promote is not None:
            outcome = _promote(session.walk, notes, outcome, console, deadline, local=local, fail_fast=fail_fast)
        return outcome


def _outcome_of(session: SearchSession) -> RunOutcome:
    trials = session.walk.trials
    failed = {trial_name(trial.number): trial.error or "" for trial in trials if trial.state == "failed"}
    waiting = {trial_name(trial.number): "" for trial in trials if trial.state == "proposed"}
    return replace(session.outcome(failed, waiting), front=_front_trials(session.walk))


def _promote(
    walk: ExperimentPlan, notes: TrialNotes, searched: RunOutcome, console: Console, deadline: float, *, local: bool,
    fail_fast: bool,
) -> RunOutcome:  # fmt: skip
    """Run the best trials again as `search.promote` says, and return how search and cells ended.

    What was promoted before, when there were fewer trials, stays so.
    """
    search = walk.loaded.spec.search
    assert search is not None and search.promote is not None
    best = {trial.number for trial in best_trials(walk.trials, search, search.promote.top)}
    trials = [replace(trial, promoted=trial.promoted or trial.number in best) for trial in walk.trials]
    walk.replanned(trials)  # what cannot be planned is not noted
    for trial in trials:
        notes.write(trial)

    def prepared() -> ExperimentPlan:
        plan = walk.replanned(notes.read())
        record_experiment(plan)
        return plan

    own = frozenset(cell.name for cell in walk.cells if PROMOTED not in cell.axes)
    outcome = run_grid(
        prepared, lambda plan: plan.tree.work(plan.ledger), console, local=local, fail_fast=fail_fast,
        deadline=deadline, left_out=own,
    )  # fmt: skip
    return replace(
        outcome, failed={**searched.failed, **outcome.failed}, front=searched.front,
        executed=searched.executed + outcome.executed, tried=searched.tried + outcome.tried,
    )  # fmt: skip


@contextmanager
def _alone(walk: ExperimentPlan, identity: str) -> Iterator[TrialNotes]:
    """Hold a search's lease and yield its notes: several drivers would propose the same trials."""
    name = f"search-{identity}"
    leases = Leases(walk.ledger.store, f"{name}-{uuid.uuid4().hex[:8]}")
    try:
        if leases.acquire(name) is None:
            holder = leases.holder(name)
            who = f"process {holder.pid} on {holder.host}" if holder is not None else "another process"
            raise UsageError(f"{walk.loaded.path}: {who} is doing this search; wait for it, or stop it")
        yield TrialNotes(walk.ledger.store, identity)
    finally:
        leases.close()


def updated(
    walk: ExperimentPlan, notes: TrialNotes, say: Callable[[str], None], retry_failed: bool = False
) -> ExperimentPlan:
    """Return the trials brought up to what their cells are: a driver that was killed may have noted less.

    What was stopped at a rung that is none any more is taken up again, as far as the budget allows.
    """
    if retry_failed:
        for cell in walk.cells:
            for job in walk.jobs_of(cell):
                if walk.ledger.failure(job) is not None:
                    walk.ledger.clear_failure(job)
    budget = Budget(walk.loaded)
    for trial in walk.trials:
        now = as_stored(walk, trial)
        if trial.state == "stopped" and now.state == "proposed":
            further = walk.replanned(walk.with_trial(now).trials)
            now = budget.priced(now, walk, further, trial.added_train_tflops)
            others = tuple(each for each in walk.trials if each.number != trial.number)
            if (why := budget.refusal(now, replace(walk, trials=others), further)) is not None:
                say(f"{trial_name(trial.number)} stays where it was stopped: {why}")
                continue
            walk = further
        if now != trial:
            walk = walk.with_trial(now)
            notes.write(now)
    return walk


def _all_ended(walk: ExperimentPlan) -> str:
    failed, stopped = (sum(trial.state == state for trial in walk.trials) for state in ("failed", "stopped"))
    more = f", {stopped} of them at a rung" if stopped else ""
    more += f", {failed} of them failed; --retry-failed takes them up again" if failed else ""
    return f"nothing to do: every trial has ended{more}"


def _front_trials(walk: ExperimentPlan) -> tuple[str, ...]:
    """Return the names of the trials on the Pareto front, by number."""
    on_front = (trial for trial in walk.trials if trial.cells and walk.front.issuperset(trial.cells))
    return tuple(trial_name(trial.number) for trial in on_front)


class SearchSession(Session):
    """The session of a search: proposals become cells of the one tree; trials that ended are answered.

    Args:
        notes: Where every trial is noted before it runs and when it ends.

    Attributes:
        broken: Why nothing more can be stored; no trial is at fault, and none that needs it would ever end.
        unmeasured: Why no trial can be judged: the first one lacks an objective, and so would every other, or what
            constraints compare with failed.

    Raises:
        UsageError: a limit of the search's budget cannot be kept.
    """

    def __init__(self, walk: ExperimentPlan, notes: TrialNotes, console: Console, deadline: float = math.inf) -> None:
        super().__init__(walk, console, deadline)
        self.broken: str | None = None
        self.unmeasured: str | None = None
        self._notes = notes
        self._budget = Budget(walk.loaded)
        self._posted: list[Trial] = []
        self._is_over = False
        self._tuning: Tuning | LocalTuning | None = None
        self._interrupt = DeferredInterrupt()
        self._asked: set[int] = set()
        self._num_trials = self._num_taken = 0
        self._not_done: dict[str, str] = {}
        self._is_due = False
        self._checked: set[str] = set()
        self._said: set[str] = set()

    @property
    def num_ended(self) -> int:
        """Trials that finished, failed or were stopped."""
        return sum(trial.state != "proposed" for trial in self.walk.trials)

    def search(self, num_trials: int, *, local: bool, fail_fast: bool) -> None:
        """Run `num_trials` trials, those first that were proposed before.

        Raises:
            Interrupted: a signal stopped it.
            StorageError: nothing more can be stored.
        """
        self._num_trials = num_trials
        self.execute([], local=local, fail_fast=fail_fast)

    def dispatch(self, work: Sequence[Job], *, local: bool, fail_fast: bool) -> Outcome:
        """Let Tune propose while the lanes train, or propose here and train here."""
        outcome = self._local(fail_fast) if local else self._on_ray(work, fail_fast)
        if self.broken is not None:
            raise StorageError(self.broken)
        if self.unmeasured is not None:
            raise StageRunError(self.unmeasured)
        return outcome

    def _local(self, fail_fast: bool) -> Outcome:
        from orchestrator.search.tuning import LocalTuning  # late: Optuna and Ray Tune take long to import

        self.begin(LocalTuning(self.walk, self._num_trials))
        return run_local([], self.walk.ledger, self.walk.loaded.spec.cluster, self, fail_fast=fail_fast)

    def _on_ray(self, work: Sequence[Job], fail_fast: bool) -> Outcome:
        cluster, ledger = self.walk.loaded.spec.cluster, self.walk.ledger
        with self._interrupt, ray_session(cluster.address):
            # Ray reads its environment when it is imported, which the session has set by now.
            from orchestrator.search.tuning import run_tuning

            folder = ledger.storage / "ray" / f"search-{search_id(self.walk.loaded)}"
            with run_tuning(self.walk, self._num_trials, _concurrency(self.walk), folder) as tuning:
                self.begin(tuning)
                return run_on_ray(work, ledger, cluster, self, fail_fast=fail_fast)

    def begin(self, tuning: Tuning | LocalTuning) -> None:
        """Take trials from here from now on."""
        self._tuning = tuning

    def is_unfinished(self, outcome: Outcome) -> bool:
        """Return whether a trial was proposed that has not ended."""
        return any(trial.state == "proposed" for trial in self.walk.trials)

    def work_to_come(self) -> float:
        """Return the trials still to be proposed for each one proposed: they will cost about as much."""
        return max(0, self._num_trials - self._num_taken) / max(1, self._num_taken)

    def summary(self) -> str:
        """Return how many trials have ended."""
        return f"{self.num_ended} trials have ended"

    # Hooks -----------------------------------------------------------------------------------------------------

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Note what became of a job: trials may have ended with it, and after damage it is planned anew."""
        super().on_event(event)
        self._is_due = True
        if event["event"] == "failed" and event["kind"] == StorageError.__name__:
            self.broken = event["error"]
        elif event["event"] in ("failed", "skipped"):
            self._not_done[event["id"]] = event["error"]

    def stop_asked(self) -> int:
        """Return 2 after a second Ctrl-C; 1 after a signal, or when no trial can be stored or has the objectives."""
        is_over = self.broken is not None or self.unmeasured is not None
        return 2 if self._interrupt.pending else int(self.stop() or is_over)

    def newer_work(self) -> Sequence[Job] | None:
        """Return the newest plan where something was proposed; answers the trials that have ended."""
        assert self._tuning is not None
        if self.unmeasured is None:
            self._posted += [Trial(**proposal) for proposal in self._tuning.take()]
        is_planned = self.is_damaged
        while self._posted and (self._is_over or not self._budget.must_wait(self.walk)):
            is_planned |= self._take(self._posted.pop(0), self._tuning)
        if self.is_damaged:
            self.walk = self.walk.replanned(self.walk.trials)
        self.is_damaged = False
        if is_planned:
            self._check_and_show()
        if is_planned or self._is_due:
            self._is_due = False
            while self._answer(self._tuning):  # what went on from a rung may be at the next one already
                self._check_and_show()
                is_planned = True
        return self.walk.tree.work(self.walk.ledger) if is_planned else None

    def is_closed(self) -> bool:
        """Return whether every trial is answered and none will come."""
        assert self._tuning is not None
        return self._tuning.ended

    def _take(self, proposed: Trial, tuning: Tuning | LocalTuning) -> bool:
        """Plan a trial and note it, before it runs; return False where a budget does not allow for it.

        The search stops there: it says so, and takes no further trial.
        """
        trials = {trial.number: trial for trial in self.walk.trials}
        is_noted = proposed.number in trials
        trials.setdefault(proposed.number, proposed)
        walk = self.walk.replanned([trials[number] for number in sorted(trials)])
        trial = next(trial for trial in walk.trials if trial.number == proposed.number)
        if not is_noted:
            trial = self._budget.priced(trial, self.walk, walk)
            why = None if self._is_over else self._budget.refusal(trial, self.walk, walk)
            if why is not None:
                self.view.say(f"the search stops: {why}")
                self._is_over, self._num_trials = True, self._num_taken
                tuning.stop()
            if self._is_over:
                tuning.answer(trial.number, {FAILED: "over budget"})
                return False
        self._num_taken += 1
        self.walk = walk.with_trial(trial)
        self._notes.write(trial)
        self._asked.add(trial.number)
        values = ", ".join(f"{path.rpartition('.')[2]} {summary(value)}" for path, value in trial.values.items())
        same = next((t for t in self.walk.trials if t.cells == trial.cells and t.number < trial.number), None)
        equal = f" (the same as {trial_name(same.number)})" if trial.cells and same is not None else ""
        self.view.say(f"proposed {trial_name(trial.number)}: {values}{equal}")
        return True

    def _check_and_show(self) -> None:
        work = self.walk.tree.work(self.walk.ledger)
        if check_data([job for job in work if job.id not in self._checked], self._say_once):
            raise DataError(
                "rows that this model cannot use are left out from now on; run the same command again, "
                "which plans without them"
            )
        self._checked |= {job.id for job in work}
        self.show(work)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.view.say(f"note: {text}")

    def _answer(self, tuning: Tuning | LocalTuning) -> bool:
        """Note and answer the trials that have ended; return whether some went on from a rung."""
        references = [identity for cells in self.walk.references.values() for identity in cells]
        if (error := self._why_not(references)) is not None:
            self.unmeasured = f"the search stopped: what search.constraints compares with is not trained: {error}"
            return False
        have_gone_on = False
        for trial in self.walk.trials:
            if trial.number not in self._asked:
                continue
            now = as_stored(self.walk, trial)
            if now.state == "proposed":
                now = judged(self.walk, now)
            if now.state == "proposed" and self.broken is None and (error := self._why_not(trial.cells)) is not None:
                now = trial.failed(error)
            if now.state == "proposed":
                if now.rungs != trial.rungs:
                    self._go_on(now)
                    have_gone_on = True
                continue
            self.walk = self.walk.with_trial(now)
            self._notes.write(now)
            self._asked.discard(now.number)
            tuning.answer(now.number, _answer_of(now))
            self.view.say(_ending_of(now))
            self.record(self.walk.cells_of(now))
            self.unmeasured = unmeasured(self.walk)
        return have_gone_on

    def _go_on(self, trial: Trial) -> None:
        """Plan a trial beyond the rung that it passed, and note it before it runs."""
        walk = self.walk.replanned(self.walk.with_trial(trial).trials)
        trial = self._budget.priced(trial, self.walk, walk, trial.added_train_tflops)
        self.walk = walk.with_trial(trial)
        self._notes.write(trial)
        *_, (rung, value) = trial.rungs.items()
        self.view.say(f"goes on {trial_name(trial.number)}: {value:.4g} at {rung}")

    def _why_not(self, cells: Collection[str]) -> str | None:
        """Return why cells will never end: a job they need depends on one, such as a rehearsal, that failed and that
        no cell names.
        """
        jobs = (job for cell in self.walk.cells if cell.id in cells for job in self.walk.jobs_of(cell))
        return next((self._not_done[job] for job in jobs if job in self._not_done), None)


def _answer_of(trial: Trial) -> dict[str, Any]:
    """Return what Tune's side is told of a trial that has ended."""
    if trial.state == "failed":
        return {FAILED: trial.error}
    if trial.state == "stopped":
        return {f"{RUNG}{step}": value for step, value in trial.rung_steps().items()}
    return {**trial.objectives, **{f"{EXCESS}{name}": value for name, value in trial.excess.items()}}


def _ending_of(trial: Trial) -> str:
    """Return a line that says how a trial ended."""
    text = ", ".join(f"{name} {value:.4g}" for name, value in trial.objectives.items())
    text += "".join(f"; violates {name} by {trial.excess[name]:.4g}" for name in trial.violated)
    if trial.state == "stopped":
        *_, (rung, value) = trial.rungs.items()
        text = f"{value:.4g} at {rung} is not among the best"
    return f"{trial.state} {trial_name(trial.number)}: {text or trial.error}"


def as_stored(walk: ExperimentPlan, trial: Trial) -> Trial:
    """Return a trial as the ledger has it: finished with all its cells, failed with one of them.

    One that was stopped is proposed again where it is to be trained further: without a scheduler, or with another one.
    """
    if not trial.cells:
        return trial  # it could not be planned
    assert walk.loaded.spec.search is not None
    scheduler = walk.loaded.spec.search.scheduler
    stays = trial.state != "stopped" or trial.planned_rung(scheduler) in trial.compared_at(scheduler)
    if stays and is_at_rung(walk, trial):
        return trial  # the session judges what is not judged yet
    cells = walk.cells_of(trial)
    states = {walk.status(cell) for cell in cells}
    if "failed" in states:
        failures = walk.failures()
        return trial.failed(next((failures[cell.name] for cell in cells if cell.name in failures), "a cell failed"))
    if states != {"finished"} or (references := walk.reference_values()) is None:
        # Where it stopped it is compared anew if there is a scheduler, by what that says now.
        passed = list(trial.rungs.items())[: -1 if trial.state == "stopped" and scheduler is not None else None]
        return replace(trial, state="proposed", objectives={}, excess={}, error=None, rungs=dict(passed))
    return trial.ended([walk.record(cell) for cell in cells], walk.loaded.spec.search, references)


def unmeasured(walk: ExperimentPlan) -> str | None:
    """Return why more trials would be in vain: one failed with all its cells finished, and none has the objectives."""
    if any(trial.state in ("finished", "stopped") for trial in walk.trials):
        return None
    finished = {cell.id for cell in walk.cells if walk.status(cell) == "finished"}
    failed = (trial for trial in walk.trials if trial.state == "failed" and trial.cells)
    lacks = next((t for t in failed if finished.issuperset(t.cells) or is_at_rung(walk, t)), None)
    if lacks is None:
        return None
    return (
        f"the search stopped: {trial_name(lacks.number)} is trained, and {lacks.error}\n    mend search.objectives or "
        "the evaluation and run the same command again; what is trained is not trained again"
    )


def _concurrency(walk: ExperimentPlan) -> int:
    """Return how many trials wait side by side: what keeps the lanes busy, since a trial has a cell for each seed."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return math.ceil(lanes_on(walk.loaded.spec.cluster, nodes) / len(walk.loaded.cells))
