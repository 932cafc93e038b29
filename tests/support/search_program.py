"""The program as tests of the search start it, and what it leaves behind."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import psutil
from mlflow import MlflowClient
from program import PROGRAM, environment


class Search:
    """The program in a folder of its own."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.storage = folder, folder / "runs"
        (folder / "search.yaml").write_text(text)
        self.environment = environment(LLAVOLTA_TEST=str(folder))

    def start(self, *arguments: str, verb: str = "search") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*PROGRAM, verb, "search.yaml", *arguments], cwd=self.folder,
            env=self.environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, verb: str = "search") -> tuple[int, str, str]:
        process = self.start(*arguments, verb=verb)
        output, errors = process.communicate(timeout=600)
        return process.returncode, output, errors

    def trials(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.storage.glob("searches/*/trial_*.json"))]

    def training(self) -> bool:
        """Whether a second trial is being trained."""
        states = [trial["state"] for trial in self.trials()]
        under_way = any(path.stat().st_size for path in self.storage.glob("work/*/log.txt"))
        return len(states) > 1 and states[-1] == "proposed" and under_way

    def steps(self) -> dict[str, Counter]:
        """How often each step was trained, by finished stage run."""
        logs = {path.parent.name: path.read_text() for path in self.storage.glob("stage_runs/*/log.txt")}
        return {name: Counter(re.findall(r" step (\d+)/\d+ under ", text)) for name, text in logs.items()}

    def runs(self) -> dict[str, object]:
        client = MlflowClient(f"sqlite:///{self.storage / 'mlflow.db'}")
        found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], "tags.cell_id != ''")
        return {run.data.tags["cell_id"]: run for run in found}

    def alive(self) -> bool:
        for process in psutil.process_iter():
            try:
                if process.environ().get("LLAVOLTA_TEST") == str(self.folder) and process.status() != "zombie":
                    return True
            except psutil.Error:
                continue
        return False
