"""What MLflow costs on a long run and on a wide grid: first send, a repeat with nothing new, a tail, live curves.

    python tests/bench_tracking.py [--steps 100000] [--cells 200]
    python tests/bench_tracking.py --dashboard

Figures are CPU seconds of this process and wall seconds, on an sqlite file of its own; the import of MLflow is not in
them. `plain` sends the same points by MLflow's client alone, in batches of the largest size it takes. `--dashboard`
alone: 504 finished cells as `run` records them (figures, data sets, models and the summary included), `run` once more,
and the page that its last line opens, in Chromium on a real server, until cells and scores are on it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
from bench_report import write_finished
from browser import browser
from cell_tracker import Tracker
from mlflow_servers import free_port, mlflow_server
from rich.console import Console
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.step_history import StepHistory, Stretch
from orchestrator.run import run_experiment
from orchestrator.tracking.mlflow_state import has_record, read_state
from orchestrator.tracking.mlflow_views import dashboard_address
from orchestrator.tracking.upload_queue import UploadQueue

KEYS = ("loss", "learning_rate", "visual_tokens", "step_seconds")


def write_steps(path: Path, first: int, last: int) -> None:
    """Appends lines as a stage run's spool has them."""
    with path.open("a") as file:
        for step in range(first, last):
            line = {"step": step, "timestamp_ms": 1_700_000_000_000 + 250 * step}
            file.write(json.dumps(line | dict.fromkeys(KEYS, 1.0 / (step + 1))) + "\n")


def record(path: Path, name: str, status: str = "running", last: int = 10**9) -> CellRecord:
    """A cell whose one stage run writes that file."""
    return CellRecord(name, name, status, history=StepHistory([Stretch(path, 0, last, 0)]), params={"seed": "0"})


@contextmanager
def timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Prints and keeps CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - wall
    print(f"{what:<58} {time.process_time() - cpu:8.3f} CPU s {seconds[what]:8.3f} s", flush=True)


def long_run(folder: Path, steps: int, seconds: dict[str, float]) -> None:
    """One cell with a long history."""
    uri, spool = f"sqlite:///{folder / 'mlflow.db'}", folder / "metrics.jsonl"
    write_steps(spool, 0, steps)
    Tracker(uri, "warm").log(CellRecord("warm", "warm", "finished"))  # the import, the tables

    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("plain")).info.run_id
    with timed(f"plain: {steps} steps, {len(KEYS) * steps} points", seconds):
        points = [Metric(n, v, t, s) for n, v, s, t in record(spool, "plain").history]
        for start in range(0, len(points), 1000):
            client.log_batch(run_id, metrics=points[start : start + 1000])
    finished = record(spool, "long", "finished")
    with timed("first send", seconds):
        Tracker(uri, "bench").log(finished)
    with timed("repeat with nothing new, by the tracker", seconds):
        Tracker(uri, "bench").log(finished)
    with timed("repeat with nothing new, as `run` asks (no MLflow)", seconds):
        seen = read_state(uri, "bench")
        assert seen is not None and has_record(seen.runs["long"], finished)
    write_steps(spool, steps, steps + 100)
    with timed("100 new steps", seconds):
        Tracker(uri, "bench").log(finished)
    with timed("the same in a session under way", seconds):
        tracker = Tracker(uri, "bench")
        tracker.log(finished)
    write_steps(spool, steps + 100, steps + 200)
    with timed("100 new steps in a session under way", seconds):
        tracker.log_some(record(spool, "long"), 20_000)


def wide_grid(folder: Path, cells: int, seconds: dict[str, float]) -> None:
    """Many running cells, each with a curve that grows."""
    uri = f"sqlite:///{folder / 'grid.db'}"
    Tracker(uri, "warm").log(CellRecord("warm", "warm", "finished"))
    spools = [folder / f"cell_{number}.jsonl" for number in range(cells)]
    for number, spool in enumerate(spools):
        write_steps(spool, 0, 200 + number)
    longest = 0.0
    with (
        timed(f"{cells} running cells, first round of live curves", seconds),
        UploadQueue(lambda: Tracker(uri, "grid")) as recorder,
    ):
        for number, spool in enumerate(spools):
            begun = time.perf_counter()
            recorder.put(f"cell-{number}", lambda number=number, spool=spool: record(spool, f"cell-{number}"))
            longest = max(longest, time.perf_counter() - begun)
    for number, spool in enumerate(spools):
        write_steps(spool, 200 + number, 220 + number)
    with (
        timed(f"{cells} running cells, 20 new steps each", seconds),
        UploadQueue(lambda: Tracker(uri, "grid")) as recorder,
    ):
        for number, spool in enumerate(spools):
            recorder.put(f"cell-{number}", lambda number=number, spool=spool: record(spool, f"cell-{number}"))
    seen = read_state(uri, "grid")
    assert seen is not None
    shown = [seen.runs[f"cell-{number}"].metrics["train/loss"][1] == 219 + number for number in range(cells)]
    print(f"live curves that are complete: {sum(shown)} of {cells}; the driver's longest wait: {1000 * longest:.2f} ms")


def dashboard(folder: Path, seconds: dict[str, float]) -> None:
    """A grid of 504 finished cells, from the ledger to the page."""
    os.environ["LLAVOLTA_STORAGE"] = str(folder / "runs")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    plan = prepare(write_finished(folder))
    Tracker(plan.tracking_uri, "warm").log(CellRecord("warm", "warm", "finished"))
    quiet = Console(file=io.StringIO())
    with timed(f"{len(plan.cells)} finished cells and their summary", seconds):
        outcome = run_experiment(plan.loaded, local=True, console=quiet)
    assert not outcome.unsent, outcome.tracking_problem
    with timed("`run` once more, with nothing to do", seconds):
        run_experiment(plan.loaded, local=True, console=quiet)
    with (
        mlflow_server(folder, free_port(), plan.tracking_uri) as server,
        browser(2200, 1000) as page,
        timed("from opening the printed address to cells and scores", seconds),
    ):
        page.get(dashboard_address(server, str(outcome.experiment_id)))
        WebDriverWait(page, 600, 0.1).until(lambda page: "(average)" in page.find_element(By.TAG_NAME, "body").text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--dashboard", action="store_true")
    asked = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="llavolta-bench-") as folder:
        if asked.dashboard:
            dashboard(Path(folder), seconds)
            return
        long_run(Path(folder), asked.steps, seconds)
        wide_grid(Path(folder), asked.cells, seconds)
    plain = next(value for name, value in seconds.items() if name.startswith("plain"))
    print(f"first send over plain: {seconds['first send'] / plain:.2f}")


if __name__ == "__main__":
    main()
