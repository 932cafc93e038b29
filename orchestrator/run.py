"""run_experiment(): the whole walk from an experiment file to its table, top to bottom; and a driver's session.

A session, of a run or of a search, dispatches jobs, shows them, and keeps MLflow's cells up to date.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from typing import Any

from rich.console import Console

from orchestrator.dispatch.driver import Hooks, Outcome, run_local
from orchestrator.dispatch.ray.session import run_on_ray
from orchestrator.dispatch.signals import StopRequest, deadline_after
from orchestrator.errors import Interrupted, StorageError, UsageError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.cells.cell import Cell, distinct_cells
from orchestrator.plan.documents import most_checkpoint_bytes
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare, record_experiment
from orchestrator.plan.io_retry import stat_or_none
from orchestrator.plan.jobs import EvaluationJob, Job, RootJob, StageJob
from orchestrator.plan.ledger.process import Process
from orchestrator.plan.tree import build_stage_tree
from orchestrator.registry import nearest
from orchestrator.report.cell_folders import write_cell_folder
from orchestrator.report.console import nothing_done, print_ending
from orchestrator.report.figures import training_figure
from orchestrator.report.live import LiveView
from orchestrator.report.overview import complete_summary, experiment_tags, summary_record
from orchestrator.report.table import Table, table_of
from orchestrator.report.units import counted_noun
from orchestrator.smoke import prepare_smoke
from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.model_facts import model_facts
from orchestrator.tracking.mlflow_state import (
    ExperimentState,
    abandoned,
    has_record,
    one_at_a_time,
    read_state,
    with_own_note,
)
from orchestrator.tracking.mlflow_tracker import CellTracker
from orchestrator.tracking.protocol import Tracker, open_trackers
from orchestrator.tracking.upload_queue import UploadQueue

_UPLOAD_SECONDS = 20.0


def run_experiment(
    loaded: LoadedExperiment,
    *,
    local: bool = False,
    retry_failed: bool = False,
    fail_fast: bool = False,
    max_hours: float | None = None,
    smoke: bool = False,
    console: Console | None = None,
) -> RunOutcome:
    """Run what is missing of an experiment, record it, and return its table.

    Arguments and errors are those of `Experiment.run`, which passes them on.
    """
    console, deadline = console or Console(), deadline_after(max_hours)

    def prepared() -> ExperimentPlan:
        walk = _smoke_walk(loaded, console) if smoke else prepare(loaded)
        if walk.loaded.spec.search is not None:
            raise UsageError(f"{loaded.path}: there is a `search` in it: `llavolta search` runs it, `run` does grids")
        return walk

    def work_of(walk: ExperimentPlan) -> list[Job]:
        return walk.tree.work(walk.ledger, retry_failed=retry_failed)

    return run_grid(prepared, work_of, console, local=local, fail_fast=fail_fast, deadline=deadline)


def evaluate_experiment(
    loaded: LoadedExperiment,
    cell: str | None = None,
    *,
    local: bool = False,
    retry_failed: bool = False,
    fail_fast: bool = False,
    console: Console | None = None,
) -> RunOutcome:
    """Run the evaluations that trained cells lack, record them, and return the table.

    Arguments and errors are those of `Experiment.evaluate`, which passes them on.
    """
    console = console or Console()

    def prepared() -> ExperimentPlan:
        walk = prepare(loaded)
        if walk.loaded.spec.search is not None:
            raise UsageError(
                f"{loaded.path}: there is a `search` in it: `llavolta search` runs it, `evaluate` does grids"
            )
        return walk

    walk = prepared()
    chosen = {walk.find(cell).name} if cell is not None else {each.name for each in walk.cells}
    open_ = [each.name for each in walk.cells if each.name in chosen and not _is_trained(walk, each)]
    if open_ and cell is not None:
        raise UsageError(f"cell {open_[0]} is not trained yet: `llavolta run` trains it")
    needed = walk.tree.needed(walk.ledger)
    lost = [
        each.name
        for each in walk.cells
        if each.name in chosen and each.phases and each.name not in open_
        if any(test.state in needed and walk.ledger.evaluation(test.id) is None for test in each.tests)
    ]
    notes = {
        "not trained yet, and left out: {}; `llavolta run` trains them": open_,
        "states to be tested were not kept: {}; `llavolta run` trains up to them again": lost,
    }
    for text, names in notes.items():
        if names:
            note = f"note: {text.format(', '.join(names))}"
            console.print(note, highlight=False, markup=False, soft_wrap=True)

    def work_of(walk: ExperimentPlan) -> list[Job]:
        return tests_of_trained(walk, chosen, retry_failed=retry_failed)

    left_out = frozenset(each.name for each in walk.cells) - chosen | frozenset(open_)
    return run_grid(lambda: prepare(loaded), work_of, console, local=local, fail_fast=fail_fast, left_out=left_out)


def record_scores(
    loaded: LoadedExperiment, cell: str, scores: Mapping[str, float], source: str, console: Console | None = None
) -> RunOutcome:
    """Record scores of a cell that someone else measured, in the ledger and in MLflow, and return the table.

    Arguments and errors are those of `Experiment.record`, which passes them on.
    """
    console = console or Console()
    walk = prepare(loaded)
    if walk.loaded.spec.search is not None:
        raise UsageError(f"{loaded.path}: there is a `search` in it: scores are recorded of the cells of grids")
    if not source.strip():
        raise UsageError("source: say where the scores are from, such as a server's name and the submission's date")
    chosen = walk.find(cell)
    found = [(*_scored(walk, chosen, name), value) for name, value in scores.items()]
    for name, value in scores.items():
        if not math.isfinite(value):
            raise UsageError(f"{name} is {value}; a score is a finite number")
    for job, metric, value in found:
        score = {"value": float(value), "source": source.strip(), "when": time.time()}
        walk.ledger.record_score(job.id, metric, score)
    everyone = frozenset(each.name for each in walk.cells)
    return run_grid(lambda: prepare(loaded), lambda _: [], console, local=True, fail_fast=False, left_out=everyone)


_METRIC = re.compile(r"[A-Za-z0-9_. -]+(/[A-Za-z0-9_. -]+)*")


def _scored(walk: ExperimentPlan, cell: Cell, name: str) -> tuple[EvaluationJob, str]:
    """Return the finished evaluation that a score is of, and the metric's name in it.

    Raises:
        UsageError: there is no such evaluation, it is not done, or it has measured that metric itself.
    """
    fits = [job for job in cell.evaluations if name.startswith(f"{job.place}/")]
    job = max(fits, key=lambda job: len(job.place), default=None)
    metric = name.removeprefix(f"{job.place}/") if job is not None else ""
    if job is None or not _METRIC.fullmatch(metric):
        places = [f"{each.place}/METRIC" for each in cell.evaluations]
        near = nearest(name.rpartition("/")[0], [each.place for each in cell.evaluations])
        hint = f"; did you mean {near}/{name.rpartition('/')[2]}?" if near else ""
        raise UsageError(
            f"{name}: cell {cell.name} has no such evaluation{hint}; there are {', '.join(places) or 'none'}"
        )
    result = walk.ledger.evaluation(job.id)
    if result is None:
        failure = walk.ledger.failure(job.id)
        why = f"it failed: {failure.get('error')}" if failure else "it is not done yet; `llavolta evaluate` does it"
        raise UsageError(f"{name}: the score belongs to what evaluate.{job.label} under {job.under} wrote, and {why}")
    if metric in result["metrics"]:
        raise UsageError(f"{name}: it was measured, {result['metrics'][metric]:g}; record a score under another name")
    return job, metric


def tests_of_trained(walk: ExperimentPlan, cells: Collection[str], *, retry_failed: bool = False) -> list[Job]:
    """Return the evaluations of cells whose states are stored; of a cell without phases its initial weights too.

    Args:
        walk: The plan.
        cells: Names of the cells.
        retry_failed: Those that failed are done again.
    """
    chosen = [cell for cell in walk.cells if cell.name in cells]
    tests = {test.id for cell in chosen for test in cell.tests}
    needed = walk.tree.needed(walk.ledger)
    roots = {cell.root.id for cell in chosen if not cell.phases}
    work = walk.tree.work(walk.ledger, retry_failed=retry_failed)
    return [
        job
        for job in work
        if job.id in roots
        or (isinstance(job, EvaluationJob) and job.id in tests and (job.state not in needed or job.state in roots))
    ]


def _is_trained(walk: ExperimentPlan, cell: Cell) -> bool:
    return not cell.phases or walk.ledger.is_done(cell.state)


def run_grid(
    prepared: Callable[[], ExperimentPlan],
    work_of: Callable[[ExperimentPlan], list[Job]],
    console: Console,
    *,
    local: bool,
    fail_fast: bool,
    deadline: float = math.inf,
    left_out: frozenset[str] = frozenset(),
) -> RunOutcome:
    """Do the work of a grid's cells, record it, and return how it ended; cells that are left out wait for nothing."""
    walk = prepared()
    work = work_of(walk)
    if check_data(work, lambda text: console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)):
        walk = prepared()
        work = work_of(walk)
    session = GridSession(walk, console, work_of, deadline)
    session.show(work)
    with session.recording():
        if work:
            session.execute(work, local=local, fail_fast=fail_fast)
    walk = session.walk
    failed = {name: reason for name, reason in walk.failures().items() if name not in left_out}
    done = {*failed, *left_out}
    open_cells = [cell for cell in walk.cells if cell.name not in done and walk.status(cell) != "finished"]
    problems = session.problems
    waiting = {c.name: next((problems[i] for i in walk.jobs_of(c) if i in problems), "") for c in open_cells}
    return session.outcome(failed, waiting)


