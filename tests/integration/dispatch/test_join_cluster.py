"""A cluster that runs already is joined, whether it asks for a token or not, and left running."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from repository import SUPPORT

DRIVER = """
import sys
from orchestrator.dispatch.driver import Hooks
from orchestrator.dispatch.ray.session import run_on_ray
from orchestrator.plan.jobs import RootJob
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec

cluster = ClusterSpec(address=sys.argv[1], num_workers=2, use_gpu=False)
outcome = run_on_ray(
    [RootJob("job0", {"do": ""}, 0)], Ledger(sys.argv[2]), cluster, Hooks(),
    executor="lane_jobs:run",
)
print(outcome.finished)
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.slow), "token"])
def test_joined_and_left_running(tmp_path: Path, mode: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PYTHONPATH": str(SUPPORT), "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    ray = str(Path(sys.executable).with_name("ray"))
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        start = [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={address.rpartition(':')[2]}"]
        start += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={folder}"]
        with (tmp_path / "ray.log").open("wb") as log:
            head = psutil.Popen(start, env={**env, "RAY_AUTH_MODE": mode}, stdout=log, stderr=log)
        try:
            while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
                with pytest.raises(psutil.TimeoutExpired):
                    head.wait(0.2)  # a head that ends early fails here
            driver = [sys.executable, "-c", DRIVER, address, str(tmp_path / "storage")]
            done = subprocess.run(driver, env=env, capture_output=True, text=True, timeout=120, check=False)
            assert done.stdout.strip() == "('job0',)", done.stdout + done.stderr
            assert head.is_running() and done.stderr == ""
        finally:
            family = head.children(recursive=True)
            head.terminate()
            for process in psutil.wait_procs([head, *family], timeout=3)[1]:
                process.kill()
