"""One driver's session, of a run or of a search: dispatches jobs, shows them, and keeps MLflow's cells up to date."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from rich.console import Console

from orchestrator.dispatch.driver import Hooks, Outcome, run_local
from orchestrator.dispatch.ray.session import run_on_ray
from orchestrator.dispatch.signals import StopRequest
from orchestrator.errors import Interrupted, StorageError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.experiment_plan import ExperimentPlan, record_experiment
from orchestrator.plan.io_retry import stat_or_none
from orchestrator.plan.jobs import EvaluationJob, Job, RootJob, StageJob
from orchestrator.plan.ledger.process import Process
from orchestrator.report.cell_folders import write_cell_folder
from orchestrator.report.console import nothing_done, print_ending
from orchestrator.report.figures import training_figure
from orchestrator.report.live import LiveView
from orchestrator.report.table import Table, table_of
from orchestrator.report.units import counted_noun
from orchestrator.tracking.mlflow_state import abandoned, has_record, one_at_a_time, read_state
from orchestrator.tracking.mlflow_tracker import CellTracker, UploadQueue


def open_recorder(walk: ExperimentPlan, console: Console) -> UploadQueue:
    """Return the queue that records cells in MLflow; drivers make runs one at a time, so that no cell gets two."""

    def open_tracker() -> CellTracker:
        def alone() -> contextlib.AbstractContextManager[None]:
            return one_at_a_time(walk.ledger.store, walk.experiment_name)

        return CellTracker(walk.tracking_uri, walk.experiment_name, alone, _lives(walk), walk.ledger.url)

    return UploadQueue(open_tracker, lambda text: console.print(text, highlight=False, markup=False))


def _lives(walk: ExperimentPlan) -> Callable[[Process, str], bool]:
    """Return whether a driver lives: on this machine by its process, elsewhere by the leases it holds here."""

    def lives(driver: Process, storage: str) -> bool:
        gone = driver.is_gone()
        if gone is not None:
            return not gone
        holders = walk.ledger.living_holders().values() if storage == walk.ledger.url else None
        return holders is None or any((holder.host, holder.pid) == (driver.host, driver.pid) for holder in holders)

    return lives


def record_cells(walk: ExperimentPlan, recorder: UploadQueue) -> None:
    """Write the cells' folders and queue every record that MLflow does not have as it stands."""
    seen = read_state(walk.tracking_uri, walk.experiment_name)
    lacking = []
    for cell in walk.cells:
        record = walk.record(cell)
        # Where another driver works on it, that one records it.
        if record.status in ("new", "running"):
            continue
        write_cell_folder(walk, cell, record)
        drawn = _with_figure(walk, cell, record, draw=False)
        if drawn is None or seen is None or not has_record(seen.runs.get(cell.id), drawn):
            lacking.append(cell)
    for cell in lacking:
        put_record(walk, cell, recorder)
    if seen is not None and not lacking and abandoned(seen, _lives(walk)):
        recorder.end_abandoned()


def put_record(walk: ExperimentPlan, cell: Cell, recorder: UploadQueue) -> None:
    """Queue a cell, whose record is read when its turn comes."""

    def make() -> CellRecord:
        record = _with_figure(walk, cell, walk.record(cell), draw=True)
        assert record is not None
        return record

    recorder.put(cell.id, make)


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


_UPLOAD_SECONDS = 20.0


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


class Session(Hooks):
    """A driver's session: the hooks that a dispatcher calls, the live view, and the records for MLflow.

    Args:
        walk: The plan.
        console: Where progress is shown.
        max_hours: Hours after which it stops as at the first SIGTERM; None for no limit.
        began: Reading of `time.monotonic` from which they count.

    Attributes:
        walk: The newest plan.
        done: Jobs that this session did.
        problems: Job to the reason why it failed.
    """

    def __init__(self, walk: ExperimentPlan, console: Console, max_hours: float | None, began: float) -> None:
        self.walk = walk
        self.done: set[str] = set()
        self.problems: dict[str, str] = {}
        self.stop = StopRequest(self._say_stop, max_hours, began)
        self.view = LiveView([], {}, {}, walk.ledger.metrics_file, console, walk.ledger.result)
        self._console = console
        self._recorder: UploadQueue | None = None
        self._running: set[str] = set()
        self._uploaded = time.monotonic()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record cells in MLflow during the block, and all that MLflow lacks at its end."""
        with open_recorder(self.walk, self._console) as self._recorder:
            try:
                yield
            finally:
                record_cells(self.walk, self._recorder)

    def execute(self, work: Sequence[Job], *, local: bool = False, fail_fast: bool = False) -> None:
        """Do the work, and what comes newer.

        Raises:
            Interrupted: a signal stopped it.
        """
        with self.stop, self.view:
            outcome = self.dispatch(work, local=local, fail_fast=fail_fast)
        if self.stop.signal_name is not None and self.is_unfinished(outcome):
            text = f"stopped by {self.stop.signal_name}; {self.summary()}, run the same command to resume"
            raise Interrupted(text, self.stop.exit_code)

    def dispatch(self, work: Sequence[Job], *, local: bool, fail_fast: bool) -> Outcome:
        """Do the work in this process or in lanes."""
        run = run_local if local else run_on_ray
        return run(work, self.walk.ledger, self.walk.loaded.spec.cluster, self, fail_fast=fail_fast)

    def show(self, work: Sequence[Job]) -> None:
        """Show a new plan's work, and record the experiment as it is planned now: `gc` keeps what it starts from."""
        record_experiment(self.walk)
        self.view.set_work(work, {job.id: _relative_cost(job) for job in work}, self.walk.names_of(work))

    def outcome(self, failed: dict[str, str], waiting: dict[str, str]) -> RunOutcome:
        """Return how it ended.

        Args:
            failed: Cell or trial to the reason.
            waiting: Cell or trial that neither finished nor failed, to the reason.
        """
        assert self._recorder is not None
        names = {cell.id: cell.name for cell in self.walk.cells}
        unsent = tuple(names[identity] for identity in list(self._recorder.unsent))
        return RunOutcome(
            self.walk,
            table_of([self.walk]),
            len(self.done),
            failed,
            waiting,
            unsent,
            self._recorder.problem if unsent else None,
            tuple(self._recorder.notes),
            len(self.done | self.problems.keys()),
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

    def stop_asked(self) -> int:
        """Return whether a signal or the time limit asks for a stop."""
        return int(self.stop())

    def _cells_of(self, jobs: set[str]) -> list[Cell]:
        return [cell for cell in self.walk.cells if not jobs.isdisjoint(self.walk.jobs_of(cell))]

    def record(self, cells: Iterable[Cell]) -> None:
        """Queue cells for MLflow; what cannot be read now is tried again at the end."""
        assert self._recorder is not None
        with contextlib.suppress(OSError, StorageError):
            for cell in cells:
                put_record(self.walk, cell, self._recorder)

    def _say_stop(self, name: str) -> None:
        self.view.say(f"{name}: finishing the step and writing a checkpoint; Ctrl-C now: stop at once")


def _relative_cost(job: Job) -> float:
    """Return a job's weight in the time left: samples trained, an evaluation counted as a few steps."""
    if isinstance(job, StageJob):
        return float((job.last_step - job.first_step) * job.recipe["global_batch_size"])
    return 1.0 if isinstance(job, RootJob) else 512.0
