"""The live view of a run: a line for each lane, what is done and the time left; plain lines without a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from orchestrator.plan.documents import is_gpu, steps_done
from orchestrator.plan.jobs import EvaluationJob, Job, RehearsalJob, RootJob, StageJob, StartJob
from orchestrator.plan.step_history import last_metrics
from orchestrator.report.units import clock, reason_lines, whose

_FORECAST_SHARE = 0.02
_FINAL = ("failed", "skipped")


@dataclass(frozen=True)
class LaneLine:
    """What one lane does now.

    Attributes:
        job: None where it is idle.
        share: Share of the job that is done, 0 to 1.
        metrics: The latest step's line, of a stage run.
    """

    lane: str
    job: Job | None
    share: float = 0.0
    metrics: dict[str, Any] | None = None


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        share: Share of all work that is done, by cost.
        seconds_left: None while too little is done to estimate it.
        worker_hours: Time of all workers with a job; None until their number is known.
        unit: `GPU-hours` or `worker-hours`.
    """

    lanes: tuple[LaneLine, ...]
    done: int
    failed: int
    total: int
    share: float
    elapsed_seconds: float
    seconds_left: float | None
    worker_hours: float | None
    unit: str


class Progress:
    """Follows a run by the events of its dispatch and the spools of its stage runs; safe between threads.

    Args:
        metrics_file: Job id to the file its step metrics are written to.
        result_of: Stage run to its result once it is stored, which names the number and kind of workers.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        metrics_file: Callable[[str], Path],
        result_of: Callable[[str], Mapping[str, Any] | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics_file, self._result_of, self._clock = metrics_file, result_of, clock
        self._jobs: dict[str, Job] = {}
        self._costs: dict[str, float] = {}
        self._running: dict[str, tuple[str, float]] = {}
        self._lanes: dict[str, None] = {}
        self._done: set[str] = set()
        self._lost: set[str] = set()
        # Seconds that finished jobs took; what else there is says nothing about these two kinds.
        self._spent: dict[type, float] = {StageJob: 0.0, EvaluationJob: 0.0}
        self._worked: dict[type, float] = {StageJob: 0.0, EvaluationJob: 0.0}  # cost of what they were spent on
        self._at_start: dict[str, float] = {}  # share of a job that an earlier attempt had done
        self._first_seen: dict[str, tuple[float, float]] = {}  # when a running stage run had done how much
        self._to_come = 0.0
        self._busy_seconds = 0.0
        self._workers: int | None = None
        self._unit = "worker-hours"
        self._begin = clock()
        self._lock = threading.Lock()

    def set_work(self, work: Iterable[Job], costs: Mapping[str, float], to_come: float = 0.0) -> None:
        """Take the newest complete plan: what was to be done is replaced, what is done or under way stays.

        Args:
            work: Its jobs.
            costs: Job id to a relative cost.
            to_come: Work that is not planned yet, such as trials of a search, for each unit of cost there is.
        """
        with self._lock:
            self._to_come = to_come
            stays = {i: job for i, job in self._jobs.items() if i in self._done | self._lost or i in self._running}
            self._jobs = {**stays, **{job.id: job for job in work}}
            self._costs = {**self._costs, **costs}

    def job(self, identity: str) -> Job | None:
        """Return a job of this run."""
        return self._jobs.get(identity)

    def elapsed_seconds(self) -> float:
        """Return the seconds since the run began."""
        return self._clock() - self._begin

    def take(self, event: Mapping[str, Any]) -> None:
        """Take an event of the dispatch."""
        identity, kind, now = str(event.get("id", "")), event["event"], self._clock()
        job = self._jobs.get(identity)
        if job is None:
            return
        before = self.line("", job).share if kind == "started" else 0.0
        with self._lock:
            if kind == "started":
                self._at_start[identity] = before
                lane = str(event.get("lane") or "")
                self._lanes[lane] = None
                self._running[identity] = (lane, now)
                self._first_seen.pop(identity, None)
                self._lost.discard(identity)
                return
            begun = self._running.pop(identity, None)
            if begun is not None:
                self._busy_seconds += now - begun[1]
            if kind == "damaged":
                self._done.discard(str(event.get("state", "")))
            elif kind in _FINAL:
                self._lost.add(identity)
            elif kind == "finished":
                self._done.add(identity)
                if begun is not None and not event.get("elsewhere"):
                    self._count(job, now - begun[1])

    def _count(self, job: Job, seconds: float) -> None:
        if type(job) in self._spent:
            self._spent[type(job)] += seconds
            self._worked[type(job)] += self._costs.get(job.id, 0.0) * (1 - self._at_start.get(job.id, 0.0))
        mark = (self.result(job) or {}).get("fingerprint")
        if mark:
            self._workers = int(mark.get("world_size") or 1)
            self._unit = "GPU-hours" if is_gpu(str(mark.get("device", ""))) else "worker-hours"

    def result(self, job: Job) -> Mapping[str, Any] | None:
        """Return what is stored of a finished stage run; None of any other job."""
        return self._result_of(job.id) if isinstance(job, StageJob) else None

    def snapshot(self) -> Snapshot:
        """Return the run now; reads the spools of what runs."""
        with self._lock:
            running, jobs, now = dict(self._running), dict(self._jobs), self._clock()
            done, lost, costs = set(self._done), set(self._lost), dict(self._costs)
            spent, worked, busy = dict(self._spent), dict(self._worked), self._busy_seconds
            lanes, at_start, to_come = list(self._lanes), dict(self._at_start), self._to_come
        shares: dict[str, float] = {}
        lines = {lane: LaneLine(lane, None) for lane in lanes}
        for identity, (lane, begun) in running.items():
            line = self.line(lane, jobs[identity])
            lines[lane], shares[identity] = line, line.share
            busy += now - begun
            # An attempt that resumes shows what the one before had done while it still loads.
            if line.share != at_start.get(identity, 0.0):
                since, before = self._first_seen.setdefault(identity, (now, line.share))
                spent[StageJob] += now - since
                worked[StageJob] += (line.share - before) * costs.get(identity, 0.0)
        total = sum(costs.get(i, 0.0) for i in jobs) * (1 + to_come) or 1.0
        finished = sum(costs.get(i, 0.0) for i in jobs if i in done)
        share = (finished + sum(costs.get(i, 0.0) * part for i, part in shares.items())) / total
        rest = {i: costs.get(i, 0.0) * (1 - shares.get(i, 0.0)) for i in jobs if i not in done | lost}
        # The first steps of a run warm up caches; a forecast from them would be far too long.
        known = sum(worked.values()) > _FORECAST_SHARE * total
        rates = _rates(spent, worked)
        later = to_come * sum(costs.get(i, 0.0) * rates.get(type(job), 0.0) for i, job in jobs.items())
        left = _seconds_left(jobs, rest, rates, len(lines)) + later / max(1, len(lines)) if known else None
        hours = busy * self._workers / 3600 if self._workers else None
        return Snapshot(
            tuple(lines[lane] for lane in sorted(lines)), len(done & jobs.keys()), len(lost & jobs.keys()), len(jobs),
            share, now - self._begin, left, hours, self._unit,
        )  # fmt: skip

    def line(self, lane: str, job: Job) -> LaneLine:
        """Return what a lane does, with the latest figures of a stage run."""
        if not isinstance(job, StageJob):
            return LaneLine(lane, job)
        metrics = last_metrics(self._metrics_file(job.id))
        return LaneLine(lane, job, steps_done(job, metrics) / (job.last_step - job.first_step), metrics)


def _rates(spent: Mapping[type, float], worked: Mapping[type, float]) -> dict[type, float]:
    """Return the seconds for each unit of cost, of stage runs and evaluations; of both together where a kind has none
    yet.
    """
    overall = sum(spent.values()) / (sum(worked.values()) or 1.0)
    return {kind: spent[kind] / worked[kind] if worked[kind] else overall for kind in spent}


def _seconds_left(jobs: Mapping[str, Job], rest: Mapping[str, float], rates: Mapping[type, float], lanes: int) -> float:
    """Return the larger of all that is left divided by the lanes, and the longest way: a child waits for its parent."""
    total = longest = 0.0
    ends: dict[str, float] = {}
    for identity, job in jobs.items():  # parents stand before their children
        if identity not in rest:
            continue
        seconds = rest[identity] * rates.get(type(job), 0.0)
        parent = job.parent if isinstance(job, StageJob) else job.state if isinstance(job, EvaluationJob) else ""
        ends[identity] = ends.get(parent, 0.0) + seconds
        total, longest = total + seconds, max(longest, ends[identity])
    return max(longest, total / max(1, lanes))


_PLAIN_INTERVAL_SECONDS = 15.0
_REFRESH_SECONDS = 1.0
_WIDE = 120
_LANES_SHOWN = 32


class LiveView:
    """Shows a run while it lasts; `on_event` and `set_work` may be called from any thread.

    Args:
        work: The jobs of this run, in order.
        costs: Job id to a relative cost; what time left is measured by.
        cells_of: Job id to the names of the cells that need it.
        metrics_file: Job id to the file its step metrics are written to.
        console: Where to show it.
        result_of: Stage run to its stored result, for the hours of its workers.
    """

    def __init__(
        self,
        work: Sequence[Job],
        costs: Mapping[str, float],
        cells_of: Mapping[str, tuple[str, ...]],
        metrics_file: Callable[[str], Path],
        console: Console,
        result_of: Callable[[str], Mapping[str, Any] | None] = lambda _: None,
    ) -> None:
        self._progress = Progress(metrics_file, result_of)
        self._cells_of: dict[str, tuple[str, ...]] = {}
        self._console = console
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._note = "starting"
        self.set_work(work, costs, cells_of)

    def __enter__(self) -> LiveView:
        self._thread = threading.Thread(target=self._loop, name="live-view", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def set_work(
        self,
        work: Sequence[Job],
        costs: Mapping[str, float],
        cells_of: Mapping[str, tuple[str, ...]],
        to_come: float = 0.0,
    ) -> None:
        """Take a new complete plan, as when a search adds cells or a damaged state is trained again.

        `to_come` is work that is not planned yet, for each unit of cost that is.
        """
        self._cells_of = {**self._cells_of, **cells_of}
        self._progress.set_work(work, costs, to_come)

    def say(self, text: str) -> None:
        """Print a line that stays on the screen."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take an event of the dispatch.

        `event` is one of `started`, `finished` (`elsewhere` where another driver did it), `failed`, `retried`,
        `interrupted`, `skipped`, `damaged` (`state`: what was damaged); `id` is the job's, `lane` where it is known.
        """
        self._progress.take(event)
        job = self._progress.job(str(event.get("id", "")))
        if job is None:
            return
        self._note = ""
        kind, error = event["event"], str(event.get("error") or "").strip()
        if kind == "finished" and not isinstance(job, RootJob):
            where = " by another run" if event.get("elsewhere") else self._closing(job)
            self._say_event("done", self._describe(job) + where)
        elif kind == "damaged":
            self._say_event(kind, f"{self._describe(job)}: a state it needs is damaged and is made again")
        elif kind not in ("started", "finished"):
            first, *more = reason_lines(error) if error else [""]
            self._say_event(kind, self._describe(job) + (f": {first}" if first else ""))
            for line in more:
                self.say(f"{'':18}{line}")

    def _say_event(self, kind: str, text: str) -> None:
        self.say(f"{clock(self._progress.elapsed_seconds()):>7}  {kind:8} {text}")

    def _describe(self, job: Job) -> str:
        cells = whose(self._cells_of.get(job.id, ()))
        if isinstance(job, StageJob):
            return f"train {cells}: {job.phase} steps {job.first_step}-{job.last_step} under {_variants(job)}"
        if isinstance(job, EvaluationJob):
            return f"evaluate {cells}: {job.label} under {job.under}"
        return _other(job)

    def _closing(self, job: Job) -> str:
        """Return a stage run's last loss, and its speed over all its steps as its stored result has it."""
        result = self._progress.result(job) or {}
        figures = [f"loss {result['loss']:.3f}"] if result.get("loss") is not None else []
        figures += [f"{speed:.0f} samples/s"] if (speed := result.get("samples_per_second")) else []
        return f" ({', '.join(figures)})" if figures else ""

    def _loop(self) -> None:
        if self._console.is_terminal:
            with Live(self.render(), console=self._console, auto_refresh=False, transient=True) as live:
                while not self._stop.wait(_REFRESH_SECONDS):
                    live.update(self.render(), refresh=True)
            return
        while not self._stop.wait(_PLAIN_INTERVAL_SECONDS):
            self.say_progress()

    def say_progress(self) -> None:
        """Print a line for each busy lane, where there is no terminal."""
        now = self._progress.snapshot()
        left = f"  about {clock(now.seconds_left)} left" if now.seconds_left is not None else ""
        for line in now.lanes:
            if line.job is not None:
                parts = [line.lane, self._describe(line.job), _figures(line)]
                text = "  ".join(part for part in parts if part)
                self.say(f"{clock(now.elapsed_seconds):>7}  {now.share:4.0%}     {text}{left}")

    def render(self) -> Group:
        """Return what a terminal shows now: the sums, then a line for each lane."""
        now = self._progress.snapshot()
        wide = self._console.width >= _WIDE
        rows = []
        for line in now.lanes[:_LANES_SHOWN]:
            what = _what(line.job) if line.job is not None else "idle"
            cells = whose(self._cells_of.get(line.job.id, ())) if line.job is not None else ""
            rows.append((line, what, _figures(line, short=not wide), cells))
        grid = RichTable.grid(padding=(0, 1, 0, 0))
        for width in _widths(rows, self._console.width, 24 if wide else 8):
            grid.add_column(no_wrap=True, overflow="ellipsis", width=width)
        for line, what, figures, cells in rows:
            bar = ProgressBar(total=1.0, completed=line.share) if line.job is not None else ""
            grid.add_row(Text(line.lane), Text(what), bar, Text(figures), Text(cells, style="dim"))
        more = len(now.lanes) - _LANES_SHOWN
        rest = [Text(f"… {more} more lanes", style="dim")] if more > 0 else []
        return Group(Text(self._header(now), style="bold", no_wrap=True, overflow="ellipsis"), grid, *rest)

    def _header(self, now: Snapshot) -> str:
        parts = [f"{now.done}/{now.total} jobs", f"{now.share:.0%}", f"{clock(now.elapsed_seconds)} elapsed"]
        if now.done + now.failed == now.total and now.total:
            parts.append("idle")
        else:
            parts.append(f"about {clock(now.seconds_left)} left" if now.seconds_left is not None else self._note)
        if now.failed:
            parts.append(f"{now.failed} failed")
        if now.worker_hours is not None:
            parts.append(f"{now.worker_hours:.2f} {now.unit}")
        return "  ".join(part for part in parts if part)


