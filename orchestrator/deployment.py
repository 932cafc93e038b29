"""deploy(): an experiment as files for where it runs: a RayJob of KubeRay, a batch script of SLURM, a task of SkyPilot.

All three start Ray on as many machines as `cluster:` needs, run the experiment there with `cluster.address: auto`, and
start again where it was stopped at a checkpoint. What travels is what `submit` sends.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from orchestrator.dispatch.package import Package, command, package_of
from orchestrator.errors import UsageError
from orchestrator.experiment import Experiment
from orchestrator.spec.infrastructure import ClusterSpec

STOP_SECONDS = 300
"""Seconds before its time is over that a batch system warns: enough for a step and a checkpoint."""
_DRIVER_CPUS = 2
_DRIVER_GIB = 8
_SHARED_MEMORY_GIB = 16
_CONFIG_MAP_BYTES = 1 << 20
_NAME_CHARACTERS = 47  # of a RayJob: KubeRay appends to it
_RAY_PORT = 6379
_WAIT_SECONDS = 600
_MOUNT = "/experiment-files"
_LEAVE_SECONDS = 25  # what Google's spot machines leave a pod
# Run in a pod that is to end: its lane has this long to write a checkpoint and move to other nodes.
_LEAVE = f"""\
timeout {_LEAVE_SECONDS} ray drain-node --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message=pod-ends \\
  --deadline-remaining-seconds={_LEAVE_SECONDS}
