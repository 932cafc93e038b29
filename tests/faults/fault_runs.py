"""What the fault tests share: the program on a tiny experiment, and all that a disturbed run must have in common."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from program import PROGRAM, environment

HERE = Path(__file__).parent
STEPS, CHECKPOINT_EVERY, STAGE_RUNS = 40, 5, 3
# The last checkpoint may still be being written beside training; the one before it is sealed by then.
LOST_AT_MOST = 2 * CHECKPOINT_EVERY - 1
# Measured or drawn anew in every run; all else in MLflow must be equal.
VOLATILE = re.compile(r"second|memory|mlflow\.|hash|_at$|path|storage|share_of|log$|^logged_model$")
TABLE: list[dict[str, Any]] = []


def experiment(tiny_text: str) -> str:
    """Two cells of forty steps whose first half is one stage run; a checkpoint every five steps."""
    text = tiny_text.replace("max_steps: 6", f"max_steps: {STEPS}").replace(
        "[full, heavy, two_stage]", "[heavy, two_stage]"
    )
    text = text.replace("name: tiny\n", f"name: tiny\nplugins: [{HERE / 'fault_plugin.py'}]\n")
    return text + f"cluster: {{checkpoint_every: {CHECKPOINT_EVERY}}}\n"


@dataclass
class Ended:
    """How a process of the program ended."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def told(self) -> str:
        """All it printed."""
        return self.output + self.errors


class Program:
    """`llavolta run` in a folder of its own, each process a session as a terminal's would be.

    Args:
        folder: Gets the experiment; everything is written below it.
        text: The experiment.
        number: Of several that share a folder.
    """

    def __init__(self, folder: Path, text: str, number: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.storage, self.number = folder, folder / "runs", number
        (folder / "mine.yaml").write_text(text)
        self.environment = environment(PYTHONUNBUFFERED="1", LLAVOLTA_TEST=str(folder))

    def start(
        self, *arguments: str, fault: str | None = None, unread: bool = False, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Starts it; `fault` is `ACTION POINT COUNT` (`fault_plugin.py`), `unread` a pipe that nobody reads."""
        env = {**self.environment, **environment}
        if fault is not None:
            env["LLAVOLTA_FAULT"] = f"{fault} {self.folder}"
        with self._file("output").open("w") as output, self._file("errors").open("w") as errors:
            if unread:
                reader, writer = os.pipe()
                os.close(reader)
                for stream in (output, errors):
                    os.dup2(writer, stream.fileno())
                os.close(writer)
            return subprocess.Popen(
                [*PROGRAM, "run", "mine.yaml", *arguments],
                cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                start_new_session=True,
            )  # fmt: skip

    def run(self, *arguments: str, fault: str | None = None, **environment: str) -> Ended:
        """Starts it and waits for its end."""
        begun = time.monotonic()
        return self.wait(self.start(*arguments, fault=fault, **environment), begun)

    def wait(self, process: subprocess.Popen[bytes], begun: float) -> Ended:
        """Waits for the end of a process."""
        process.wait(timeout=400)
        return Ended(process.returncode, self.printed("output"), self.printed("errors"), time.monotonic() - begun)

    def printed(self, stream: str = "output") -> str:
        """What the last process has printed so far to `output` or `errors`."""
        return self._file(stream).read_text()

    def _file(self, stream: str) -> Path:
        return self.folder / f"{stream}{self.number}"

    @property
    def fault_happened(self) -> bool:
        """Whether the plug-in has done its harm."""
        return (self.folder / "fault-happened").exists()

    def sealed_checkpoints(self) -> list[Path]:
        """Sealed checkpoints inside stage runs under way."""
        return sorted(path.parent for path in self.storage.glob("work/*/step_*/manifest.json"))

    def processes(self) -> list[psutil.Process]:
        """What is alive of all that this program started."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("LLAVOLTA_TEST") == str(self.folder)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def repeated_steps(self) -> dict[str, int]:
        """Steps trained more than once, by finished stage run, as their logs tell."""
        found = {}
        for log in self.storage.glob("stage_runs/*/log.txt"):
            told = Counter(re.findall(r" step (\d+)/\d+ under ", log.read_text()))
            if told:
                found[log.parent.name] = sum(told.values()) - len(told)
        return found


def press_control_c(process: subprocess.Popen[bytes]) -> None:
    """As a terminal does: to every process of the foreground group."""
    os.killpg(process.pid, signal.SIGINT)


def state_of(program: Program, record: dict[str, Any] | None = None) -> dict[str, Any]:
    """What must equal an undisturbed run's: weights, step lines, evaluations, MLflow's record (or the one given)."""
    storage = program.storage
    weights = {path.parts[-3]: path.read_bytes() for path in storage.glob("cells/tiny/*/weights/model.safetensors")}
    steps = {}
    for path in storage.glob("stage_runs/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps[path.parent.name] = [(line["step"], line["loss"], line["learning_rate"]) for line in lines]
    evaluations = {path.stem: json.loads(path.read_text())["metrics"] for path in storage.glob("evaluations/*.json")}
    return {"weights": weights, "steps": steps, "evaluations": evaluations, "mlflow": record or mlflow_record(storage)}


def mlflow_record(storage: Path, uri: str | None = None) -> dict[str, Any]:
    """Run name to status, parameters, tags, metrics and curves; what is measured anew is told by name only."""
    client = MlflowClient(uri or f"sqlite:///{storage / 'mlflow.db'}")
    experiment_id = client.get_experiment_by_name("tiny").experiment_id
    found = {}
    for run in client.search_runs([experiment_id], "tags.cell_id != ''"):
        assert run.info.run_name not in found, "a twin"
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        found[run.info.run_name] = {
            "status": run.info.status,
            "params": run.data.params,
            "tags": {key: None if VOLATILE.search(key) else value for key, value in run.data.tags.items()},
            "metrics": {name: _points(name, points) for name, points in histories.items()},
        }
    return found


def _points(name: str, points: list[Any]) -> list[tuple[int, float | None]]:
    """A curve step by step; of a cell's figures the last one, since how often they were sent is a matter of time."""
    told = sorted((point.step, point.timestamp, None if VOLATILE.search(name) else point.value) for point in points)
    return [(step, value) for step, _, value in (told if name.startswith("train/") else told[-1:])]


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Places where two nested values differ, as text."""
    if found == expected:
        return []
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted({*found, *expected})
        return [text for key in keys for text in differences(found.get(key), expected.get(key), f"{where}/{key}")]
    return [f"{where}: {str(found)[:200]} instead of {str(expected)[:200]}"]


def assert_like_undisturbed(program: Program, reference: dict[str, Any]) -> None:
    """The oracle: the same final state, nothing left RUNNING, no process left."""
    found = state_of(program)
    assert not (wrong := differences(found, reference)), "\n".join(wrong)
    assert {run["status"] for run in found["mlflow"].values()} == {"FINISHED"}
    assert not program.processes(), [process.cmdline() for process in program.processes()]
    assert not list(program.storage.glob("failures/*")) and not list(program.storage.glob("work/*/metrics.jsonl"))


def note(fault: str, recovered: str, program: Program, seconds: float, lost_steps: int = 0) -> None:
    """Adds a line to the table that is printed at the end; `lost_steps`: of states whose log is gone with them."""
    repeated = sum(program.repeated_steps().values()) + lost_steps
    TABLE.append({"fault": fault, "recovered": recovered, "steps_repeated": repeated, "seconds": round(seconds, 1)})
