"""deploy: what is written fits the published schemas, and holds the experiment as it was."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

import orchestrator as llv
from orchestrator.deployment import Machines, machines_of
from orchestrator.spec.infrastructure import ClusterSpec

KUBERNETES = "1.33"
# Of KubeRay's Go types (ray-operator/apis/ray/v1), as far as what is written may use them.
RAY_JOB = {
    "submissionMode", "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "suspend",
    "rayClusterSpec", "activeDeadlineSeconds", "runtimeEnvYAML", "metadata", "jobId",
}  # fmt: skip
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}
GIB = 2**30
GPUS = {"CPU": 4, "GPU": 1, "memory": 8 * GIB, "fast disk": 2}
NO_GPU = {"num_workers": 3, "resources_per_worker": {"CPU": 2, "GPU": 1}, "use_gpu": False}
TWO_LANES = {"lanes": 2, "num_workers": 4, "resources_per_worker": GPUS}
AUTO = {"lanes": "auto", "num_workers": 8, "resources_per_worker": GPUS}


@pytest.fixture
def experiment(tiny_experiment: Path, built_in_only: None) -> llv.Experiment:
    """The tiny experiment for two lanes of four GPUs, with a plug-in beside it and data at an absolute path."""
    (tiny_experiment.parent / "mine.py").write_bytes(PLUGIN)
    text = tiny_experiment.read_text().replace("per_device_train_batch_size: 8", "per_device_train_batch_size: 4")
    cluster = f"cluster: {{lanes: 2, num_workers: 4, use_gpu: true, resources_per_worker: {json.dumps(GPUS)}}}"
    tiny_experiment.write_text(f"{text}plugins: [mine.py]\n{cluster}\n")
    return llv.load(tiny_experiment, ["cluster.storage_path=/nfs/my runs"])


PLUGIN = b"""
from typing import Literal
from orchestrator_plugins.data.easy_vqa import EasyVqaSpec

class DeployedSpec(EasyVqaSpec):
    '''easy_vqa under another name.'''
    kind: Literal["deployed"] = "deployed"
