"""A cluster without nodes for workers, whose autoscaler adds them as they are asked for."""

from __future__ import annotations

import json
import re
import secrets
import sys
from pathlib import Path

import pytest
from machines import Machines, why_not
from program import PROGRAM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAY = Path(sys.executable).with_name("ray")
# Ray's own provider for tests: a node is a raylet on the head's machine.
CONFIG = {
    "cluster_name": "from-nothing",
    "max_workers": 2,
    "idle_timeout_minutes": 0.1,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    "auth": {},
    "docker": {},
    "file_mounts": {},
    **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
}


def test_a_lane_waits_for_the_nodes_that_it_asks_for(tmp_path: Path, tiny_text: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with Machines(tmp_path / "machines", ["head"], **token) as machines:
        config = machines.shared / "autoscaling.json"
        config.write_text(json.dumps(CONFIG))
        start = [RAY, "start", "--head", "--port=6379", f"--node-ip-address={machines.head.address}", "--num-cpus=0"]
        start += ["--include-dashboard=false", "--disable-usage-stats", f"--object-store-memory={80 * 2**20}"]
        start.append(f"--autoscaling-config={config}")
        machines.run("head", start, "ray.txt", RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1")

        text = tiny_text.replace("[full, heavy, two_stage]", "[heavy]")
        cluster = f"{{num_workers: 2, use_gpu: false, address: '{machines.address}', storage_path: runs}}"
        (machines.shared / "mine.yaml").write_text(f"{text}cluster: {cluster}\n")
        run = [*PROGRAM, "run", "mine.yaml"]
        refused = machines.start("head", run, "refused.txt")
        assert refused.wait(timeout=300) == 2
        assert "2 x 1 CPU = 2 CPU, it has 0" in machines.printed("refused.txt")
        assert "cluster.wait_minutes" in machines.printed("refused.txt")

        stopped = machines.start("head", [*run, "--set", "cluster.wait_minutes=5", "--max-hours=0.001"], "stopped.txt")
        assert stopped.wait(timeout=300) == 75, machines.printed("stopped.txt")

        told = machines.run("head", [*run, "--set", "cluster.wait_minutes=5"], "run.txt")
        assert "it has 0; waiting for up to 5 minutes" in told
        assert re.search(r"schedule=heavy .* finished", told)