def _widths(rows: Sequence[tuple[LaneLine, str, str, str]], width: int, bar: int) -> tuple[int, ...]:
    """Return the widths of lane, what, bar, figures and cells: the figures are shown in full, names are cut."""
    texts = [(line.lane, what, figures, cells) for line, what, figures, cells in rows]
    lane, what, figures, cells = (max((len(row[i]) for row in texts), default=0) for i in range(4))
    lane = min(lane, width // 6)
    left = max(width - lane - bar - figures - 5, 12)
    what = min(what, left - min(cells, left // 4))
    return max(lane, 1), max(what, 1), bar, max(figures, 1), max(min(cells, left - what), 1)


def _variants(job: StageJob) -> str:
    names = list(dict.fromkeys(action.variant for action in job.table if action.last_step > job.first_step))
    return "+".join(names) if len(names) <= 3 else f"{len(names)} variants"


def _other(job: Job) -> str:
    if isinstance(job, RehearsalJob):
        return f"rehearse {job.stage.phase} under {_variants(job.stage)}"
    return "assemble the initial weights" if isinstance(job, StartJob) else "write the initial weights"


def _what(job: Job) -> str:
    if isinstance(job, StageJob):
        return f"{job.phase} {job.first_step}-{job.last_step} {_variants(job)}"
    return f"evaluate {job.label} under {job.under}" if isinstance(job, EvaluationJob) else _other(job)


def _figures(line: LaneLine, short: bool = False) -> str:
    job, metrics = line.job, line.metrics
    if not isinstance(job, StageJob):
        return ""
    if metrics is None:
        return "loading"
    step, loss, speed = int(metrics["step"]) + 1, metrics["loss"], metrics["samples_per_second"]
    if short:
        return f"{step}/{job.last_step} loss {loss:.3f} {speed:.0f}/s"
    figures = f"step {step}/{job.last_step}  loss {loss:.3f}  {speed:.0f} samples/s"
    # One variant all along is named by what the lane does.
    variant = str(metrics.get("variant", ""))
    return figures if variant in ("", _variants(job)) else f"{figures}  stage {variant}"
