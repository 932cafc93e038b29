"""The live view of a run: what trains, its loss, samples per second and time left; plain lines without a terminal."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from orchestrator.plan.jobs import EvaluationJob, Job, RootJob, StageJob

_PLAIN_INTERVAL_SECONDS = 15.0
_REFRESH_SECONDS = 0.5
_FORECAST_SHARE = 0.02


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics file, or None."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    try:
        return dict(json.loads(lines[-1])) if lines else None
    except ValueError:
        return None


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LiveView:
    """Shows a run while it goes on; `on_event` may be called from any thread.

    Args:
        work: The jobs of this run, in order.
        costs: Job id to a relative cost; what time left is measured by.
        cells_of: Job id to the names of the cells that need it.
        metrics_file: Job id to the file its step metrics are written to.
        console: Where to show it.
    """

    def __init__(
        self,
        work: list[Job],
        costs: Mapping[str, float],
        cells_of: Mapping[str, tuple[str, ...]],
        metrics_file: Callable[[str], Path],
        console: Console,
    ) -> None:
        self._jobs = {job.id: job for job in work}
        self._costs = costs
        self._cells_of = cells_of
        self._metrics_file = metrics_file
        self._console = console
        self._running: dict[str, float] = {}
        self._done: set[str] = set()
        self._spent_seconds = 0.0
        self._spent_cost = 0.0
        self._begin = time.monotonic()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._note = "starting Ray"

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

    def say(self, text: str) -> None:
        """One line that stays on the screen."""
        self._console.print(text, highlight=False, markup=False)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Takes an event of the dispatch (`started`, `finished`, `failed`, `retried`, `interrupted`)."""
        job = self._jobs.get(event.get("id", ""))
        if job is None:
            return
        kind, now = event["event"], time.monotonic()
        with self._lock:
            self._note = ""
            if kind == "started":
                self._running[job.id] = now
            elif job.id in self._running:
                begun = self._running.pop(job.id)
                if kind == "finished":
                    self._done.add(job.id)
                    self._spent_seconds += now - begun
                    self._spent_cost += self._costs.get(job.id, 0.0)
        if kind == "finished" and not isinstance(job, RootJob):
            self.say(f"{clock(now - self._begin):>7}  done     {self._describe(job)}{self._closing(job)}")
        elif kind in ("failed", "retried", "interrupted"):
            reason = str(event.get("error") or "").strip().splitlines()
            self.say(
                f"{clock(now - self._begin):>7}  {kind:8} {self._describe(job)}{': ' + reason[0] if reason else ''}"
            )

    def _describe(self, job: Job) -> str:
        cells = self._cells_of.get(job.id, ())
        whose = cells[0] if len(cells) == 1 else f"{len(cells)} cells"
        if isinstance(job, StageJob):
            names = list(dict.fromkeys(a.variant for a in job.table if a.last_step > job.first_step))
            under = "+".join(names) if len(names) <= 3 else f"{len(names)} variants"
            return f"train {whose}: {job.phase} steps {job.first_step}-{job.last_step} under {under}"
        if isinstance(job, EvaluationJob):
            return f"evaluate {whose}: {job.name} under {job.under}"
        return "write the initial weights"

    def _closing(self, job: Job) -> str:
        metrics = last_metrics(self._metrics_file(job.id)) if isinstance(job, StageJob) else None
        return f" (loss {metrics['loss']:.3f}, {metrics['samples_per_second']:.0f} samples/s)" if metrics else ""

    def _progress(self, job: Job) -> tuple[float, str]:
        """Share done of a running job and its latest figures."""
        if not isinstance(job, StageJob):
            return 0.0, ""
        metrics = last_metrics(self._metrics_file(job.id))
        if metrics is None:
            return 0.0, "loading"
        step = int(metrics["step"]) + 1
        share = (step - job.first_step) / (job.last_step - job.first_step)
        figures = (
            f"step {step}/{job.last_step}  loss {metrics['loss']:.3f}  {metrics['samples_per_second']:.0f} samples/s"
        )
        return min(max(share, 0.0), 1.0), f"{figures}  stage {metrics.get('variant', '')}"

    def _lines(self) -> tuple[list[tuple[Job, float, str]], float, float | None]:
        """Running jobs, share of all cost done, seconds left (None while unknown)."""
        with self._lock:
            running = dict(self._running)
            spent, seconds = self._spent_cost, self._spent_seconds
        lines, now = [], time.monotonic()
        for identity, begun in running.items():
            job = self._jobs[identity]
            share, text = self._progress(job)
            lines.append((job, share, text))
            spent += share * self._costs.get(identity, 0.0)
            seconds += now - begun if share > 0 else 0.0
        total = sum(self._costs.get(identity, 0.0) for identity in self._jobs) or 1.0
        # The first steps of a run warm up caches; a forecast from them would frighten.
        left = seconds / spent * (total - spent) if spent / total > _FORECAST_SHARE else None
        return lines, spent / total, left

    def _loop(self) -> None:
        if self._console.is_terminal:
            with Live(self._render(), console=self._console, refresh_per_second=4, transient=True) as live:
                while not self._stop.wait(_REFRESH_SECONDS):
                    live.update(self._render())
            return
        while not self._stop.wait(_PLAIN_INTERVAL_SECONDS):
            lines, share, left = self._lines()
            for job, _, text in lines:
                remaining = f"  {clock(left)} left" if left is not None else ""
                elapsed = clock(time.monotonic() - self._begin)
                self.say(f"{elapsed:>7}  {100 * share:3.0f} %    {self._describe(job)}  {text}{remaining}")

    def _render(self) -> Group:
        lines, share, left = self._lines()
        grid = RichTable.grid(padding=(0, 2))
        for job, done, text in lines:
            grid.add_row(self._describe(job), ProgressBar(total=1.0, completed=done, width=24), text)
        elapsed = clock(time.monotonic() - self._begin)
        remaining = f"about {clock(left)} left" if left is not None else self._note
        jobs = f"{len(self._done)}/{len(self._jobs)} jobs"
        return Group(Text(f"{jobs}  {100 * share:.0f} %  {elapsed} elapsed  {remaining}", style="bold"), grid)
