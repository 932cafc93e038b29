"""Nodes that are lost, taken away or slow while a lane of two workers trains across them: the result is the same."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_runs import HERE, Program, assert_like_undisturbed, experiment, note, state_of
from machines import Machines, Popen, ray_on_machines
from program import PROGRAM, wait_until

import orchestrator as llv

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NODES = ("alpha", "beta", "gamma")
# On each machine's own disk.
PLUGIN = Path("/tmp/home/fault_plugin.py")


@pytest.fixture(scope="module")
def text(tiny_text: str) -> str:
    """The experiment that is disturbed, in lanes of two workers on two nodes."""
    text = experiment(tiny_text).replace(str(HERE / PLUGIN.name), str(PLUGIN))
    return text.replace("cluster: {", "cluster: {num_workers: 2, placement: spread, ")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """The machine of the driver, which trains nothing."""
    with ray_on_machines(tmp_path_factory.mktemp("machines"), {"head": 0}) as machines:
        give_plugin(machines, "head")
        yield machines


@pytest.fixture
def machines(head: Machines) -> Machines:
    """Three nodes that can hold one worker each."""
    for name in NODES:
        if name not in head.by_name:
            join(head, name)
    return head


def give_plugin(machines: Machines, name: str) -> None:
    machines[name].inside(PLUGIN).write_text((HERE / PLUGIN.name).read_text())


def join(machines: Machines, name: str) -> None:
    """A new machine joins Ray."""
    machines.add(name)
    give_plugin(machines, name)
    machines.join(name, 1)


class Run:
    """`llavolta run` on the head."""

    def __init__(self, machines: Machines, name: str, text: str) -> None:
        self._machines, self._output = machines, f"{name}.txt"
        self.program = Program(machines.shared / name, text)
        self.start()

    def start(self) -> None:
        """Starts it, once more."""
        spec, address = self.program.folder / "mine.yaml", self._machines.address
        words = [*PROGRAM, "run", spec, "--set", f"cluster.address={address}"]
        storage = str(self.program.storage)
        self.process: Popen = self._machines.start("head", words, self._output, LLAVOLTA_STORAGE=storage)

    @property
    def printed(self) -> str:
        """What it has printed."""
        return self._machines.printed(self._output)

    def progress(self) -> tuple[int, int]:
        """Finished stage runs, and the step of the newest checkpoint in the one under way."""
        steps = [int(path.name.removeprefix("step_")) for path in self.program.sealed_checkpoints()]
        return len(list(self.program.storage.glob("stage_runs/*/metrics.jsonl"))), max(steps, default=0)

    def seconds_until_progress(self) -> float:
        """Waits for a further checkpoint; how long that took."""
        begun, before = time.monotonic(), self.progress()
        wait_until(lambda: self.progress() > before, self.process, 600)
        return time.monotonic() - begun

    def used(self) -> list[str]:
        """The nodes on which its workers are."""
        return [name for name in NODES if self._machines.has_process(name, "ray::RayTrainWorker")]

    def ends_like(self, reference: dict[str, Any]) -> None:
        """Waits for its end, and compares bit for bit."""
        assert self.process.wait(timeout=600) == 0, self.printed
        assert_like_undisturbed(self.program, reference)


@pytest.fixture(scope="module")
def reference(head: Machines, text: str) -> dict[str, Any]:
    """What it ends with on two nodes that nothing happens to."""
    for name in NODES[:2]:
        join(head, name)
    run, begun = Run(head, "undisturbed", text), time.monotonic()
    assert run.process.wait(timeout=600) == 0, run.printed
    note("none", "", run.program, time.monotonic() - begun)
    return state_of(run.program)


def test_a_node_killed_and_another_cut_off(machines: Machines, text: str, reference: dict[str, Any]) -> None:
    """Each time the lane's workers go on from the last checkpoint on the two nodes that are left."""
    run, begun = Run(machines, "disturbed", text), time.monotonic()
    wait_until(lambda: run.progress() >= (0, 10), run.process, 600)
    machines.remove(lost := run.used()[0])
    after_kill = run.seconds_until_progress()
    join(machines, lost)
    machines.cut_off(lost := run.used()[0])
    after_cut = run.seconds_until_progress()
    assert machines.has_process(lost, "ray::RayTrainWorker")  # it knows nothing of that
    machines.connect(lost)
    run.ends_like(reference)
    note("a node killed: until the next checkpoint", "the nodes that are left", run.program, after_kill)
    note("a node cut off: until the next checkpoint", "the nodes that are left", run.program, after_cut)
    note("both, the whole run", "", run.program, time.monotonic() - begun)
    wait_until(lambda: not machines.has_process(lost, "ray::RayTrainWorker"))
    machines.remove(lost)


def test_a_node_that_is_to_be_taken_away(
    machines: Machines, text: str, reference: dict[str, Any], tiny_experiment: Path, tmp_path: Path
) -> None:
    """Told in time, as of a spot machine, the lane writes a checkpoint and moves: no step is trained again.

    What tells it is what `deploy kuberay` has a pod run that is to end; when that returns, the machine is turned off.
    """
    run = Run(machines, "told", text)
    (file,) = llv.deploy("kuberay", llv.load(tiny_experiment, ["cluster.storage_path=/nfs"]), tmp_path / "deployed")
    (workers,) = list(yaml.safe_load_all(file.read_text()))[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    leave = container["lifecycle"]["preStop"]["exec"]["command"]
    wait_until(lambda: run.progress() >= (0, 10), run.process, 600)
    taken = run.used()[0]
    begun = time.monotonic()
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    machines.run(taken, leave, "leave.txt", RAY_ADDRESS=machines.address, PATH=path)
    machines.remove(taken)
    left = time.monotonic() - begun
    further = left + run.seconds_until_progress()
    assert taken not in run.used()
    run.ends_like(reference)
    assert sum(run.program.repeated_steps().values()) == 0
    note("a node to be taken away: until its worker has left", "the nodes that are left", run.program, left)
    note("a node to be taken away: until the next checkpoint", "the nodes that are left", run.program, further)


def test_a_slow_node(machines: Machines, text: str, reference: dict[str, Any]) -> None:
    """The lane is as slow as its slowest worker, and nothing is taken for lost."""
    for name in NODES[:2]:
        machines.slow_down(name, "5mbit")
    run, begun = Run(machines, "slow", text), time.monotonic()
    run.ends_like(reference)
    assert "again" not in run.printed
    note("two slow nodes", "", run.program, time.monotonic() - begun)
    for name in NODES[:2]:
        machines.slow_down(name, "10gbit")


def test_the_head_started_anew(machines: Machines, text: str, reference: dict[str, Any]) -> None:
    """With the head the driver is lost, and the nodes leave; once Ray is up again, the same command goes on."""
    run = Run(machines, "headless", text)
    wait_until(lambda: run.progress() >= (0, 10), run.process, 600)
    begun, address = time.monotonic(), machines.head.address
    machines.remove("head")
    for name in NODES:
        wait_until(lambda name=name: not machines.has_process(name, "raylet"), None, 600)
    left = time.monotonic() - begun
    machines.add("head", address)
    give_plugin(machines, "head")
    machines.start_ray({"head": 0, **dict.fromkeys(NODES, 1)})
    begun = time.monotonic()
    run.start()
    further = run.seconds_until_progress()
    run.ends_like(reference)
    note("the head lost: until the nodes have left", "", run.program, left)
    note("the head lost: from the same command to the next checkpoint", "the same command", run.program, further)