"""


@pytest.mark.parametrize(
    ("cluster", "nodes", "machines"),
    [
        ({}, 1, Machines(1, 1, 0, 0, {})),
        (TWO_LANES, 2, Machines(2, 16, 4, 32 * GIB, {"fast disk": 8})),
        (AUTO, 3, Machines(3, 32, 8, 64 * GIB, {"fast disk": 16})),
        ({"lanes": "auto", "num_workers": 4, "placement": "spread", "use_gpu": True}, 2, Machines(2, 2, 2, 0, {})),
        ({"num_workers": 3, "resources_per_worker": {"CPU": 0.5, "GPU": 0.5}}, 2, Machines(2, 1, 1, 0, {})),
        (NO_GPU, 2, Machines(2, 4, 0, 0, {})),
    ],
)  # fmt: skip
def test_machines_hold_the_lanes(cluster: dict, nodes: int, machines: Machines) -> None:
    assert machines_of(ClusterSpec.model_validate(cluster), nodes) == machines


def test_kuberay_fits_the_schemas_and_mounts_the_experiment(experiment: llv.Experiment, tmp_path: Path) -> None:
    (file,) = llv.deploy("kuberay", experiment, tmp_path / "deployed", nodes=2, queue="research", max_hours=2)
    config_map, job = yaml.safe_load_all(file.read_text())
    kubernetes_validate.validate(config_map, KUBERNETES, strict=True)
    assert job["kind"] == "RayJob" and job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert spec.keys() <= RAY_JOB and cluster.keys() <= RAY_CLUSTER and workers.keys() <= GROUP
    assert spec["suspend"] and spec["submissionMode"] == "SidecarMode" and cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], workers):
        assert group.keys() <= GROUP and all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert cluster["headGroupSpec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    (container,) = workers["template"]["spec"]["containers"]
    leave = container["lifecycle"]["preStop"]["exec"]["command"]
    subprocess.run(["bash", "-n", "-c", leave[2]], check=True)  # what it does: tests/faults/test_lost_nodes.py
    assert workers["replicas"] == 2 and container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    told = subprocess.run(
        ["bash", "-c", f"printf %s {workers['rayStartParams']['resources']}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout) == {"fast disk": 8}, "as the shell passes it on"

    mounted = tmp_path / "mounted"
    (volume,) = [each["configMap"] for each in workers["template"]["spec"]["volumes"] if "configMap" in each]
    for item in volume["items"]:
        path = mounted / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        binary = config_map.get("binaryData", {}).get(item["key"])
        path.write_bytes(config_map["data"][item["key"]].encode() if binary is None else base64.b64decode(binary))
    assert spec["entrypoint"] == "bash /experiment-files/driver.sh"
    assert said(mounted, "llavolta") == [str(mounted / "experiment"), *WORDS]


WORDS = [
    "run", "tiny.yaml", "--set", "cluster.storage_path=/nfs/my runs", "--set", "cluster.address=auto", "--max-hours",
    "2",
]  # fmt: skip


def said(folder: Path, program: str) -> list[str]:
    """Where and with which words the driver's script starts the program; as a real one it loads the experiment."""
    bin_ = folder / "bin"
    bin_.mkdir()
    (bin_ / program).write_text('#!/bin/sh\npwd\nfor word; do echo "$word"; done\n')
    (bin_ / program).chmod(0o755)
    env = {"PATH": f"{bin_}:/usr/bin:/bin", "driver": str(folder / "number")}
    done = subprocess.run(["bash", folder / "driver.sh"], env=env, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert (folder / "experiment" / "mine.py").read_bytes() == PLUGIN
    assert (folder / "experiment" / "tiny.yaml").is_file()
    return words


def test_slurm_asks_for_the_machines_and_starts_the_experiment(experiment: llv.Experiment, tmp_path: Path) -> None:
    folder = tmp_path / "with a blank"
    file, driver, *_ = llv.deploy("slurm", experiment, folder, nodes=2, queue="gpu", max_hours=2)
    assert (file.name, driver.name) == ("run.sbatch", "driver.sh")
    subprocess.run(["bash", "-n", file], check=True)
    lines = file.read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    before = lines[: lines.index("#SBATCH --requeue")]
    assert all(line.startswith("#") for line in before), "SLURM reads options up to the first command"
    assert {
        "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=18", "--gpus-per-node=4", "--mem=32768M",
        "--partition=gpu", "--time=130", "--signal=B:USR1@300", "--requeue", f"--chdir='{folder}'",
    } <= set(asked)  # fmt: skip
    assert said(folder, "llavolta") == [str(folder / "experiment"), *WORDS]
    assert int((folder / "number").read_text()) > 1


def test_no_text_of_the_experiment_leaves_its_comment(tiny_experiment: Path, tmp_path: Path) -> None:
    hostile = '{kind: llava_json, data_path: "/x\\ntouch hacked\\nx.json"}'
    sets = ["cluster.storage_path=/nfs/runs", f"data.hostile={hostile}"]
    for target in ("slurm", "kuberay", "skypilot"):
        file, *_ = llv.deploy(target, llv.load(tiny_experiment, sets), tmp_path / target)
        lines = file.read_text().splitlines()
        assert any(line.startswith("# Must be there already: ") and "touch hacked" in line for line in lines)
        assert not any(line.strip().startswith("touch hacked") for line in lines)


def test_skypilot_fits_the_schema(experiment: llv.Experiment, tmp_path: Path) -> None:
    schemas = json.loads(Path(__file__).with_name("skypilot_schema.json").read_text())
    file, *_ = llv.deploy("skypilot", experiment, tmp_path / "deployed", nodes=2, accelerator="H100")
    task = yaml.safe_load(file.read_text())
    jsonschema.validate(task, schemas["task"])
    jsonschema.validate(task["resources"], schemas["resources"])
    assert task["resources"]["accelerators"] == "H100:4" and task["num_nodes"] == 2
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert task["run"].endswith(f"cd experiment && exec llavolta {shlex.join(WORDS[:-2])}\n")


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        ("nomad", {}, "there is no target 'nomad'; allowed: kuberay, slurm, skypilot"),
        ("slurm", {"image": "x"}, "--image is of KubeRay and SkyPilot"),
        ("skypilot", {}, "say which: --accelerator H100"),
        ("skypilot", {"accelerator": "H100", "queue": "x"}, "SkyPilot has none"),
        ("kuberay", {"accelerator": "H100"}, "--accelerator is for experiments on SkyPilot"),
        ("kuberay", {"nodes": 9}, "9 nodes for 8 workers"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    experiment: llv.Experiment, tmp_path: Path, target: str, options: dict, told: str
) -> None:
    with pytest.raises(llv.UsageError, match=re.escape(told)):
        llv.deploy(target, experiment, tmp_path / "deployed", **options)
    assert not (tmp_path / "deployed").exists()


def test_a_folder_in_use_and_files_too_large_are_refused(experiment: llv.Experiment, tmp_path: Path) -> None:
    folder = tmp_path / "deployed"
    llv.deploy("slurm", experiment, folder)
    (folder / "123.log").touch()  # what a job of it wrote
    llv.deploy("slurm", experiment, folder)
    (folder / "thesis.tex").touch()
    with pytest.raises(llv.UsageError, match=r"something else is there already: thesis\.tex"):
        llv.deploy("slurm", experiment, folder)
    (tmp_path / "mine.py").write_bytes(PLUGIN + b"#" * 2**20)
    with pytest.raises(llv.UsageError, match="more than the MiB that a ConfigMap takes"):
        llv.deploy("kuberay", experiment, tmp_path / "other")


def test_an_experiment_whose_results_would_be_lost_is_refused(tiny_experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(llv.SpecError, match="says where its results go"):
        llv.deploy("slurm", llv.load(tiny_experiment), tmp_path / "deployed")
