"""Measures how well many lanes are used: 1,000 cells on 64 simulated lanes, each stage run as long as the planner says.

    python tests/bench_lanes.py --lanes 64

Only training is simulated, by a clock of its own: the plan, the conductor, its queue, the leases and the ledger are the
real ones. A full cell counts as an hour, opening a state that is not in a lane's memory as `--open` seconds, an
evaluation as `--test`. Told are the hours the grid takes, beside the least it can take on so many lanes (the longer of
its longest path and its work divided by the lanes), the share of the lanes' time that is spent on jobs, how often a
state was opened, and the conductor's own processor time for a job and the most memory of this process.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_plan import VARIANTS, four_stages, grid

from orchestrator.dispatch.conductor import STOP, WAIT, Conductor, Rules
from orchestrator.plan import cost
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.cost import Sample
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.jobs import job_to_json, needs_of

FULL_CELL_SECONDS = 3600.0


@dataclass
class Lane:
    """One lane: what it does, and what it holds in memory."""

    name: str
    k: int = 0
    last: str | None = None
    said: str | None = None
    holds: str | None = None

    def who(self) -> dict[str, Any]:
        """As the conductor wants to be told."""
        place = {"node": "here", "pid": 1, "started": 0.0, "rank": 0, "world_size": 1}
        return {"lane": self.name, "attempt": self.name, **place}


def grids(cells: int) -> dict[str, dict[str, Any]]:
    """About as many cells of many schedules with few seeds, of few schedules with many, and of one seed alone."""
    every = ["_".join(names) for names in itertools.product(VARIANTS, repeat=4)]

    def of(names: list[str], seeds: int) -> dict[str, Any]:
        schedules = {name: four_stages(tuple(name.split("_"))) for name in names}
        return grid(schedules, {"phases.finetune.schedule": names}, seeds)

    return {
        "125 schedules x 8 seeds": of(every[:: len(every) // 125][:125], cells // 125),
        "5 schedules x 200 seeds": of(every[:: len(every) // 5][:5], cells // 5),
        "625 schedules x 1 seed": of(every, 1),
    }


def seconds_of(job: Mapping[str, Any], cell: Cell, per_tflop: float, test_seconds: float) -> float:
    """How long a job takes beside opening its state."""
    if job["type"] == "evaluation":
        return test_seconds
    if job["type"] != "stage":
        return 0.0
    assert cell.facts is not None
    whole = 0.0
    for action in job["table"]:
        steps = max(0, min(action["last_step"], job["last_step"]) - max(action["first_step"], job["first_step"]))
        whole += steps * cost.train_tflops_per_sample(cell.facts, action["points"], Sample(64, 64), job["recipe"])
    return whole * per_tflop


def simulate(experiment: Mapping[str, Any], lanes: int, open_seconds: float, test_seconds: float) -> str:
    """Runs the grid and tells what it took."""
    with tempfile.TemporaryDirectory() as folder:
        walk = prepare({**experiment, "cluster": {"storage_path": str(Path(folder) / "runs")}})
        jobs = [job_to_json(job) for job in walk.tree.work(walk.ledger)]
        cell = walk.cells[0]
        full = cost.train_tflops_per_sample(cell.facts, (), Sample(64, 64), cell.spec.phases.finetune.model_dump())
        per_tflop = FULL_CELL_SECONDS / (full * cell.phases[0].last_step)
        seconds = {job["id"]: seconds_of(job, cell, per_tflop, test_seconds) for job in jobs}
        ends: dict[str, float] = {}
        for job in jobs:
            ends[job["id"]] = seconds[job["id"]] + max((ends.get(need, 0.0) for need in needs_of(job)), default=0.0)
        least = max(max(ends.values()), sum(seconds.values()) / lanes)
        clock = [0.0]
        conductor = Conductor(walk.ledger.url, "bench", Rules(), clock=lambda: clock[0])
        try:
            return _told(conductor, jobs, seconds, clock, lanes, open_seconds, least, len(walk.cells))
        finally:
            conductor.leave()


def _told(
    conductor: Conductor, jobs: list[dict[str, Any]], seconds: Mapping[str, float], clock: list[float], lanes: int,
    open_seconds: float, least: float, cells: int,
) -> str:  # fmt: skip
    begun, opened, busy = time.process_time(), 0, 0.0
    conductor.set_work(jobs, True)
    made = [Lane(f"lane-{number}") for number in range(lanes)]
    for lane in made:
        conductor.begin(lane.who())
    free, ends, number = list(made), [], itertools.count()
    while free or ends:
        waiting = []
        for lane in free:
            item = conductor.next_item(lane.who(), lane.k, lane.last, lane.said)
            if item == WAIT:
                waiting.append(lane)
                lane.said = None
            elif item != STOP:
                assert not isinstance(item, str)
                job = item["job"]
                takes, state = seconds[job["id"]], job.get("parent") or job.get("state")
                if state is not None and state != lane.holds:
                    takes, opened = takes + open_seconds, opened + 1
                busy += takes
                lane.holds = state if job["type"] == "evaluation" else job["id"]
                lane.k, lane.last, lane.said = lane.k + 1, job["id"], "finished"
                heapq.heappush(ends, (clock[0] + takes, next(number), lane))
        if not ends:
            break
        clock[0], _, lane = heapq.heappop(ends)
        free = [lane, *waiting]
    spent = time.process_time() - begun
    finished = sum(event["event"] == "finished" for event in conductor.poll("", 0)["events"])
    assert finished == len(jobs), f"{finished} of {len(jobs)} jobs finished"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{cells:5,} cells {len(jobs):6,} jobs  {clock[0] / 3600:7.2f} h  {clock[0] / least:5.3f} of the least  "
        f"{busy / lanes / clock[0]:6.1%} busy  {opened:5,} opened  "
        f"{1000 * spent / len(jobs):6.2f} CPU ms a job  {peak:4.0f} MiB"
    )


def main() -> None:
    """Prints one line for each grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--open", type=float, default=30.0, help="seconds to open a state from the storage")
    parser.add_argument("--test", type=float, default=120.0, help="seconds of an evaluation")
    given = parser.parse_args()
    for title, experiment in grids(given.cells).items():
        print(f"{title:24} {simulate(experiment, given.lanes, given.open, given.test)}", flush=True)


if __name__ == "__main__":
    main()
