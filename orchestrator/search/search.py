"""search_experiment(): a search from its file to its front; its trials are cells of one tree and one ledger."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.dispatch.deferred import DeferredInterrupt
from orchestrator.dispatch.stop import StopRequest
from orchestrator.errors import DataError, Interrupted, SpecError, StorageError, UsageError
from orchestrator.plan.experiment_plan import ExperimentPlan, plan_trials, prepare, record_experiment
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.trials import Trial, TrialNotes, search_id
from orchestrator.recording import open_recorder, put_record, record_cells
from orchestrator.report.live import LiveView
from orchestrator.report.table import table_of
from orchestrator.run import RunOutcome, check_data, relative_cost
from orchestrator.search.feed import SearchFeed, standing
from orchestrator.spec.checks.unsupported import unsupported_keys
from orchestrator.spec.loaded import Source
from orchestrator.spec.search_space import summary, trial_name
from orchestrator.tracking.upload_queue import UploadQueue


def search_experiment(
    source: Source,
    overrides: Sequence[str] = (),
    *,
    retry_failed: bool = False,
    fail_fast: bool = False,
    max_hours: float | None = None,
    console: Console | None = None,
) -> RunOutcome:
    """Propose and runs trials until there are `num_trials`, mark the front, and return the table.

    Args:
        source: The experiment, with a `search`: its file, a mapping, or a loaded one.
        overrides: `a.b=c` settings over the file's.
        retry_failed: Takes up trials that failed in an earlier run.
        fail_fast: Stops at the first failure.
        max_hours: After so many hours it stops as at the first SIGTERM.
        console: Where progress is shown.

    Raises:
        SpecError: the file has faults, or uses a key whose machinery this version lacks.
        UsageError: the file has no search.
        DataError: rows or images cannot be used.
        Interrupted: a signal stopped it; finished work stays.
    """
    console, began = console or Console(), time.monotonic()
    walk = prepare(source, overrides)
    search = walk.loaded.spec.search
    if search is None:
        raise UsageError(f"{walk.loaded.path}: there is no `search` in it; `llavolta run` runs a grid")
    if faults := unsupported_keys(walk.loaded, searching=True):
        raise SpecError(faults)
    identity = search_id(walk.loaded)
    with _alone(walk, identity):
        notes = TrialNotes(walk.ledger.store, identity)
        walk = plan_trials(walk.loaded, walk.ledger, notes.read())  # another driver may just have ended
        record_experiment(walk)
        walk = _as_the_ledger_has_it(walk, notes, retry_failed)
        run = _SearchRun(walk, notes, walk.ledger.storage / "ray" / f"search-{identity}", console)
        with open_recorder(walk, console) as recorder:
            try:
                if (left := search.num_trials - _ended(walk)) > 0:
                    run.execute(recorder, left, StopRequest(run.say_stop, max_hours, began), fail_fast)
                else:
                    console.print(_all_ended(walk), highlight=False)
            finally:
                walk = run.feed.walk
                record_cells(walk, recorder)
    return _outcome(walk, run, recorder)


@contextmanager
def _alone(walk: ExperimentPlan, identity: str) -> Iterator[None]:
    """Return one driver numbers a search's trials; several would propose the same ones."""
    name = f"search-{identity}"
    leases = Leases(walk.ledger.store, f"{name}-{uuid.uuid4().hex[:8]}")
    try:
        if leases.acquire(name) is None:
            holder = leases.holder(name)
            who = f"process {holder.pid} on {holder.host}" if holder is not None else "another process"
            raise UsageError(f"{walk.loaded.path}: {who} is doing this search; wait for it, or stop it")
        yield
    finally:
        leases.close()


def _as_the_ledger_has_it(walk: ExperimentPlan, notes: TrialNotes, retry_failed: bool) -> ExperimentPlan:
    """Return the trials brought up to what their cells are: a driver that was killed may have noted less."""
    if retry_failed:
        for cell in walk.cells:
            for job in walk.jobs_of(cell):
                if walk.ledger.failure(job) is not None:
                    walk.ledger.clear_failure(job)
    for trial in walk.trials:
        now = standing(walk, trial)
        if now != trial:
            walk = walk.with_trial(now)
            notes.write(now)
    return walk


def _all_ended(walk: ExperimentPlan) -> str:
    failed = sum(trial.state == "failed" for trial in walk.trials)
    more = f", {failed} of them failed; --retry-failed takes them up again" if failed else ""
    return f"nothing to do: every trial has ended{more}"


def _ended(walk: ExperimentPlan) -> int:
    return sum(trial.state != "proposed" for trial in walk.trials)


def _front_trials(walk: ExperimentPlan) -> tuple[str, ...]:
    """Return the names of the trials on the Pareto front, by number."""
    on_front = (trial for trial in walk.trials if trial.cells and walk.front.issuperset(trial.cells))
    return tuple(trial_name(trial.number) for trial in on_front)