while grep -qsa 'ray::RayTrain[W]orker' /proc/[0-9]*/cmdline; do sleep 0.5; done
"""
_DRIVER = "driver.sh"
_LOG = re.compile(r"\d+\.log")


@dataclass(frozen=True)
class Machines:
    """Machines that an experiment's lanes need.

    Attributes:
        nodes: How many.
        cpus: Ray's CPUs of one, without the driver's.
        gpus: GPUs of one.
        memory_bytes: Memory of one; 0 where `cluster.resources_per_worker` does not say.
        custom: Other resources of one, by name.
    """

    nodes: int
    cpus: int
    gpus: int
    memory_bytes: int
    custom: Mapping[str, float]

    def start_options(self) -> dict[str, str]:
        """Return the options of `ray start` that say what a machine has."""
        options = {"num-cpus": str(self.cpus), "num-gpus": str(self.gpus)}
        return options | ({"resources": json.dumps(self.custom)} if self.custom else {})

    def start_words(self) -> str:
        """Return these options for a shell."""
        return " ".join(f"--{key}={shlex.quote(value)}" for key, value in self.start_options().items())


@dataclass(frozen=True)
class _Job:
    """What all three write files from."""

    experiment: Experiment
    package: Package
    machines: Machines
    folder: Path
    image: str
    queue: str | None
    max_hours: float | None
    accelerator: str | None

    @property
    def name(self) -> str:
        """A name that all three take: of the experiment and its content."""
        tail = f"-{self.package.digest[:8]}"
        plain = re.sub(r"[^a-z0-9]+", "-", f"llavolta-{self.experiment.name}".lower())
        return plain[: _NAME_CHARACTERS - len(tail)].strip("-") + tail

    @property
    def command(self) -> str:
        """What a shell does where the files lie."""
        verb = "run" if self.experiment.spec.search is None else "search"
        hours = [] if self.max_hours is None else ["--max-hours", f"{self.max_hours:g}"]
        return command(self.package, verb, self.experiment.loaded.overrides, hours)

    def driver(self, first: str = "") -> str:
        """Return the script that runs the experiment beside the files, where Ray is started."""
        return f'#!/bin/bash\n{first}cd "$(dirname "$0")" || exit 1\n{self.command}\n'

    def comment(self, then: str) -> str:
        """Return the comment that a file begins with."""
        program = f"`llavolta deploy` {version('llavolta-orchestrator')}"
        lines = [
            f"{_one_line(self.experiment.name)}, written by {program}; {then}",
            *(f"Must be there already: {_one_line(each)}" for each in self.package.elsewhere),
        ]
        return "".join(f"# {line}\n" for line in lines)


def deploy(
    target: str,
    experiment: Experiment,
    folder: str | os.PathLike[str],
    *,
    nodes: int = 1,
    image: str | None = None,
    queue: str | None = None,
    max_hours: float | None = None,
    accelerator: str | None = None,
) -> list[Path]:
    """Write what runs an experiment on KubeRay, SLURM or SkyPilot, and return the files, the one to start first.

    Args:
        target: `kuberay`, `slurm` or `skypilot`.
        experiment: The experiment, whose `cluster:` says what it needs.
        folder: Where the files go; created, and must be empty or hold an earlier deployment alone.
        nodes: Machines over which the lanes are divided. With `lanes: auto` each takes a lane of its own where that is
            placed by `pack`, else they share one.
        image: Container image with this package, on KubeRay and SkyPilot; default `llavolta:cuda`, without GPUs
            `llavolta:cpu` (docker/README.md).
        queue: Kueue's queue, or SLURM's partition.
        max_hours: Stops at a checkpoint after so many hours; of SLURM the job's time limit.
        accelerator: Name of the GPU as SkyPilot has it, such as `H100`.

    Raises:
        UsageError: there is no such target, an option does not belong to it or lacks, or the folder is in use.
        SpecError: the experiment names what cannot travel.
    """
    writers: dict[str, Callable[[_Job], dict[str, str]]] = {
        "kuberay": _kuberay,
        "slurm": _slurm,
        "skypilot": _skypilot,
    }
    if target not in writers:
        raise UsageError(f"deploy: there is no target {target!r}; allowed: {', '.join(writers)}")
    if queue is not None and target == "skypilot":
        raise UsageError("deploy skypilot: --queue is of Kueue and SLURM; SkyPilot has none")
    machines = machines_of(experiment.spec.cluster, nodes)
    if target == "skypilot" and machines.gpus and accelerator is None:
        raise UsageError(
            "deploy skypilot: workers need GPUs; say which: --accelerator H100 (`sky gpus list` has names)"
        )
    if accelerator is not None and (target != "skypilot" or not machines.gpus):
        raise UsageError("deploy: --accelerator is for experiments on SkyPilot whose workers use GPUs")
    if image is not None and target == "slurm":
        raise UsageError("deploy slurm: --image is of KubeRay and SkyPilot; the script uses this installation")
    image = image or f"llavolta:{'cuda' if machines.gpus else 'cpu'}"
    place = Path(os.path.abspath(folder))
    job = _Job(experiment, package_of(experiment.loaded), machines, place, image, queue, max_hours, accelerator)
    contents = {name: text.encode() for name, text in writers[target](job).items()}
    if target != "kuberay":  # whose ConfigMap has them
        contents |= {name: file.read_bytes() for name, file in job.package.files.items()}
    return _write(contents, place)


def machines_of(cluster: ClusterSpec, nodes: int) -> Machines:
    """Return what each of so many machines must have for the lanes of an experiment.

    Raises:
        UsageError: there are fewer workers than machines.
    """
    workers = cluster.most_workers
    lanes = cluster.lanes if cluster.lanes != "auto" else nodes if cluster.placement == "pack" else 1
    if lanes * workers < nodes:
        raise UsageError(
            f"deploy: {nodes} nodes for {lanes * workers} workers ({lanes} lanes of {workers}): some would do nothing; "
            "ask for fewer, or raise cluster.lanes or cluster.num_workers"
        )
    each = math.ceil(lanes * workers / nodes)
    wanted = dict(cluster.resources_per_worker)
    cpus, gpus, memory = wanted.pop("CPU", 1.0), wanted.pop("GPU", 0.0), wanted.pop("memory", 0.0)
    if cluster.use_gpu is True:
        gpus = gpus or 1.0
    elif cluster.use_gpu is False:
        gpus = 0.0
    return Machines(
        nodes, math.ceil(each * cpus), math.ceil(each * gpus), math.ceil(each * memory),
        {name: each * amount for name, amount in wanted.items() if amount},
    )  # fmt: skip


def _write(contents: Mapping[str, bytes], folder: Path) -> list[Path]:
    known = {Path(name).parts[0] for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = {each.name for each in folder.iterdir() if not _LOG.fullmatch(each.name)}
        if strange := sorted(there - known):
            raise UsageError(
                f"{folder}: something else is there already: {', '.join(strange[:3])}; name another folder"
            )
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UsageError(f"deploy: {folder}: {error.strerror}") from error
    return [folder / name for name in contents]


def _kuberay(job: _Job) -> dict[str, str]:
    """Return a RayJob and the ConfigMap of the files that it mounts on every pod.

    The head has no room for workers: it holds the driver and the conductor, which its loss takes along. KubeRay then
    starts a new cluster, and the run resumes.
    """
    data = {name: file.read_bytes() for name, file in job.package.files.items()} | {_DRIVER: job.driver().encode()}
    if sum(map(len, data.values())) * 4 // 3 > _CONFIG_MAP_BYTES:
        raise UsageError(
            f"deploy kuberay: what travels is more than the MiB that a ConfigMap takes: {', '.join(sorted(data)[:3])}, "
            "...; put data on the cluster's volume, and name it by its absolute path there"
        )
    keys = {name: f"file-{index}" for index, name in enumerate(sorted(data))}
    config_map: dict[str, Any] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": job.name}}
    for name, content in data.items():
        try:
            config_map.setdefault("data", {})[keys[name]] = content.decode()
        except UnicodeDecodeError:
            config_map.setdefault("binaryData", {})[keys[name]] = base64.b64encode(content).decode()
    machines, cluster = job.machines, job.experiment.spec.cluster
    volumes: list[dict[str, Any]] = [
        {"name": "files", "configMap": {"name": job.name, "items": [{"key": k, "path": n} for n, k in keys.items()]}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{_SHARED_MEMORY_GIB}Gi"}},
    ]
    mounts = [{"name": "files", "mountPath": _MOUNT}, {"name": "shared-memory", "mountPath": "/dev/shm"}]
    storage = str(cluster.storage_path)
    if "://" not in storage:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": "llavolta-storage"}})
        mounts.append({"name": "storage", "mountPath": storage})

    def pod(name: str, cpus: int, memory: str | None, gpus: int = 0) -> dict[str, Any]:
        limits: dict[str, Any] = {"nvidia.com/gpu": gpus} if gpus else {}
        resources = {"requests": {"cpu": cpus, **({"memory": memory} if memory else {}), **limits}, "limits": limits}
        container = {
            "name": name, "image": job.image, "resources": resources, "volumeMounts": mounts,
            # The bucket's keys, HF_TOKEN, MLFLOW_TRACKING_URI and _TOKEN: of a Secret that is not written here.
            "envFrom": [{"secretRef": {"name": "llavolta-environment", "optional": True}}],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }  # fmt: skip
        spec = {"containers": [container], "volumes": volumes, "automountServiceAccountToken": False}
        security = {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001}
        return {"spec": {**spec, "securityContext": security}}

    head = pod("ray-head", _DRIVER_CPUS, f"{_DRIVER_GIB}Gi")
    head["spec"]["restartPolicy"] = "Never"  # SidecarMode: the submitter lives in this pod
    start = {key: _double_quoted(value) for key, value in machines.start_options().items()}
    memory = f"{math.ceil(machines.memory_bytes / 2**20)}Mi" if machines.memory_bytes else None
    worker = pod("ray-worker", machines.cpus, memory, machines.gpus)
    worker["spec"]["terminationGracePeriodSeconds"] = _LEAVE_SECONDS
    worker["spec"]["containers"][0]["lifecycle"] = {"preStop": {"exec": {"command": ["bash", "-c", _LEAVE]}}}
    workers = {
        "groupName": "workers", "replicas": machines.nodes, "minReplicas": machines.nodes,
        "maxReplicas": machines.nodes, "rayStartParams": start,
        "template": worker,
    }  # fmt: skip
    metadata: dict[str, Any] = {"name": job.name}
    metadata |= {"labels": {"kueue.x-k8s.io/queue-name": job.queue}} if job.queue else {}
    ray_job = {
        "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata,
        "spec": {
            "submissionMode": "SidecarMode",
            "entrypoint": f"bash {_MOUNT}/{_DRIVER}",  # a file, since the text would be unquoted twice on its way
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            **({"suspend": True} if job.queue else {}),
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "num-gpus": "0"}, "template": head},
                "workerGroupSpecs": [workers],
            },
        },
    }  # fmt: skip
    claim = "\n# Claim llavolta-storage is the storage, with access mode ReadWriteMany." if "://" not in storage else ""
    about = job.comment(
        "start it with `kubectl apply -f rayjob.yaml`.\n# KubeRay 1.6 or later. Applied again once it has ended "
        "(`kubectl delete` first), it resumes.\n# Secret llavolta-environment, where there is one, is the environment "
        "of every container." + claim,
    )
    return {"rayjob.yaml": about + yaml.dump_all([config_map, ray_job], Dumper=_Plain, sort_keys=False, width=120)}


def _slurm(job: _Job) -> dict[str, str]:
    """Return a batch script: `ray symmetric-run` in one step, warned before its time ends, requeued on exit 75."""
    machines, hours = job.machines, job.max_hours
    minutes = None if hours is None else math.ceil(hours * 60) + 2 * STOP_SECONDS // 60
    asked = {
        "job-name": job.name, "nodes": machines.nodes, "ntasks-per-node": 1,
        "cpus-per-task": machines.cpus + _DRIVER_CPUS,
        "gpus-per-node": machines.gpus or None,
        "mem": f"{math.ceil(machines.memory_bytes / 2**20)}M" if machines.memory_bytes else None,
        "partition": job.queue, "time": minutes,
        "exclusive": True,  # Ray starts on a node once
        "signal": f"B:USR1@{STOP_SECONDS}", "requeue": True, "open-mode": "append",
        "chdir": str(job.folder), "output": str(job.folder / "%j.log"),
    }  # fmt: skip
    lines = [
        f"#SBATCH --{key}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for key, value in asked.items()
        if value is not None
    ]
    body = _SLURM.format(
        about=job.comment(
            "start it with `sbatch run.sbatch`.\n# This folder, the storage and the installation are on disks that all "
            "nodes share.",
        ),
        options="\n".join(lines),
        bin=shlex.quote(str(Path(sys.executable).parent)),
        port=_RAY_PORT,
        wait=_WAIT_SECONDS,
        nodes=machines.nodes,
        start=machines.start_words(),
    )
    return {"run.sbatch": body, _DRIVER: job.driver('echo $$ > "$driver"\n')}


_SLURM = """\
#!/bin/bash
{about}{options}
set -u
export PATH={bin}:$PATH
export RAY_AUTH_MODE=token RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={wait}
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
driver=$(mktemp)
export driver

