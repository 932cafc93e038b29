"""A cluster that runs already is joined, whether it asks for a token or not, and left running."""

from __future__ import annotations

import json
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


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_joined_and_left_running(tmp_path: Path, mode: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), env.get("PYTHONPATH", "")])
    env |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
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
            cluster = json.dumps({"address": address, "num_workers": 2, "use_gpu": False})
            driver = [sys.executable, SUPPORT / "ray_driver.py", cluster, tmp_path / "storage", "lane_jobs:run"]
            done = subprocess.run(driver, env=env, capture_output=True, text=True, timeout=300, check=False)
            assert done.stdout.strip() == "('job0',)", done.stdout + done.stderr
            assert head.is_running() and done.stderr == ""
        finally:
            family = head.children(recursive=True)
            head.terminate()
            for process in psutil.wait_procs([head, *family], timeout=3)[1]:
                process.kill()