def _outcome(walk: ExperimentPlan, run: _SearchRun, recorder: UploadQueue) -> RunOutcome:
    names = {cell.id: cell.name for cell in walk.cells}
    failed = {trial_name(trial.number): trial.error or "" for trial in walk.trials if trial.state == "failed"}
    waiting = {trial_name(trial.number): "" for trial in walk.trials if trial.state == "proposed"}
    unsent = tuple(names[identity] for identity in list(recorder.unsent))
    problem = recorder.problem if unsent else None
    table = table_of([walk])
    return RunOutcome(
        walk, table, len(run.done), failed, waiting, unsent, problem, tuple(recorder.notes), front=_front_trials(walk)
    )


def _concurrency(walk: ExperimentPlan) -> int:
    """Return the trials side by side: what keeps the lanes busy, since a trial has a cell for each seed."""
    import ray

    from orchestrator.dispatch.placement import room_for

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    lanes = room_for(walk.loaded.spec.cluster, nodes, lambda: nodes).lanes
    return max(1, math.ceil(lanes / len(walk.loaded.cells)))


class _SearchRun:
    """One session of a search: Tune proposes, the lanes train, events come by here."""

    def __init__(self, walk: ExperimentPlan, notes: TrialNotes, folder: Path, console: Console) -> None:
        self.feed = SearchFeed(walk, notes, self._proposed, self._planned, self._ended)
        self.done: set[str] = set()
        self._folder = folder
        self._checked: set[str] = set()
        self._said: set[str] = set()
        self._said = set[str]()
        self._recorder: UploadQueue | None = None
        self._view = LiveView([], {}, {}, walk.ledger.metrics_file, console, walk.ledger.result)

    def say_stop(self, name: str) -> None:
        """Return what a signal does."""
        self._view.say(f"{name}: finishing the step and writing a checkpoint; Ctrl-C now: stop at once")

    def execute(self, recorder: UploadQueue, num_trials: int, stop: StopRequest, fail_fast: bool) -> None:
        """Run `num_trials` trials, those first that were proposed before.

        Raises:
            Interrupted: a signal stopped it.
            StorageError: nothing more can be stored.
        """
        from orchestrator.dispatch.ray_session import ray_session
        from orchestrator.dispatch.run_on_ray import run_on_ray
        from orchestrator.search.tuning import Tuning

        self._recorder = recorder
        walk, cluster = self.feed.walk, self.feed.walk.loaded.spec.cluster
        with stop, self._view, DeferredInterrupt() as interrupt, ray_session(cluster.address):

            def stop_asked() -> int:
                return 2 if interrupt.pending else int(stop() or self.feed.broken is not None)

            with Tuning(walk, num_trials, _concurrency(walk), self._folder) as tuning:
                self.feed.begin(tuning)
                run_on_ray([], walk.ledger, cluster, self._on_event, stop_asked, fail_fast=fail_fast, feed=self.feed)
        if self.feed.broken is not None:
            raise StorageError(self.feed.broken)
        if stop.signal_name is not None and any(trial.state == "proposed" for trial in self.feed.walk.trials):
            error = Interrupted(
                f"stopped by {stop.signal_name}; {_ended(self.feed.walk)} trials have ended, "
                "run the same command to go on"
            )
            error.exit_code = stop.exit_code
            raise error

    def _proposed(self, trial: Trial) -> None:
        told = ", ".join(f"{path.rpartition('.')[2]} {summary(value)}" for path, value in trial.values.items())
        same = next((t for t in self.feed.walk.trials if t.cells == trial.cells and t.number < trial.number), None)
        equal = f" (the same as {trial_name(same.number)})" if trial.cells and same is not None else ""
        self._view.say(f"proposed {trial_name(trial.number)}: {told}{equal}")

    def _planned(self, walk: ExperimentPlan) -> None:
        record_experiment(walk)
        work = walk.tree.work(walk.ledger)
        if check_data([job for job in work if job.id not in self._checked], self._say_once):
            raise DataError(
                "rows that this model cannot use are left out from now on; run the same command again, "
                "which plans without them"
            )
        self._checked |= {job.id for job in work}
        self._view.set_work(work, {job.id: relative_cost(job) for job in work}, walk.names_of(work))

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._view.say(f"note: {text}")

    def _ended(self, trial: Trial) -> None:
        told = ", ".join(f"{name} {value:.4g}" for name, value in trial.objectives.items())
        self._view.say(f"{trial.state} {trial_name(trial.number)}: {told or trial.error}")
        assert self._recorder is not None
        for cell in self.feed.walk.cells:
            if cell.id in trial.cells:
                put_record(self.feed.walk, cell, self._recorder)

    def _on_event(self, event: Mapping[str, Any]) -> None:
        self._view.on_event(event)
        if event["event"] == "finished" and not event.get("elsewhere"):
            self.done.add(event["id"])
        self.feed.heard(event)