def _smoke_walk(loaded: LoadedExperiment, console: Console) -> ExperimentPlan:
    walk, notes = prepare_smoke(loaded)
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
    # Arrow and numpy take as long to import as all of a run that finds nothing to do.
    from orchestrator.data.check import check_uses, uses_of_jobs

    findings = check_uses(uses_of_jobs(work))
    for text in findings.remarks:
        say(text)
    return findings.replan


@dataclass
class RunOutcome:
    """How a run ended.

    Attributes:
        failed: Cell name to the reason.
        executed: Jobs done by this run.
        tried: Jobs that this run began, those that failed included.
        waiting: Cells that neither finished nor failed, to the reason where there is one.
        unsent: Cells (and `the summary`) whose MLflow record is still to be sent.
        tracking_problem: Why they could not be sent.
        tracking_notes: What else the user should know of MLflow's experiment.
        front: Of a search, the names of the trials on the Pareto front.
        experiment_id: MLflow's number of the experiment; None where it could not be asked.
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
    experiment_id: str | None = None

    def __repr__(self) -> str:
        ended = f"{self.executed} jobs executed, {len(self.failed)} cells failed, {len(self.waiting)} not finished"
        return f"<RunOutcome of {self.walk.loaded.spec.name}: {ended}>"

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
        print_ending(self.walk, self.table, self.failed, self.waiting, console, self.experiment_id)
        if self.front is not None:
            console.print(f"front: {', '.join(self.front) or 'no trial is finished'}", highlight=False)

    def _repr_html_(self) -> str:
        failed = [f"failed: {name}: {reason}" for name, reason in self.failed.items()]
        waiting = [f"not finished: {name}: {reason}" for name, reason in self.waiting.items()]
        return self.table._repr_html_() + "".join(f"<pre>{escape(line)}</pre>" for line in (*failed, *waiting))


class Session(Hooks):
    """A driver's session: the hooks that a dispatcher calls, the live view, and the records for MLflow.

    Args:
        walk: The plan.
        console: Where progress is shown.
        deadline: Reading of `time.monotonic` at which it stops as at the first SIGTERM.

    Attributes:
        walk: The newest plan.
        done: Jobs that this session did.
        problems: Job to the reason why it failed.
        is_damaged: Whether a stored state turned out to be damaged since the newest plan.
    """

    replans = True

    def __init__(self, walk: ExperimentPlan, console: Console, deadline: float = math.inf) -> None:
        self.walk = walk
        self.done: set[str] = set()
        self.problems: dict[str, str] = {}
        self.is_damaged = False
        self.stop = StopRequest(self._say_stop, deadline)
        self.view = LiveView([], {}, {}, walk.ledger.metrics_file, console, walk.ledger.result)
        self._console = console
        self._recorder: UploadQueue | None = None
        self._others: list[UploadQueue] = []
        self._table: Table | None = None
        self._experiment_id: str | None = None
        self._running: set[str] = set()
        self._uploaded = time.monotonic()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record cells in MLflow during the block, and all that MLflow lacks at its end; in other trackers likewise.

        Raises:
            UsageError: the library of another tracker is not installed, or MLflow's address lacks a variable.
        """
        walk = self.walk
        _ = walk.tracking_uri  # an address that cannot be put together is told before anything is trained
        others = open_trackers(walk.loaded.spec.tracking.also, walk.experiment_name, walk.ledger.storage)
        # Drivers make runs one at a time, so that no cell gets two.
        alone = partial(one_at_a_time, walk.ledger.store, walk.experiment_name)

        def open_tracker() -> CellTracker:
            return CellTracker(walk.tracking_uri, walk.experiment_name, alone, self._lives, walk.ledger.url)

        say = partial(self._console.print, highlight=False, markup=False)

        def opened(tracker: Tracker) -> UploadQueue:
            return UploadQueue(lambda: tracker, say, tracker.kind)

        with UploadQueue(open_tracker, say) as self._recorder, contextlib.ExitStack() as open_:
            self._others = [open_.enter_context(opened(tracker)) for tracker in others]
            try:
                yield
            finally:
                seen = self._record_all()
            self._describe(seen)

    def _lives(self, driver: Process, storage: str) -> bool:
        """Return whether a driver lives: on this machine by its process, elsewhere by the leases it holds here."""
        gone = driver.is_gone()
        if gone is not None:
            return not gone
        ledger = self.walk.ledger
        holders = ledger.living_holders().values() if storage == ledger.url else None
        return holders is None or any((holder.host, holder.pid) == (driver.host, driver.pid) for holder in holders)

    def _record_all(self) -> ExperimentState | None:
        """Write the cells' folders and queue every record that MLflow does not have as it stands.

        Returns:
            What MLflow has, where that could be read.
        """
        assert self._recorder is not None
        walk = self.walk
        # Asked before MLflow is read: a record that was made earlier (of an earlier front) may come after.
        waiting = self._recorder.waiting()
        seen = read_state(walk.tracking_uri, walk.experiment_name)
        lacking, tracked = [], {cell.name for cell in distinct_cells(walk.cells)}
        for cell in walk.cells:
            record = walk.record(cell)
            # Where another driver works on it, that one records it.
            if record.status in ("new", "running"):
                continue
            write_cell_folder(walk, cell, record)
            if cell.name not in tracked:
                continue
            self._queue_elsewhere(cell)
            drawn = _with_figure(walk, cell, record, draw=False)
            known = seen.runs.get(cell.id) if seen is not None and cell.id not in waiting else None
            if drawn is None or not has_record(known, drawn):
                lacking.append(cell)
        self._queue(lacking)
        if seen is not None and not lacking and abandoned(seen, self._lives):
            self._recorder.end_abandoned()
        return seen

    def _describe(self, seen: ExperimentState | None) -> None:
        """Make the table, and have MLflow's experiment show what it shows, in a run of its own too."""
        assert self._recorder is not None
        self._table = table_of([self.walk])
        tags = experiment_tags(self.walk, self._table)
        if seen is None or not with_own_note(tags, seen.tags).items() <= seen.tags.items():
            self._recorder.describe(tags)
        summary = summary_record(self.walk, self._table)
        known = None if seen is None or summary is None else seen.runs.get(summary.cell_id)
        if summary is not None and not has_record(known, summary):
            self._recorder.put(summary.cell_id, partial(complete_summary, self.walk, self._table, summary))
        self._experiment_id = None if seen is None else seen.experiment_id

    def record(self, cells: Iterable[Cell]) -> None:
        """Queue cells for MLflow; what cannot be read now is tried again at the end."""
        with contextlib.suppress(OSError, StorageError):
            self._queue(cells)

    def _queue(self, cells: Iterable[Cell]) -> None:
        """Queue cells, whose records are read when their turn comes."""
        assert self._recorder is not None
        for cell in cells:
            self._recorder.put(cell.id, partial(_complete_record, self.walk, cell))
            self._queue_elsewhere(cell)

    def _queue_elsewhere(self, cell: Cell) -> None:
        for other in self._others:
            other.put(cell.id, partial(self.walk.record, cell))

    def execute(self, work: Sequence[Job], *, local: bool = False, fail_fast: bool = False) -> None:
        """Do the work, and what comes newer.

        Raises:
            Interrupted: a signal stopped it.
        """
        if self._recorder is not None:
            self._recorder.describe(experiment_tags(self.walk))  # for those who look while it runs
        with self.stop, self.view:
            outcome = self.dispatch(work, local=local, fail_fast=fail_fast)
        if self.stop.signal_name is not None and self.is_unfinished(outcome):
            text = f"stopped by {self.stop.signal_name}; {self.summary()}, run the same command to resume"
            raise Interrupted(text, self.stop.exit_code)

    def dispatch(self, work: Sequence[Job], *, local: bool, fail_fast: bool) -> Outcome:
        """Do the work in this process or in lanes."""
        run = run_local if local else run_on_ray
        return run(work, self.walk.ledger, self.walk.loaded.spec.cluster, self, fail_fast=fail_fast)

    def checkpoint_bytes(self) -> float:
        """Return the size of a checkpoint of the largest model, as if all its weights were trained."""
        model = self.walk.loaded.spec.model  # a search has no cells when it begins
        known = [cell.facts for cell in self.walk.cells] or [model_facts(model.model_name_or_path, model.revision)]
        return max(map(most_checkpoint_bytes, known))

    def show(self, work: Sequence[Job]) -> None:
        """Show a new plan's work, and record the experiment as it is planned now: `gc` keeps what it starts from."""
        record_experiment(self.walk)
        costs = {job.id: _relative_cost(job) for job in work}
        self.view.set_work(work, costs, self.walk.names_of(work), self.work_to_come())

    def work_to_come(self) -> float:
        """Return how much will be planned later, for each unit of cost planned so far."""
        return 0.0

    def outcome(self, failed: dict[str, str], waiting: dict[str, str]) -> RunOutcome:
        """Return how it ended.

        Args:
            failed: Cell or trial to the reason.
            waiting: Cell or trial that neither finished nor failed, to the reason.
        """
        assert self._recorder is not None
        names = {cell.id: cell.name for cell in distinct_cells(self.walk.cells)}
        unsent = tuple(names.get(identity, "the summary") for identity in list(self._recorder.unsent))
        elsewhere = []
        for other in self._others:
            if cells := ", ".join(names.get(identity, identity) for identity in list(other.unsent)):
                elsewhere.append(f"{other.name} has not recorded {cells}: {other.problem}")
        return RunOutcome(
            self.walk,
            self._table or table_of([self.walk]),
            len(self.done),
            failed,
            waiting,
            unsent,
            self._recorder.problem if unsent else None,
            (*self._recorder.notes, *elsewhere),
            len(self.done | self.problems.keys()),
            experiment_id=self._recorder.experiment_id or self._experiment_id,
        )

    def is_unfinished(self, outcome: Outcome) -> bool:
        """Return whether a stop left something undone."""
        return bool(outcome.left)

    def summary(self) -> str:
        """Return what is done, for the message of a stop."""
        return f"{counted_noun(len(self.done), 'job')} done"

    # Hooks -----------------------------------------------------------------------------------------------------

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Show and count it; a cell that finished is recorded."""
        self.view.on_event(event)
        identity, kind = event["id"], event["event"]
        if kind == "started":
            self._running.add(identity)
            return
        self._running.discard(identity)
        self.is_damaged |= kind == "damaged"
        if kind == "failed":
            self.problems[identity] = str(event["error"])
        elif kind == "finished" and not event.get("elsewhere"):
            self.done.add(identity)
            self.record(c for c in self._cells_of({identity}) if self.walk.status(c) == "finished")

    def on_tick(self) -> None:
        """Send MLflow the curves of the cells that are running, every 20 seconds."""
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self._uploaded = time.monotonic()
            self.record(self._cells_of(self._running))

    def say(self, text: str) -> None:
        """Show it."""
        self.view.say(text)

    def stop_asked(self) -> int:
        """Return whether a signal or the time limit asks for a stop."""
        return int(self.stop())

    def _cells_of(self, jobs: set[str]) -> list[Cell]:
        cells = distinct_cells(self.walk.cells)  # MLflow has one run for cells that are the same work
        return [cell for cell in cells if not jobs.isdisjoint(self.walk.jobs_of(cell))]

    def _say_stop(self, name: str) -> None:
        self.view.say(f"{name}: finishing the step and writing a checkpoint; Ctrl-C now: stop at once")


def _complete_record(walk: ExperimentPlan, cell: Cell) -> CellRecord:
    record = _with_figure(walk, cell, walk.record(cell), draw=True)
    assert record is not None
    return record


def _with_figure(walk: ExperimentPlan, cell: Cell, record: CellRecord, *, draw: bool) -> CellRecord | None:
    """Return a finished cell's record with its training figure; None if that has to be drawn first."""
    if record.status != "finished" or next(iter(record.history), None) is None:
        return record
    path = walk.folder(cell) / "training.png"
    is_drawn = stat_or_none(path) is not None
    if not is_drawn and not draw:
        return None
    if not is_drawn and not training_figure(record, path):
        return record
    return replace(record, artifacts={**record.artifacts, path.name: path})


def _relative_cost(job: Job) -> float:
    """Return a job's weight in the time left: samples trained, an evaluation counted as a few steps."""
    if isinstance(job, StageJob):
        return float((job.last_step - job.first_step) * job.recipe["global_batch_size"])
    return 1.0 if isinstance(job, RootJob) else 512.0


class GridSession(Session):
    """The session of a grid: the work is known from the start, and planned again where a stored state is damaged."""

    def __init__(
        self,
        walk: ExperimentPlan,
        console: Console,
        work_of: Callable[[ExperimentPlan], list[Job]],
        deadline: float = math.inf,
    ) -> None:
        super().__init__(walk, console, deadline)
        self._work_of = work_of

    def newer_work(self) -> Sequence[Job] | None:
        """Return the plan made anew after damage: what needs the state is planned with it."""
        if not self.is_damaged:
            return None
        self.is_damaged = False
        self.walk = replace(self.walk, tree=build_stage_tree(self.walk.cells, self.walk.ledger))
        work = self._work_of(self.walk)
        self.show(work)
        return work

    def is_closed(self) -> bool:
        """Return whether no new plan is due."""
        return not self.is_damaged
