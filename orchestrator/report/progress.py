"""How far a run is: which lane does what, what is done, and the time left with all lanes considered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.plan.documents.time_left import is_gpu, steps_done
from orchestrator.plan.jobs import EvaluationJob, Job, StageJob
from orchestrator.plan.step_history import last_metrics

_FORECAST_SHARE = 0.02
_FINAL = ("failed", "skipped")


@dataclass(frozen=True)
class LaneLine:
    """What one lane does now.

    Attributes:
        job: None where it waits for work.
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
        seconds_left: None while too little is done to tell.
        worker_hours: Time of all workers with a job in hand; None until their number is known.
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
        result_of: Stage run to its result once it is stored; tells the number and kind of workers.
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
        self._spent: dict[type, float] = {
            StageJob: 0.0,
            EvaluationJob: 0.0,
        }  # seconds; what else there is tells nothing about these
        self._worked: dict[type, float] = {StageJob: 0.0, EvaluationJob: 0.0}  # cost of what they were spent on
        self._first_seen: dict[str, tuple[float, float]] = {}  # when a running stage run had done how much
        self._busy_seconds = 0.0
        self._workers: int | None = None
        self._unit = "worker-hours"
        self._begin = clock()
        self._lock = threading.Lock()

    def set_work(self, work: Iterable[Job], costs: Mapping[str, float]) -> None:
        """Take the newest complete plan: what was to be done is replaced, what is done or under way stays."""
        with self._lock:
            stays = {i: job for i, job in self._jobs.items() if i in self._done | self._lost or i in self._running}
            self._jobs = {**stays, **{job.id: job for job in work}}
            self._costs = {**self._costs, **costs}

    def job(self, identity: str) -> Job | None:
        """Return a job of this run."""
        return self._jobs.get(identity)

    def elapsed_seconds(self) -> float:
        """Since the run began."""
        return self._clock() - self._begin

    def take(self, event: Mapping[str, Any]) -> None:
        """Take an event of the dispatch."""
        identity, kind, now = str(event.get("id", "")), event["event"], self._clock()
        job = self._jobs.get(identity)
        if job is None:
            return
        with self._lock:
            if kind == "started":
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
            self._worked[type(job)] += self._costs.get(job.id, 0.0)
        mark = (self._result_of(job.id) or {}).get("fingerprint") if isinstance(job, StageJob) else None
        if mark:
            self._workers = int(mark.get("world_size") or 1)
            self._unit = "GPU-hours" if is_gpu(str(mark.get("device", ""))) else "worker-hours"

    def snapshot(self) -> Snapshot:
        """Return the run now; reads the spools of what runs."""
        with self._lock:
            running, jobs, now = dict(self._running), dict(self._jobs), self._clock()
            done, lost, costs = set(self._done), set(self._lost), dict(self._costs)
            spent, worked, busy = dict(self._spent), dict(self._worked), self._busy_seconds
            lanes = list(self._lanes)
        shares: dict[str, float] = {}
        lines = {lane: LaneLine(lane, None) for lane in lanes}
        for identity, (lane, begun) in running.items():
            line = self.line(lane, jobs[identity])
            lines[lane], shares[identity] = line, line.share
            busy += now - begun
            if line.share > 0:
                since, before = self._first_seen.setdefault(identity, (now, line.share))
                spent[StageJob] += now - since
                worked[StageJob] += (line.share - before) * costs.get(identity, 0.0)
        total = sum(costs.get(i, 0.0) for i in jobs) or 1.0
        finished = sum(costs.get(i, 0.0) for i in jobs if i in done)
        share = (finished + sum(costs.get(i, 0.0) * part for i, part in shares.items())) / total
        rest = {i: costs.get(i, 0.0) * (1 - shares.get(i, 0.0)) for i in jobs if i not in done | lost}
        # The first steps of a run warm up caches; a forecast from them would frighten.
        known = sum(worked.values()) > _FORECAST_SHARE * total
        left = _seconds_left(jobs, rest, _rates(spent, worked), len(lines)) if known else None
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
    """At least all that is left divided by the lanes, and at least the longest way: a child waits for its parent."""
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