# The driver's script writes its process number into $driver: Ray's command passes no signal on.
srun ray symmetric-run --address "$head:{port}" --min-nodes {nodes} {start} -- bash driver.sh &
step=$!
requeue=no
trap 'requeue=yes; kill -USR1 "$(cat "$driver")"' USR1
trap 'kill -TERM "$(cat "$driver")"' TERM
wait "$step"; code=$?
while kill -0 "$step" 2> /dev/null; do wait "$step"; code=$?; done
rm -f "$driver"
# 75: stopped at a checkpoint. Requeued, it resumes.
if [ "$code" = 75 ] && [ "$requeue" = yes ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def _skypilot(job: _Job) -> dict[str, str]:
    """Return a task: every node runs the same script, the first one the experiment too."""
    machines = job.machines
    resources: dict[str, Any] = {"cpus": f"{machines.cpus + _DRIVER_CPUS}+", "image_id": f"docker:{job.image}"}
    if machines.memory_bytes:
        resources["memory"] = f"{math.ceil(machines.memory_bytes / 2**30)}+"
    if machines.gpus:
        resources["accelerators"] = f"{job.accelerator}:{machines.gpus}"
    resources["job_recovery"] = {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
    task = {
        "name": job.name,
        "num_nodes": machines.nodes,
        "resources": resources,
        "workdir": ".",
        "envs": {"RAY_AUTH_MODE": "token", "MLFLOW_TRACKING_URI": "", "HF_TOKEN": ""},
        "secrets": {"RAY_AUTH_TOKEN": None},
        "run": _SKYPILOT.format(port=_RAY_PORT, start=machines.start_words(), wait=_WAIT_SECONDS, command=job.command),
    }
    about = job.comment(
        "start it in this folder with\n#   sky jobs launch task.yaml --secret RAY_AUTH_TOKEN=$(openssl rand -hex 32)\n"
        "# A bucket's keys are those of the cloud's own account; MLFLOW_TRACKING_URI and HF_TOKEN are set by --env.\n"
        f"# SkyPilot sets up its own services in the container, as root or by sudo: build one FROM {job.image} for it.",
    )
    return {"task.yaml": about + yaml.dump(task, Dumper=_Plain, sort_keys=False, width=120)}


_SKYPILOT = """\
set -u
test -n "$MLFLOW_TRACKING_URI" || unset MLFLOW_TRACKING_URI
test -n "$HF_TOKEN" || unset HF_TOKEN
head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
export RAY_ADDRESS="$head:{port}"   # not SkyPilot's own Ray, which runs on these machines too
if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
  until ray start --address="$RAY_ADDRESS" {start} --disable-usage-stats --block; do sleep 5; done
  exit 0
fi
ray start --head --port={port} --dashboard-port=8266 {start} --disable-usage-stats || exit 1
python - "$SKYPILOT_NUM_NODES" <<'END' || exit 1
import sys, time, ray
ray.init(logging_level="ERROR")
deadline = time.monotonic() + {wait}
while (there := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    if time.monotonic() > deadline:
        sys.exit(f"{{there}} of {{sys.argv[1]}} nodes joined")
    time.sleep(2)
END
{command}
"""


class _Plain(yaml.SafeDumper):
    """Writes texts of several lines as they are read, and everything where it belongs, without aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Plain.add_representer(str, _Plain.represent_str)


def _one_line(text: str) -> str:
    """Return a text of the experiment's for a comment: what follows a line's end there would be run."""
    return " ".join(text.split())


def _double_quoted(value: str) -> str:
    """Return a text for the shell command that KubeRay makes of the parameters."""
    return value if value.isalnum() else json.dumps(value)
