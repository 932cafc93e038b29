"""run_experiment(): the whole walk from an experiment file to its table, top to bottom."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from rich.console import Console

from orchestrator.dispatch.feed import Replanning
from orchestrator.dispatch.stop import StopRequest
from orchestrator.errors import Interrupted, SpecError, StorageError
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare, record_experiment
from orchestrator.plan.jobs import EvaluationJob, Job, RootJob, StageJob
from orchestrator.plan.tree import build_stage_tree
from orchestrator.recording import open_recorder, put_record, record_cells
from orchestrator.report.console import nothing_done, print_ending
from orchestrator.report.live import LiveView
from orchestrator.report.table import Table, table_of
from orchestrator.spec.checks.unsupported import unsupported_keys
from orchestrator.spec.loaded import Source
from orchestrator.tracking.upload_queue import UploadQueue

_SEND_SECONDS = 20.0


@dataclass
class RunOutcome:
    """How a run ended.

    Attributes:
        failed: Cell name to the reason.
        executed: Jobs done by this run.
        tried: Jobs that this run began, those that failed included.
        waiting: Cells that neither finished nor failed, to the reason where there is one.
        unsent: Cells whose MLflow record is still to be sent.
        tracking_problem: Why they could not be sent.
        tracking_notes: What else the user should know of MLflow's experiment.
        front: Of a search, the names of the trials on the Pareto front.
    """

    walk: ExperimentPlan
    table: Table
    executed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    unsent: tuple[str, ...] = ()
    tracking_problem: str | None = None
    tracking_notes: tuple[str, ...] = ()
    tried: int = 0
    front: tuple[str, ...] | None = None

    @property
    def exit_code(self) -> int:
        """0 when every cell is finished, else 1."""
        return 1 if self.failed or self.waiting else 0

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        front = {} if self.front is None else {"front": self.front}
        done = {"executed": self.executed, "failed": self.failed, "waiting": self.waiting}
        return {**self.table.document(), **done, **front}

    def print(self, console: Console | None = None) -> None:
        """Print the table, every failure with its reason, and where figure and MLflow records are."""
        console = console or Console()
        if self.front is None and self.tried == 0:
            console.print(nothing_done(self.failed, self.waiting), highlight=False)
        print_ending(self.walk, self.table, self.failed, self.waiting, console)
        if self.front is not None:
            console.print(f"front: {', '.join(self.front) or 'no trial is finished'}", highlight=False)

    def _repr_html_(self) -> str:
        failed = [f"failed: {name}: {reason}" for name, reason in self.failed.items()]
        waiting = [f"not finished: {name}: {reason}" for name, reason in self.waiting.items()]
        return self.table._repr_html_() + "".join(f"<pre>{escape(line)}</pre>" for line in (*failed, *waiting))


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
    """Run what is missing of an experiment, records it, and return its table.

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
        SpecError: the file has faults, or uses a key whose machinery this version lacks.
        DataError: rows or images cannot be used.
        Interrupted: a signal stopped it; finished work stays.
    """
    console, began = console or Console(), time.monotonic()
    walk = _smoke_walk(source, overrides, console) if smoke else prepare(source, overrides)
    if faults := unsupported_keys(walk.loaded):
        raise SpecError(faults)
    work = walk.tree.work(walk.ledger, retry_failed=retry_failed)
    if check_data(work, lambda text: console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)):
        walk = _smoke_walk(source, overrides, console) if smoke else prepare(source, overrides)
        work = walk.tree.work(walk.ledger, retry_failed=retry_failed)
    record_experiment(walk)
    run = _Run(walk, work, console, retry_failed)
    with open_recorder(walk, console) as recorder:
        try:
            if work:
                run.execute(recorder, (max_hours, began), local=local, fail_fast=fail_fast)
        finally:
            record_cells(run.walk, recorder)
    return _outcome(run, recorder)


def _outcome(run: _Run, recorder: UploadQueue) -> RunOutcome:
    walk = run.walk
    names = {cell.id: cell.name for cell in walk.cells}
    failed = walk.failures()
    open_cells = [cell for cell in walk.cells if cell.name not in failed and walk.status(cell) != "finished"]
    waiting = {c.name: next((run.problems[i] for i in walk.jobs_of(c) if i in run.problems), "") for c in open_cells}
    unsent = tuple(names[identity] for identity in list(recorder.unsent))
    problem = recorder.problem if unsent else None
    notes, tried = tuple(recorder.notes), len(run.done | run.problems.keys())
    return RunOutcome(walk, table_of([walk]), len(run.done), failed, waiting, unsent, problem, notes, tried)


def _smoke_walk(source: Source, overrides: Sequence[str], console: Console) -> ExperimentPlan:
    from orchestrator.smoke import prepare_smoke

    walk, notes = prepare_smoke(source, overrides)
    text = "trial run, small model, few steps, 64 rows: it shows whether everything works; its numbers mean nothing"
    console.print("\n".join([text, *(f"    {note}" for note in notes)]), highlight=False, markup=False)
    return walk


def check_data(work: Sequence[Job], say: Callable[[str], None]) -> bool:
    """Read every row and image of the data that `work` uses and try it with the model, before anything starts.

    Args:
        work: What is to be done.
        say: Takes what users should know of the rows.

    Returns:
        Whether to plan again: rows are left out that the plan did not know of.

    Raises:
        DataError: rows cannot be used.
    """
    if not any(isinstance(job, StageJob | EvaluationJob) for job in work):
        return False
    from orchestrator.data.check import check_uses, uses_of_jobs

    findings = check_uses(uses_of_jobs(work))
    for text in findings.remarks:
        say(text)
    return findings.replan


class _Run:
    """One session of a run: dispatches the work, shows and counts it, and keeps MLflow's running cells up to date.

    Attributes:
        walk: The plan; made again where a stored state turned out to be damaged.
        done: Jobs that this run did.
        problems: Job to the reason why it failed.
    """

    def __init__(self, walk: ExperimentPlan, work: Sequence[Job], console: Console, retry_failed: bool) -> None:
        self.walk = walk
        self.done: set[str] = set()
        self.problems: dict[str, str] = {}
        self._work, self._retry_failed = work, retry_failed
        self._running: set[str] = set()
        self._sent = time.monotonic()
        self._feed = Replanning(self._plan_again)
        self._view = LiveView(
            work, _costs(work), walk.names_of(work), walk.ledger.metrics_file, console, walk.ledger.result
        )

    def execute(
        self, recorder: UploadQueue, limit: tuple[float | None, float], *, local: bool, fail_fast: bool
    ) -> None:
        """Do the work.

        Args:
            limit: Hours after which a stop is asked for, and since when they count.

        Raises:
            Interrupted: a signal stopped it.
        """
        hint = "finishing the step and writing a checkpoint; Ctrl-C now: stop at once"
        stop = StopRequest(lambda name: self._view.say(f"{name}: {hint}"), *limit)
        cluster = self.walk.loaded.spec.cluster

        def should_stop() -> bool:
            self._send_now_and_then(recorder)
            return stop()

        with stop, self._view:
            outcome = _dispatcher(local)(
                self._work,
                self.walk.ledger,
                cluster,
                lambda event: self._on_event(event, recorder),
                should_stop,
                fail_fast=fail_fast,
                feed=self._feed,
            )
        if stop.signal_name is not None and outcome.left:
            count = len(self.done)
            error = Interrupted(f"stopped by {stop.signal_name}; {count} jobs are done, run the same command to go on")
            error.exit_code = stop.exit_code
            raise error

    def _plan_again(self) -> list[Job]:
        tree = build_stage_tree(self.walk.cells, self.walk.ledger)
        self.walk = replace(self.walk, tree=tree)
        record_experiment(self.walk)  # it may go on from other stored states now, which `gc` must not take
        work = tree.work(self.walk.ledger, retry_failed=self._retry_failed)
        self._view.set_work(work, _costs(work), self.walk.names_of(work))
        return work

    def _on_event(self, event: Mapping[str, Any], recorder: UploadQueue) -> None:
        self._view.on_event(event)
        identity, kind = event["id"], event["event"]
        if kind == "started":
            self._running.add(identity)
            return
        self._running.discard(identity)
        if kind == "failed":
            self.problems[identity] = str(event["error"])
        elif kind == "damaged":
            self._feed.plan_again()
        elif kind == "finished" and not event.get("elsewhere"):
            self.done.add(identity)
            self._put({identity}, recorder, only_finished=True)

    def _send_now_and_then(self, recorder: UploadQueue) -> None:
        if time.monotonic() - self._sent > _SEND_SECONDS:
            self._sent = time.monotonic()
            self._put(self._running, recorder)

    def _put(self, jobs: set[str], recorder: UploadQueue, *, only_finished: bool = False) -> None:
        walk = self.walk
        cells = [cell for cell in walk.cells if not jobs.isdisjoint(walk.jobs_of(cell))]
        with contextlib.suppress(OSError, StorageError):  # training goes on; `record_cells` tries again at the end
            for cell in cells:
                if not only_finished or walk.status(cell) == "finished":
                    put_record(walk, cell, recorder)


def _costs(work: Sequence[Job]) -> dict[str, float]:
    return {job.id: relative_cost(job) for job in work}


def _dispatcher(local: bool) -> Callable[..., Any]:
    if local:
        from orchestrator.dispatch.local import run_local

        return run_local
    from orchestrator.dispatch.run_on_ray import run_on_ray

    return run_on_ray


def relative_cost(job: Job) -> float:
    """Return a job's weight in the time left: samples trained, an evaluation counted as a few steps."""
    if isinstance(job, StageJob):
        return float((job.last_step - job.first_step) * job.recipe["global_batch_size"])
    return 1.0 if isinstance(job, RootJob) else 512.0
