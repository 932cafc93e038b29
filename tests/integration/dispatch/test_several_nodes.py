"""Several nodes for real: machines with addresses and files of their own, which share one folder or a bucket."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import Machines, address_of, ray_on_machines
from PIL import Image
from program import PROGRAM
from repository import SUPPORT

pytestmark = pytest.mark.slow  # a Ray on each of three machines: minutes, and beside another test it may not start
BUCKET_PORT = 5000
BUCKET_ACCESS = {
    "AWS_ENDPOINT_URL_S3": f"http://{address_of(0)}:{BUCKET_PORT}",
    "AWS_ACCESS_KEY_ID": "a-key",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
PLUGIN = """
from typing import ClassVar, Literal

from orchestrator.plugin import CompressorSpec


class UnusedSpec(CompressorSpec):
    implementation: ClassVar[str] = "orchestrator_plugins.compressors.average_pool:AveragePool"
    points: ClassVar[tuple[str, ...]] = ("decoder",)

    kind: Literal["unused"] = "unused"
"""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A head that trains nothing, and two nodes of two CPUs."""
    num_cpus = {"head": 0, "alpha": 2, "beta": 2}
    more = {**BUCKET_ACCESS, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    with ray_on_machines(tmp_path_factory.mktemp("machines"), num_cpus, **more) as found:
        yield found


@pytest.fixture(scope="module")
def grid(tiny_text: str) -> str:
    """Two cells that share a stage run, for two workers a lane."""
    return tiny_text.replace("[full, heavy, two_stage]", "[heavy, two_stage]")


def write(machines: Machines, name: str, text: str, **cluster: Any) -> Path:
    """An experiment in the folder that all machines share."""
    path = machines.shared / f"{name}.yaml"
    path.write_text(text + f"cluster: {json.dumps({'num_workers': 2, 'checkpoint_every': 2, **cluster})}\n")
    return path


def run(machines: Machines, name: str, text: str, **cluster: Any) -> tuple[dict[str, Any], set[str]]:
    """Runs it in the cluster; the numbers that came of it, weights bit for bit, and the nodes that had workers."""
    storage = machines.shared / name
    path = write(machines, name, text, storage_path=str(storage), address=machines.address, **cluster)
    used = run_and_watch(machines, path)
    weights = {file.parts[-3]: file.read_bytes() for file in storage.glob("cells/tiny/*/weights/model.safetensors")}
    scores = {file.stem: json.loads(file.read_text())["metrics"] for file in storage.glob("evaluations/*.json")}
    assert len(weights) == 2 and len(scores) == 3
    return {"weights": weights, "scores": scores}, used


def run_and_watch(machines: Machines, path: Path) -> set[str]:
    """Runs an experiment on the head; the nodes on which a worker was seen."""
    process, used = machines.start("head", [*PROGRAM, "run", path], "run.txt"), set[str]()
    while process.poll() is None:
        for node in ("alpha", "beta"):
            used |= {node} if machines.has_process(node, "ray::RayTrainWorker") else set()
            assert not machines.has_process(node, "ray::Conductor")  # it would be lost with that node
        time.sleep(0.5)
    assert process.returncode == 0, machines.printed("run.txt")
    return used


@pytest.fixture(scope="module")
def on_one_node(machines: Machines, grid: str) -> dict[str, Any]:
    """What a lane whose workers share a node ends with."""
    found, used = run(machines, "one", grid.replace("zero0", "zero2"), placement="pack")
    assert len(used) == 1
    return found


def test_what_a_node_lacks_is_said_at_once_by_node_and_path(machines: Machines, tiny_text: str) -> None:
    home = Path("/tmp/home")
    for name in ("head", "alpha", "beta"):
        images = machines[name].inside(home / "images")
        images.mkdir()
        Image.new("RGB", (64, 64)).save(images / "one.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "black"}]
        rows = [{"id": str(number), "image": "one.png", "conversations": turns} for number in range(16)]
        machines[name].inside(home / "rows.json").write_text(json.dumps(rows))
        machines[name].inside(home / "mine.py").write_text(PLUGIN)
    shutil.rmtree(machines["beta"].inside(home / "images"))
    machines["beta"].inside(home / "mine.py").write_text(f"{PLUGIN}\n# another day's\n")
    text = tiny_text.replace("name: tiny\n", f"name: tiny\nplugins: [{home}/mine.py]\n")
    data = f"{{kind: llava_json, data_path: {home}/rows.json, image_folder: {home}/images}}"
    text = text.replace("{kind: easy_vqa, split: train, max_samples: 200}", data)
    path = write(machines, "lacking", text, storage_path=f"{home}/runs", address=machines.address)
    process = machines.start("head", [*PROGRAM, "run", path], "lacking.txt")
    assert process.wait(timeout=400) == 2
    alpha, beta = (f"    node {name} ({machines[name].address}): " for name in ("alpha", "beta"))
    unshared = (
        "empty or missing here; cluster.storage_path must be one folder that all nodes see, or s3://bucket/prefix"
    )
    assert machines.printed("lacking.txt").splitlines()[-6:] == [
        "error: cluster: 2 of 2 nodes cannot do what this run asks of them; nothing was started",
        f"{alpha}{home}/runs: {unshared}",
        f"{beta}{home}/mine.py: the plug-in's source is not the driver's",
        f"{beta}{home}/images: no such folder",
        f"{beta}{home}/runs: {unshared}",
        "    hint: every node needs the program, its packages, plug-ins, models and data as the driver has them, at "
        "the same paths, and the one storage",
    ]


def test_workers_on_two_nodes_meet(machines: Machines) -> None:
    storage = machines.shared / "meet"
    cluster = {"address": machines.address, "num_workers": 2, "use_gpu": False, "placement": "spread"}
    driver = [sys.executable, SUPPORT / "ray_driver.py", json.dumps(cluster), storage, "lane_jobs:meet"]
    assert machines.run("head", driver, "meet.txt").splitlines()[-1] == "('job0',)"
    assert [(storage / "marks" / f"rank{rank}").read_text() for rank in (0, 1)] == ["alpha beta"] * 2


def test_the_grid_in_a_lane_across_two_nodes(machines: Machines, grid: str, on_one_node: dict[str, Any]) -> None:
    text = grid.replace("zero0", "zero2")
    assert run(machines, "spread", text, placement="spread") == (on_one_node, {"alpha", "beta"})


def test_zero3_in_a_lane_across_nodes_and_in_two_lanes_at_once(machines: Machines, grid: str) -> None:
    text = grid.replace("zero0", "zero3")
    alone, used = run(machines, "pack3", text, placement="pack")
    assert len(used) == 1
    assert run(machines, "spread3", text, placement="spread") == (alone, {"alpha", "beta"})
    assert run(machines, "lanes3", text, placement="pack", lanes=2) == (alone, {"alpha", "beta"})


def test_a_bucket_instead_of_a_shared_folder(machines: Machines, grid: str, on_one_node: dict[str, Any]) -> None:
    server = [sys.executable, "-m", "moto.server", "--host", machines.head.address, "--port", str(BUCKET_PORT)]
    machines.start("head", server, "bucket.txt")
    while "Running on" not in machines.printed("bucket.txt"):
        time.sleep(0.1)
    machines.run(
        "head", [sys.executable, "-c", "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"], "b.txt"
    )
    text = grid.replace("zero0", "zero2")
    path = write(machines, "s3", text, storage_path="s3://bucket/runs", address=machines.address, placement="spread")
    assert run_and_watch(machines, path) == {"alpha", "beta"}
    for cell, weights in on_one_node["weights"].items():
        place = machines.run("head", [*PROGRAM, "path", path, "--cell", cell], "path.txt").strip()
        assert machines.head.inside(f"{place}/model.safetensors").read_bytes() == weights
    table = json.loads(machines.run("head", [*PROGRAM, "table", path, "--json"], "table.txt"))
    assert len(table["rows"]) == 2
