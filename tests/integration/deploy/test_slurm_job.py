"""A batch script as SLURM runs it, on two machines: stopped before its time ends, requeued, done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from machines import Machines, why_not
from program import wait_until

import orchestrator as llv
from orchestrator.plan.experiment_plan import prepare

pytestmark = pytest.mark.slow  # a Ray on each of two machines, twice
# SLURM as far as the script knows it: `srun` has the controller (this test) start its words on every machine.
SRUN = """#!/bin/bash
env -0 > step.env
printf '%s\\0' "$@" > step.part
mv step.part step
until [ -e step.code ]; do sleep 0.2; done
code=$(cat step.code)
rm step.code
exit "$code"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then tr , '\\n' <<< "$3"; else echo "$@" >> requeued; fi
"""
SECONDS = 400.0


class Controller:
    """Runs a batch script on the first of two machines, and its steps on both."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        self.machines, self.folder = machines, folder
        bin_ = folder / "bin"
        bin_.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (bin_ / name).write_text(text)
            (bin_ / name).chmod(0o755)
        self.env = {
            "PATH": f"{bin_}:/usr/local/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": ",".join(machine.address for machine in machines.by_name.values()),
        }  # fmt: skip

    def run(self, number: int, until: Path | None = None) -> int:
        """Runs the script to its end, warned once there is `until`; its exit code."""
        self.batch = self._start("head", ["bash", self.folder / "run.sbatch"], f"batch-{number}.txt", self.env)
        wait_until((self.folder / "step").exists, self.batch, SECONDS)
        words = (self.folder / "step").read_text().split("\0")[:-1]
        pairs = [entry.partition("=") for entry in (self.folder / "step.env").read_text().split("\0")[:-1]]
        (self.folder / "step").unlink()
        env = {name: value for name, _, value in pairs if name not in ("HOME", "PWD", "SHLVL", "_")}
        tasks = [self._start(name, words, f"{name}-{number}.txt", env) for name in self.machines.by_name]
        if until is not None:
            wait_until(until.exists, self.batch, SECONDS)
            self.machines.run("head", ["pkill", "-USR1", "-f", "run.sbatch"], f"warn-{number}.txt")
        codes = [task.wait(timeout=SECONDS) for task in tasks]
        (self.folder / "step.code").write_text(str(max(codes)))
        return self.batch.wait(timeout=SECONDS)

    def _start(self, name: str, words: list, output: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
        machine = self.machines[name]
        return machine.start(words, self.folder.parent / output, self.folder, **env)


def test_a_job_is_stopped_in_time_requeued_and_done(tmp_path: Path, tiny_text: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Machines(tmp_path / "machines", ["head", "alpha"], RAY_AUTH_MODE="token") as machines:
        shared = machines.shared
        text = tiny_text.replace("max_steps: 6", "max_steps: 60").replace("[full, heavy, two_stage]", "[full]")
        cluster = f"{{num_workers: 2, placement: spread, storage_path: {shared}/runs, checkpoint_every: 1000}}"
        (shared / "tiny.yaml").write_text(f"{text}cluster: {cluster}\n")
        experiment, plan = llv.load(shared / "tiny.yaml"), prepare(shared / "tiny.yaml")
        llv.deploy("slurm", experiment, shared / "job", nodes=2)
        controller = Controller(machines, shared / "job")
        controller.env["PATH"] = f"{Path(sys.executable).parent}:{controller.env['PATH']}"

        stage = plan.cells[0].state
        metrics = plan.ledger.metrics_file(stage)
        code = controller.run(1, until=metrics)
        printed = (shared / "head-1.txt").read_text()
        assert code == 75, printed
        assert (shared / "job" / "requeued").read_text() == "requeue 7\n"
        steps = len(plan.ledger.metrics_file(stage).read_text().splitlines())
        assert 0 < steps < 60 and not plan.ledger.is_done(stage)

        assert controller.run(2) == 0, (shared / "head-2.txt").read_text()
        assert (shared / "job" / "requeued").read_text() == "requeue 7\n"
        record = plan.record(plan.cells[0])
        seen = [step for name, _, step, _ in record.history if name == "train/loss"]
        assert record.status == "finished" and seen == list(range(60))
        result = plan.ledger.result(stage) or {}
        assert result["fingerprint"]["world_size"] == 2, json.dumps(result)
