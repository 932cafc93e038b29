"""`run` with its storage in a bucket of a real S3 server: the same numbers as in a folder, from any machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.backends.s3 import S3Backend

Llavolta = Callable[..., subprocess.CompletedProcess[str]]
CELL = "schedule=two_stage"


@pytest.fixture
def spec(tmp_path: Path, tiny_text: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cell of two stage runs, in a bucket; this machine's copy lies in `cache`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tiny_text.replace("[full, heavy, two_stage]", "[two_stage]").replace("max_steps: 6", "max_steps: 12")
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{text}cluster: {{storage_path: {bucket}/runs, checkpoint_every: 2}}\n")
    return path


def what_came_of(walk: ExperimentPlan) -> dict[str, Any]:
    """Everything a run's numbers stand in: weights bit for bit, curves, scores."""
    (cell,) = walk.cells
    ledger, found = walk.ledger, dict[str, Any]()
    for job in walk.jobs_of(cell):
        if ledger.is_done(job):
            found[job] = (ledger.fetch(job, "weights") / "model.safetensors").read_bytes()
            if job in walk.tree.stage_runs:
                lines = [json.loads(line) for line in ledger.metrics_file(job).read_text().splitlines()]
                found[f"curve of {job}"] = [(line["step"], line["loss"], line["learning_rate"]) for line in lines]
        evaluation = ledger.evaluation(job)
        if evaluation is not None:
            found[job] = evaluation["metrics"]
    return found


def in_a_folder(spec: Path, llavolta: Llavolta, *options: str) -> dict[str, Any]:
    setting = f"cluster.storage_path={spec.parent / 'folder'}"
    result = llavolta("run", spec, "--set", setting, *options)
    assert result.returncode == 0, result.stderr
    return what_came_of(prepare(spec, [setting]))


def killed_after_a_checkpoint(spec: Path, store: S3Backend, *options: str) -> None:
    """Runs until the bucket holds an in-stage checkpoint, then kills the driver and what it started."""
    with open(spec.parent / "killed.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "run", str(spec), *options],
            cwd=spec.parent,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    while not any(re.fullmatch(r"work/[0-9a-f]+/step_[0-9]+\.json", key) for key in store.sizes("work")):
        assert process.poll() is None, (spec.parent / "killed.txt").read_text()
    machine = psutil.Process(process.pid)
    for each in (machine, *machine.children(recursive=True)):  # a worker that lives on would end its stage run
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def goes_on(spec: Path, tmp_path: Path, store: S3Backend, llavolta: Llavolta, *options: str) -> dict[str, Any]:
    """A killed run, gone on with on a machine that knows nothing of it."""
    killed_after_a_checkpoint(spec, store, *options)
    shutil.rmtree(tmp_path / "cache")
    began_ms = time.time() * 1000
    assert "continues at step" in json.dumps(json.loads(llavolta("plan", spec, "--json").stdout)["cells"])
    result = llavolta("run", spec, *options)
    assert result.returncode == 0, result.stderr
    walk = prepare(spec)
    curves = [walk.ledger.metrics_file(job).read_text().splitlines() for job in walk.tree.stage_runs]
    times = [json.loads(line)["timestamp_ms"] for lines in curves for line in lines]
    assert len(times) == 12 and sum(moment < began_ms for moment in times) >= 2  # what was trained before was kept
    assert store.names("leases") == []
    return what_came_of(walk)


def test_a_killed_run_goes_on_from_the_bucket(spec: Path, tmp_path: Path, bucket: str, llavolta: Llavolta) -> None:
    store = S3Backend(f"{bucket}/runs")
    found = goes_on(spec, tmp_path, store, llavolta, "--local")
    assert len(found) == 2 + 3 + 1  # curves, the root's and the stage runs' weights, scores
    assert found == in_a_folder(spec, llavolta, "--local")
    shutil.rmtree(tmp_path / "cache")
    again = llavolta("run", spec)
    assert again.returncode == 0 and "nothing to do" in again.stdout and CELL in again.stdout
    for secret in ("a-key", "a-secret-of-tests"):
        assert secret not in again.stdout + again.stderr
    pointer = json.loads(store.read(f"cells/tiny/{CELL}.json") or b"")
    key = pointer["files"]["weights/model.safetensors"].removeprefix(f"{bucket}/runs/")
    data = store.read(key)
    assert data == found[pointer["state"]]
    path = llavolta("path", spec, "--cell", CELL)
    assert (Path(path.stdout.strip()) / "model.safetensors").read_bytes() == data
    shutil.rmtree(tmp_path / "cache")
    store.write(key, data[:-1] + bytes([data[-1] ^ 1]))
    damaged = llavolta("path", spec, "--cell", CELL)
    assert damaged.returncode == 1 and "must be trained again" in damaged.stderr and "Traceback" not in damaged.stderr


@pytest.mark.slow
def test_a_killed_run_in_lanes_goes_on_from_the_bucket(
    spec: Path, tmp_path: Path, bucket: str, llavolta: Llavolta
) -> None:
    found = goes_on(spec, tmp_path, S3Backend(f"{bucket}/runs"), llavolta)
    assert found == in_a_folder(spec, llavolta)


def test_a_storage_that_cannot_be_reached_is_said(spec: Path, llavolta: Llavolta) -> None:
    for environment, said in (
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}, "see that the server can be reached"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "boto3 found no complete AWS credentials"),
        ({"LLAVOLTA_STORAGE": "gs://bucket/runs"}, "name a folder (local or NFS) or s3://bucket/prefix"),
    ):
        settings = ("--set", "cluster.storage_path=null") if "LLAVOLTA_STORAGE" in environment else ()
        result = llavolta("plan", spec, *settings, **environment)
        assert result.returncode in (1, 2) and said in result.stderr and "Traceback" not in result.stderr


def test_the_bucket_of_another_prefix_is_another_storage(bucket: str) -> None:
    assert Ledger(f"{bucket}/one").storage != Ledger(f"{bucket}/two").storage
