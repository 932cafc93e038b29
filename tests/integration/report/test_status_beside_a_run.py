"""status from another terminal, beside a run and after its death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program import wait_until

HEAVY = {"torch", "transformers", "deepspeed", "ray", "mlflow", "matplotlib", "numpy"}


@pytest.mark.slow
def test_status_from_another_terminal_beside_a_run_and_after_its_death(tiny_experiment: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    env = {**os.environ, "LLAVOLTA_STORAGE": str(storage), "OMP_NUM_THREADS": "1"}
    more = ["--set", "phases.finetune.max_steps=2000"]
    command = [sys.executable, "-m", "orchestrator"]
    script = (
        "import json, sys; from orchestrator.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    )

    def status() -> tuple[dict[str, Any], set[str]]:
        told = subprocess.run(
            [sys.executable, "-c", script, "status", str(tiny_experiment), "--json", *more],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(told.stdout), set(json.loads(told.stderr.splitlines()[-1]))

    with open(tmp_path / "out.txt", "wb") as out:
        run = subprocess.Popen(
            [*command, "run", "--local", str(tiny_experiment), *more], env=env, stdout=out, stderr=out
        )
    try:
        wait_until(lambda: any(spool.stat().st_size for spool in storage.glob("work/*/metrics.jsonl")), run)
        document, modules = status()
        assert not modules & HEAVY
        running = [each for each in document["stage_runs"] if each["state"] == "running"]
        assert [each["holder"]["pid"] for each in running] == [run.pid] and running[0]["loss"] > 0
        assert [cell["state"] for cell in document["cells"]] == ["running", "new", "new"]
        run.send_signal(signal.SIGKILL)
        run.wait()
        document, _ = status()
        assert [cell["state"] for cell in document["cells"]] == ["interrupted", "new", "new"]
        assert all(each["holder"] is None for each in document["stage_runs"])
    finally:
        run.kill()
        run.wait()
