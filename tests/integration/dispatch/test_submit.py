"""Experiments as jobs of a real Ray head: joined, followed, left, cancelled, run again; tokens, no cluster."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from machines import JOBS_PORT, ray_on_machines
from program import PROGRAM, environment, run_anew
from search_experiment import SEARCH

HEADS = 6
pytestmark = pytest.mark.slow  # a head with a dashboard, and four runs on it
PLUGIN = '''
from typing import Literal
from orchestrator_plugins.data.easy_vqa import EasyVqaSpec

class MineSpec(EasyVqaSpec):
    """easy_vqa under another name."""
    kind: Literal["mine"] = "mine"
'''


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@dataclass
class Cluster:
    """A Ray head with a dashboard, and a folder with an experiment."""

    url: str
    gcs: str
    token: dict[str, str]
    folder: Path

    def call(self, verb: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        words = [verb, "tiny.yaml", "--address", self.url, *arguments]
        return run_anew(words, self.folder, **{**self.token, "RAY_ADDRESS": "127.0.0.1:1", **env})

    def start(self, verb: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*PROGRAM, *verb.split(), "tiny.yaml", "--address", self.url, *arguments], cwd=self.folder,
            env=environment(**self.token), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@pytest.fixture(scope="module", params=["token", "disabled"])
def cluster(
    request: pytest.FixtureRequest, tiny_text: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("submit")
    text = tiny_text.replace("[full, heavy, two_stage]", "[heavy]").replace(
        "train: {kind: easy_vqa", "train: {kind: mine"
    )
    (folder / "tiny.yaml").write_text(f"{text}plugins: [mine.py]\ncluster: {{storage_path: {folder}/results}}\n")
    (folder / "mine.py").write_text(PLUGIN)
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)} if request.param == "token" else {}
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        # Ray gives each of its agents 15 s to start, however busy the machine, and ends the head after that.
        for attempt in range(1, HEADS + 1):
            gcs, dashboard, client = free_ports(3)
            with head_of(Path(temporary) / str(attempt), gcs, dashboard, client, request.param, token) as is_up:
                if is_up:
                    yield Cluster(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{gcs}", token, folder)
                    return
    pytest.fail(f"none of {HEADS} heads started")


@contextmanager
def head_of(folder: Path, gcs: int, dashboard: int, client: int, mode: str, token: dict[str, str]) -> Iterator[bool]:
    """Run a head of two CPUs for the block; False where it ended while it started."""
    folder.mkdir()
    programs = str(Path(sys.executable).parent)
    env = environment(RAY_AUTH_MODE=mode, RAY_USAGE_STATS_ENABLED="0", **token)
    env |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    # Of each port one that is free: another head may have Ray's 10001, and one that lacks it ends.
    start = [f"{programs}/ray", "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true",
             "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
             f"--ray-client-server-port={client}",
             "--object-store-memory=80000000"]  # fmt: skip
    log = folder / "start.log"
    with log.open("wb") as opened:
        head = psutil.Popen(start, env=env, stdout=opened, stderr=opened)
    known = [head]
    try:
        while "Ray runtime started" not in log.read_text() and head.is_running():
            with suppress(psutil.TimeoutExpired):
                head.wait(0.2)
            with suppress(psutil.NoSuchProcess):
                known += [child for child in head.children(recursive=True) if child not in known]
        yield head.is_running()
    finally:
        with suppress(psutil.NoSuchProcess):
            known += [child for child in head.children(recursive=True) if child not in known]
            head.terminate()
        for process in psutil.wait_procs(known, timeout=5)[1]:
            process.kill()


def test_what_keeps_a_submission_out_is_one_sentence(cluster: Cluster, tmp_path: Path) -> None:
    [nobody] = free_ports(1)
    for address in (f"http://127.0.0.1:{nobody}", cluster.gcs, "ftp://127.0.0.1"):
        done = run_anew(["submit", "tiny.yaml", "--address", address], cluster.folder, **cluster.token)
        assert done.returncode == 2 and done.stderr.startswith(f"error: --address {address}: "), done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2
    if cluster.token:
        for told, env in {
            "refuses the token": {"RAY_AUTH_TOKEN": "another"},
            "there is none here": {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)},
        }.items():
            done = cluster.call("submit", **env)
            assert done.returncode == 2 and told in done.stderr and "RAY_AUTH_TOKEN" in done.stderr, done.stderr
    assert json.loads(cluster.call("status", "--json").stdout)["error"].endswith("and of --set")


def test_a_job_is_joined_left_cancelled_and_its_content_run_again(cluster: Cluster) -> None:
    long = ("--set", "phases.finetune.max_steps=100000", "--set", "cluster.checkpoint_every=100000")
    with cluster.start("submit", *long) as first, cluster.start("submit run", *long) as second:
        try:
            seen = {each: _read_until(each, " step ") for each in (first, second)}  # both see it train
            said = [next(line for line in text.splitlines() if line.startswith("llavolta-")) for text in seen.values()]
            [name] = {line.partition(": ")[0] for line in said}
            assert sorted(line.partition(": ")[2] for line in said) == ["joined", "submitted"]
            second.send_signal(signal.SIGINT)
            left = second.communicate(timeout=60)[0]
            assert second.returncode == 130 and "goes on" in left and "llavolta cancel" in left
            status = json.loads(cluster.call("status", *long, "--json").stdout)
            assert (status["job"], status["status"]) == (name, "RUNNING")
            other = cluster.call("submit", *long, "--max-hours", "1")
            assert other.returncode == 2 and "--max-hours 1" in other.stderr
            cancelled = cluster.call("cancel", *long, "--json")
            assert cancelled.returncode == 0 and "writing a checkpoint" in cancelled.stderr, cancelled.stderr
            assert json.loads(cancelled.stdout)["status"] == "STOPPED"
            assert "writing a checkpoint" in first.communicate(timeout=60)[0]
            assert first.returncode == 75
        finally:
            first.kill()
            second.kill()
    assert list((cluster.folder / "results" / "work").glob("*/step_*"))
    again = cluster.call("cancel", *long)
    assert again.returncode == 2 and "has ended already" in again.stderr


def _read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    read = ""
    while text not in read:
        line = process.stdout.readline()
        assert line, read
        read += line
    return read


def test_the_exit_code_is_the_runs_own(cluster: Cluster) -> None:
    done = cluster.call("submit", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and (found["status"], found["exit_code"], found["joined"]) == ("SUCCEEDED", 0, False)
    assert "finished" in done.stderr and (cluster.folder / "results" / "cells" / "tiny").is_dir()
    again = cluster.call("submit")
    assert again.returncode == 0 and f"{found['job'].rpartition('-')[0]}-2: submitted" in again.stderr
    assert cluster.call("logs").stdout == again.stdout == cluster.call("logs", "-f").stdout
    elsewhere = "data.train={kind: llava_json, data_path: /nowhere/rows.json, image_folder: /nowhere, num_samples: 96}"
    failed = cluster.call("submit", "--set", elsewhere)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "must be on the cluster: data.train.data_path: /nowhere/rows.json" in failed.stderr
    assert "/nowhere/rows.json" in failed.stdout


def test_without_the_job_client_it_says_what_to_install(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['aiohttp'] = None\n")
    python = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = cluster.call("submit", PYTHONPATH=python)
    assert done.returncode == 2 and "pip install 'ray[default]==" in done.stderr, done.stderr


def test_a_search_is_submitted_from_a_machine_outside_to_a_cluster_of_several(tiny_text: str, tmp_path: Path) -> None:
    """Its file and plug-in lie on that machine alone, its results where the cluster's nodes put them."""
    grid = tiny_text[: tiny_text.index("matrix:")].replace("train: {kind: easy_vqa", "train: {kind: mine")
    search = SEARCH.replace("[full, light, heavy, wide]", "[full, heavy]").replace("num_trials: 4", "num_trials: 2")
    search = search.replace("[1, 2, 3]", "[1, 2]").replace("boundaries: 1/4", "boundaries: 1/2")
    with ray_on_machines(tmp_path, {"head": 0, "alpha": 1, "beta": 1}, serves_jobs=True) as machines:
        home, storage = machines.add("outside").inside("/tmp/home"), machines.shared / "results"
        cluster = {"storage_path": str(storage), "num_workers": 2, "placement": "spread"}
        (home / "tiny.yaml").write_text(f"{grid}plugins: [mine.py]\ncluster: {json.dumps(cluster)}\n{search}")
        (home / "mine.py").write_text(PLUGIN)
        to = ["tiny.yaml", "--address", f"http://{machines.head.address}:{JOBS_PORT}"]
        submitted = [*PROGRAM, "submit", "search", *to]
        with pytest.raises(AssertionError, match="RAY_AUTH_TOKEN"):
            machines.run("outside", submitted, "refused.txt", "/tmp/home", RAY_AUTH_TOKEN="another")
        said = machines.run("outside", submitted, "submitted.txt", "/tmp/home")
        assert "front: trial-00" in said, said
        again = machines.run("outside", [*PROGRAM, "status", *to, "--json"], "status.txt", "/tmp/home")
    trials = [json.loads(path.read_text()) for path in storage.glob("searches/*/trial_*.json")]
    assert [trial["state"] for trial in trials] == ["finished"] * 2
    assert json.loads(again)["status"] == "SUCCEEDED"
