"""Time and worker-hours of a tree: what its training took as measured, and what is left at the speed seen so far."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.plan.jobs import StageJob
from orchestrator.plan.status import TreeStatus
from orchestrator.plan.step_history import read_metrics
from orchestrator.spec.infrastructure import ClusterSpec

# What platform.processor() or platform.machine() call a CPU; a GPU's name is its product's.
_CPU = re.compile(r"x86_64|amd64|i[3-6]86|aarch64|arm\w*|ppc64\w*|s390x|riscv\w*|.*\b(intel|cpu|processor)\b.*", re.I)


def steps_done(job: StageJob, metrics: Mapping[str, Any] | None) -> int:
    """Return the steps of a stage run under way, from the last line of its metrics."""
    step = job.first_step if metrics is None else int(metrics.get("step", job.first_step - 1)) + 1
    return min(max(step, job.first_step), job.last_step) - job.first_step


def is_gpu(device: str) -> bool:
    """Return whether a fingerprint's `device` is a GPU."""
    return bool(device) and _CPU.fullmatch(device) is None


@dataclass
class _Speed:
    """Seconds and work measured of one kind of stage run at one number of workers."""

    seconds: float = 0.0
    work: float = 0.0
    workers: int = 1


def hours_document(status: TreeStatus, work: Mapping[str, float | None], cluster: ClusterSpec) -> dict[str, float]:
    """Return the keys for `totals`; empty where nothing was measured yet and no device's speed is given.

    `gpu_hours_done` (or `worker_hours_done`): hours of all workers, stored work and work under way. Where a speed is
    known also `gpu_hours_left` and `seconds_left` (until the last job is done, evaluations included), and
    `device_tflops` where any of that is estimated by it.

    Args:
        status: What is done, and of which tree.
        work: Stage run to its work in any one unit (TFLOPs); None where that is not known.
        cluster: Lanes, their workers, and the speed of a device, which counts where no stage run of it was measured.
    """
    tree = status.tree
    # Lanes that hold something say more than the spec, which may say `auto`.
    working = {(holder.owner, holder.lane) for holder in status.holders.values()}
    lanes = len(working) or (cluster.lanes if isinstance(cluster.lanes, int) else 1)
    workers = cluster.num_workers if isinstance(cluster.num_workers, int) else cluster.num_workers.min
    speeds: dict[tuple[str, str], _Speed] = {}
    devices: set[str] = set()
    done, rest = 0.0, dict[str, float]()
    for job in tree.stage_runs.values():
        seconds, share, number = _measured(job, status, workers, devices)
        amount = work[job.id] or float((job.last_step - job.first_step) * job.recipe["global_batch_size"])
        done += seconds * number
        if seconds and share:
            speed = speeds.setdefault((job.phase, _model(job)), _Speed())
            speed.seconds, speed.work = speed.seconds + seconds, speed.work + share * amount
            speed.workers = number
        if job.id in status.needed and job.id not in status.blocked:
            rest[job.id] = amount if job.id in status.trained else amount * (1 - share)
    if not done and cluster.device_tflops is None:
        return {}
    unit = "gpu" if (all(map(is_gpu, devices)) if devices else cluster.use_gpu is True) else "worker"
    found = {f"{unit}_hours_done": done / 3600}
    left: dict[str, tuple[float, int]] = {}
    given: dict[str, float] = {}
    for run, amount in rest.items():
        known = _seconds(tree.stage_runs[run], amount, speeds)
        if known is None and cluster.device_tflops is not None and work[run]:
            known = amount / (cluster.device_tflops * workers), workers
            given = {"device_tflops": cluster.device_tflops}
        if known is None:
            return found
        left[run] = known
    found[f"{unit}_hours_left"] = sum(seconds * number for seconds, number in left.values()) / 3600
    found["seconds_left"] = _until_the_end(status, {run: seconds for run, (seconds, _) in left.items()}, lanes)
    return found | given


def _measured(job: StageJob, status: TreeStatus, workers: int, devices: set[str]) -> tuple[float, float, int]:
    """Return the seconds trained, the share of the stage run that they are for, and the workers they were spent on."""
    result = status.ledger.result(job.id) if job.id in status.trained else None
    if result is not None:
        mark = result.get("fingerprint") or {}
        devices.add(str(mark.get("device", "")))
        return float(result.get("train_seconds") or 0.0), 1.0, int(mark.get("world_size") or workers)
    lines = read_metrics(status.ledger.metrics_file(job.id)) if job.id in status.begun else []
    seconds = sum(float(line.get("step_seconds", 0.0)) for line in lines)
    share = steps_done(job, lines[-1] if lines else None) / (job.last_step - job.first_step)
    return seconds, share, workers


def _seconds(job: StageJob, amount: float, speeds: Mapping[tuple[str, str], _Speed]) -> tuple[float, int] | None:
    """Return the seconds and workers for some work, by the speed of its phase, else of its model's other phase."""
    model = _model(job)
    same_model = (speed for (_, other), speed in speeds.items() if other == model)
    speed = speeds.get((job.phase, model)) or next(same_model, None)
    return None if speed is None else (speed.seconds / speed.work * amount, speed.workers)


def _model(job: StageJob) -> str:
    return str(job.model.get("model_name_or_path"))


def _until_the_end(status: TreeStatus, seconds_of: Mapping[str, float], lanes: int) -> float:
    """At least the longest way through what is left, and at least all of it divided by the lanes."""
    tree = status.tree
    done = (job for job in tree.evaluations if status.evaluation(job) == "done")
    measured = [status.ledger.evaluation(job) or {} for job in done]
    each = sum(float(r.get("seconds") or 0.0) for r in measured) / len(measured) if measured else 0.0
    total = longest = 0.0
    ends: dict[str, float] = {}
    for state in tree.order:
        job = tree.stage_runs.get(state)
        begin = ends.get(job.parent, 0.0) if job is not None else 0.0
        tests = [job.id for job in tree.evaluations_of.get(state, ()) if status.evaluation(job.id) != "done"]
        tests = [job for job in tests if job not in status.blocked]
        total += seconds_of.get(state, 0.0) + each * len(tests)
        ends[state] = begin + seconds_of.get(state, 0.0)
        longest = max(longest, ends[state] + each * bool(tests))
    return max(longest, total / max(1, lanes))
