"""run_on_ray with a real Ray: order, failures, killed workers, stops, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dispatch_hooks import Recorded
from repository import SUPPORT

from orchestrator.dispatch.driver import Hooks
from orchestrator.dispatch.ray.session import ray_session, run_on_ray
from orchestrator.errors import UsageError
from orchestrator.plan.jobs import RootJob
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec

# Of this file alone: what is left behind is known by it.
PYTHONPATH = os.pathsep.join([str(SUPPORT), str(Path(__file__).parent)])
TWO_WORKERS = ClusterSpec(num_workers=2, resources_per_worker={"CPU": 0.5}, use_gpu=False, max_failures=2)


def work(*does: str) -> list[RootJob]:
    return [RootJob(f"job{index}", {"do": do}, 0) for index, do in enumerate(does)]


@pytest.fixture(autouse=True, scope="module")
def importable_executor() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        yield


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "storage")


def order_of(ledger: Ledger) -> list[str]:
    return (ledger.storage / "marks" / "order").read_text().splitlines()


def test_a_lane_of_two_workers_from_start_to_end(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One owned Ray: jobs in order, a failure, a killed worker, logs, quiet terminal, no process left."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a Ray left behind is never joined by mistake
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")  # what the user set stays
    processes = _our_processes()
    events: list[dict] = []
    jobs = work("", "raise", "", "kill", "raise_on_rank_1", "")
    outcome = run_on_ray(jobs, ledger, TWO_WORKERS, Recorded(events), executor="lane_jobs:run")

    assert outcome.finished == ("job0", "job2", "job3", "job5")
    assert outcome.failed == {"job1": "row 7: the image is broken", "job4": "row 8: the image is broken"}
    assert [line.split()[0] for line in order_of(ledger)[::2]] == ["job0", "job2", "job3", "job5"]
    assert {line.split()[2] for line in order_of(ledger)} == {"0", "1"}
    assert all(f"of 2 threads 1 niceness {os.nice(0)} spins 77 patience 1850 s " in line for line in order_of(ledger))
    retried = [event for event in events if event["event"] == "retried"]
    assert [event["id"] for event in retried] == ["job3"]
    assert "a worker process died" in retried[0]["error"]
    assert [event["attempt"] for event in events if event["id"] == "job3" and event["event"] == "started"] == [1, 2]

    log = (ledger.work_folder("job1") / "log.txt").read_text()
    assert "hello from job1 rank 0" in log and "child of job1" in log and "DataError: row 7" in log
    assert "hello from job0" not in log
    failure = ledger.failure("job1")
    assert failure is not None and failure["error"] == "row 7: the image is broken"
    assert ledger.failure("job3") is None

    assert capfd.readouterr() == ("", "")
    assert list((tmp_path / "cwd").iterdir()) == []
    assert list((ledger.storage / "ray").iterdir()) == []
    assert not _our_processes() - processes


@pytest.fixture(scope="module")
def shared_ray(importable_executor: None) -> Iterator[None]:
    """A Ray that this process is connected to already; runs use it and leave it open."""
    with ray_session(None):
        yield


def test_a_request_too_large_is_refused_with_the_numbers(shared_ray: None, ledger: Ledger) -> None:
    begun = time.monotonic()
    with pytest.raises(UsageError, match=r"3 x 1000 CPU = 3000 CPU, it has \d+"):
        run_on_ray(
            work(""),
            ledger,
            ClusterSpec(num_workers=3, resources_per_worker={"CPU": 1000}),
            Hooks(),
        )
    assert time.monotonic() - begun < 60


def test_a_stop_leaves_at_a_checkpoint_and_frees_the_resources(shared_ray: None, ledger: Ledger) -> None:
    import ray

    running = ledger.storage / "marks" / "job0.running"
    events: list[dict] = []
    outcome = run_on_ray(
        work("until_stopped", ""), ledger, TWO_WORKERS, Recorded(events, running.exists), executor="lane_jobs:run"
    )
    assert (outcome.interrupted, outcome.left, outcome.failed) == (True, ("job0", "job1"), {})
    assert [event["event"] for event in events] == ["started", "interrupted"]
    assert (ledger.storage / "marks" / "job0.checkpoint").exists()
    assert ray.is_initialized()
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states == {"REMOVED"}


@pytest.mark.slow
def test_beside_a_lane_runs_only_what_it_needs(shared_ray: None, ledger: Ledger) -> None:
    """Every further process wakes up all the time and takes from the cores that train."""
    from ray._private.state import actors

    assert run_on_ray(work(""), ledger, TWO_WORKERS, Hooks(), executor="lane_jobs:run").finished == ("job0",)
    ends: dict[str, list[int]] = {}
    for actor in sorted(actors().values(), key=lambda actor: actor["StartTime"]):
        ends.setdefault(actor["ActorClassName"].rpartition(".")[2], []).append(actor["EndTime"])
    assert ends.keys() == {"Conductor", "TrainController", "RayTrainWorker", "SynchronizationActor"}
    assert 0 < ends["SynchronizationActor"][-1] < ends["RayTrainWorker"][-1]
    programs = {Path(word).name for child in psutil.Process().children() for word in child.cmdline()}
    assert "gcs_server" in programs and not programs & {"monitor.py", "log_monitor.py", "dashboard.py"}


@pytest.mark.slow
def test_many_jobs_are_done_in_their_order_by_every_rank(shared_ray: None, ledger: Ledger) -> None:
    hooks = Recorded()
    run_on_ray(work(*[""] * 30), ledger, TWO_WORKERS, hooks, executor="lane_jobs:run")
    finished = [event["id"] for event in hooks.events if event["event"] == "finished"]
    assert finished == [f"job{index}" for index in range(30)]
    assert len(order_of(ledger)) == 60


def test_nobody_at_the_address_is_told_in_seconds(ledger: Ledger) -> None:
    with socket.socket() as listener:  # bound, not listening: nobody else can take it meanwhile
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        code = (
            "from orchestrator.dispatch.ray.session import ray_session\n"
            f"with ray_session({f'127.0.0.1:{port}'!r}): pass\n"
        )
        begun = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert time.monotonic() - begun < 60
    assert f"UsageError: cluster.address: no Ray answers at '127.0.0.1:{port}'" in done.stderr
    assert "ray start --head" in done.stderr


def test_a_temporary_folder_too_long_for_rays_sockets_is_told(tmp_path: Path) -> None:
    place = tmp_path / ("a" * 60)
    place.mkdir()
    code = "from orchestrator.dispatch.ray.session import ray_session\nwith ray_session(None): pass\n"
    env = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"} | {"TMPDIR": str(place)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "UsageError: Ray could not be started on this machine" in done.stderr
    assert f"set RAY_TMPDIR to a folder with a shorter path than {place}" in done.stderr


@pytest.mark.slow
def test_control_c_twice_ends_at_once_and_leaves_no_process(tmp_path: Path) -> None:
    """The signals go to the whole foreground group, as a terminal sends them."""
    script = tmp_path / "driver.py"
    script.write_text(_DRIVER)
    processes = _our_processes()
    driver = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "storage")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        running = tmp_path / "storage" / "marks" / "job0.running"
        while not running.exists():
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.1)
        os.killpg(driver.pid, signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            driver.wait(timeout=2)  # one is a polite request, which this job does not hear
        os.killpg(driver.pid, signal.SIGINT)
        begun = time.monotonic()
        printed = driver.communicate(timeout=120)[0]
        assert time.monotonic() - begun < 60
    finally:
        driver.kill()
    assert printed.splitlines() == ["asked by SIGINT", "Interrupted: stopped at once"]
    assert not _our_processes() - processes


_DRIVER = """
import sys
from pathlib import Path

from orchestrator.dispatch.driver import Hooks
from orchestrator.dispatch.ray.session import run_on_ray
from orchestrator.dispatch.signals import StopRequest
from orchestrator.errors import Interrupted
from orchestrator.plan.jobs import RootJob
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec


class Stopped(Hooks):
    def stop_asked(self):
        return int(stop())


with StopRequest(lambda name: print(f"asked by {name}", flush=True)) as stop:
    try:
        run_on_ray([RootJob("job0", {"do": "hang"}, 0)], Ledger(Path(sys.argv[1])), ClusterSpec(use_gpu=False),
                   Stopped(), executor="lane_jobs:run")
    except Interrupted as error:
        print(f"Interrupted: {str(error).partition(';')[0]}")
"""


def _our_processes() -> set[int]:
    """Processes that carry this test's mark in their environment, wherever their parents went; zombies are no longer.

    Ray's processes inherit PYTHONPATH from the driver, which names this file's folder.
    """
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("PYTHONPATH") == PYTHONPATH and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found
