"""Lanes on a real Ray: side by side, fed while they run, and what is killed under them: each job is done once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from dispatch_hooks import Recorded
from repository import SUPPORT

from orchestrator.dispatch.ray.session import ray_session, run_on_ray
from orchestrator.plan.jobs import RootJob
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec

ONE = ClusterSpec(num_workers=1, resources_per_worker={"CPU": 0.5}, use_gpu=False)


def work(*does: str) -> list[RootJob]:
    return [RootJob(f"job{index}", {"do": do}, 0) for index, do in enumerate(does)]


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SUPPORT))
        with ray_session(None):
            yield


@pytest.fixture
def ledger(tmp_path: Path, shared_ray: None) -> Ledger:
    return Ledger(tmp_path / "storage")


class Run(Recorded):
    """Runs jobs, lets a test act on what happens, and remembers the events."""

    def __init__(self, ledger: Ledger, act: Callable[[Run], None] = lambda run: None) -> None:
        super().__init__()
        self.ledger, self._act = ledger, act
        self.marks = ledger.storage / "marks"

    def on_tick(self) -> None:
        self._act(self)

    def __call__(self, jobs: Sequence[RootJob], cluster: ClusterSpec = ONE) -> Any:
        return run_on_ray(jobs, self.ledger, cluster, self, executor="lane_jobs:run")

    def told(self, kind: str) -> list[str]:
        return [event["id"] for event in self.events if event["event"] == kind]

    def order(self) -> list[str]:
        """Each job once for each rank that did it."""
        return [line.split()[0] for line in (self.marks / "order").read_text().splitlines()]

    def is_running(self, job: str) -> bool:
        file = self.marks / f"{job}.running"
        return file.exists() and bool(file.read_text())


def kill_actor(name: str) -> None:
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith(f"ray::{name}"):
            process.kill()


def once(action: Callable[[Run], bool]) -> Callable[[Run], None]:
    """Asks until it says that it has acted."""
    acted: list[bool] = []

    def act(run: Run) -> None:
        if not acted and action(run):
            acted.append(True)

    return act


def test_lanes_work_side_by_side(ledger: Ledger) -> None:
    """Each of two jobs waits for the other to begin."""
    run = Run(ledger)
    two = ONE.model_copy(update={"lanes": 2, "nice": 7})
    outcome = run(work("begin_together", "begin_together", "", ""), two)
    assert sorted(outcome.finished) == [f"job{n}" for n in range(4)] and not outcome.left
    assert {event["lane"] for event in run.events if event["event"] == "started"} == {"lane-0", "lane-1"}
    assert sorted(run.order()) == [f"job{n}" for n in range(4)]
    assert (run.marks / "order").read_text().count(" niceness 7 ") == 4


@pytest.mark.slow
def test_a_killed_conductor_is_started_again_and_the_lane_goes_on_in_place(ledger: Ledger) -> None:
    def kill_then_let_go(run: Run) -> bool:
        # A job whose end the driver has not heard of is given out again; a real one is then found in the ledger.
        if run.told("finished") != ["job0"] or not run.is_running("job1"):
            return False
        kill_actor("Conductor")
        (run.marks / "job1.go").touch()
        return True

    run = Run(ledger, once(kill_then_let_go))
    outcome = run(work("", "until_told", ""))
    assert outcome.finished == ("job0", "job1", "job2")
    assert run.order() == ["job0", "job1", "job2"]
    assert [run.told(kind) for kind in ("retried", "failed")] == [[], []]
    memory = [line.split()[-1] for line in (run.marks / "order").read_text().splitlines()]
    assert memory == ["1", "2", "3"]  # the same process all along


@pytest.mark.slow
def test_a_lane_whose_controller_is_killed_is_started_again_and_the_other_goes_on(ledger: Ledger) -> None:
    def kill_one(run: Run) -> bool:
        lanes = {event["lane"] for event in run.events if event["event"] == "started"}
        if len(lanes) < 2 or not run.is_running("job0"):
            return False
        controllers = [p for p in psutil.Process().children(recursive=True) if "TrainController" in p.name()]
        min(controllers, key=lambda process: process.create_time()).kill()
        for job in ("job0", "job1"):
            (run.marks / f"{job}.go").touch()
        return True

    run = Run(ledger, once(kill_one))
    outcome = run(work("until_told", "until_told", "", ""), ONE.model_copy(update={"lanes": 2}))
    assert sorted(outcome.finished) == [f"job{n}" for n in range(4)] and not outcome.failed


@pytest.mark.slow
def test_a_frozen_rank_is_found_its_stacks_kept_and_the_job_done(ledger: Ledger) -> None:
    run = Run(ledger)
    two_ranks = ONE.model_copy(update={"num_workers": 2, "stall_minutes": 0.2, "max_failures": 1})
    outcome = run(work("freeze", ""), two_ranks)
    assert outcome.finished == ("job0", "job1") and run.told("retried") == ["job0"]
    told = next(event["error"] for event in run.events if event["event"] == "retried")
    assert "hung" in told and "rank 1" in told
    folder = ledger.work_folder("job0")
    assert "in run" in (folder / "log.txt").read_text()  # where rank 0 waited for the other
    assert "State:\tT (stopped)" in (folder / "log_rank1.txt").read_text()


class Growing(Run):
    """Proposes a job when the one before is done, three in all."""

    given = 1

    def newer_work(self) -> list[RootJob] | None:
        done = len(self.told("finished"))
        if done < self.given or self.given == 3:
            return None
        self.given += 1
        return work(*[""] * self.given)[done:]

    def is_closed(self) -> bool:
        return self.given == 3


def test_work_that_comes_while_it_runs_is_done_by_the_lane_that_waits(ledger: Ledger) -> None:
    run = Growing(ledger)
    outcome = run(work(""))
    assert outcome.finished == ("job0", "job1", "job2") and run.order() == ["job0", "job1", "job2"]
    assert {event["attempt"] for event in run.events} == {1}


@pytest.mark.slow
def test_a_stop_reaches_a_conductor_that_was_just_started_again(ledger: Ledger) -> None:
    def kill(run: Run) -> bool:
        if not (run.marks / "job0.running").exists():
            return False
        kill_actor("Conductor")
        return True

    act, killed = once(kill), []
    run = Run(ledger)

    def stop() -> bool:
        act(run)
        killed.append((run.marks / "job0.running").exists())
        return killed[-1]

    outcome = run_on_ray(work("until_stopped", ""), ledger, ONE, Recorded(run.events, stop), executor="lane_jobs:run")
    assert outcome.interrupted and outcome.left == ("job0", "job1") and not outcome.failed
    assert (run.marks / "job0.checkpoint").exists()
