"""A lane whose number of workers follows what there is: fewer when a node is lost, more when one joins."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import Machines, Popen, ray_on_machines
from program import PROGRAM, wait_until

from orchestrator.plan.experiment_plan import prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 1200
SECONDS = 500.0


def used(machines: Machines) -> set[str]:
    return {name for name in machines.by_name if machines.has_process(name, "ray::RayTrainWorker")}


def seconds_until(met: Callable[[], bool], run: Popen) -> float:
    begun = time.monotonic()
    wait_until(met, run, SECONDS)
    return time.monotonic() - begun


def test_with_fewer_and_with_more_workers_it_goes_on(tmp_path: Path, tiny_text: str) -> None:
    with ray_on_machines(tmp_path / "machines", {"head": 0, "alpha": 1, "beta": 1}) as machines:
        text = tiny_text.replace("max_steps: 6", f"max_steps: {STEPS}").replace("zero0", "zero2")
        text = text.replace("[full, heavy, two_stage]", "[heavy]")
        cluster = f"{{num_workers: {{min: 1, max: 2}}, placement: spread, address: '{machines.address}'"
        cluster += f", storage_path: {machines.shared}/runs, checkpoint_every: 20}}"
        (machines.shared / "mine.yaml").write_text(f"{text}cluster: {cluster}\n")
        plan = prepare(machines.shared / "mine.yaml")
        (cell,) = plan.cells
        metrics = plan.ledger.metrics_file(cell.state)

        def steps() -> int:
            return len(metrics.read_text().splitlines()) if metrics.exists() else 0

        run = machines.start("head", [*PROGRAM, "run", machines.shared / "mine.yaml"], "run.txt")
        seconds_until(lambda: steps() > 25, run)
        assert used(machines) == {"alpha", "beta"}
        machines.remove("beta")
        before = steps()
        lost = seconds_until(lambda: steps() > before + 20, run)
        assert used(machines) == {"alpha"}
        machines.add("beta")
        machines.join("beta", 1)
        joined = seconds_until(lambda: used(machines) == {"alpha", "beta"}, run)
        assert run.wait(timeout=SECONDS) == 0, machines.printed("run.txt")
        print(f"{lost:.0f} s until 20 steps on one node, {joined:.0f} s until both are used again")

        record = plan.record(cell)
        assert record.status == "finished" and record.summary["eval/vqa/accuracy"] >= 0
        seen = [step for name, _, step, _ in record.history if name == "train/loss"]
        assert seen == list(range(STEPS))
        fingerprint = (plan.ledger.result(cell.state) or {})["fingerprint"]
        assert fingerprint["world_size"] == 2
