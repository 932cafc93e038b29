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


@dataclass(frozen=True)
class Hours:
    """What training took and what is left of it.

    Attributes:
        unit: `gpu` or `worker`: what an hour is an hour of.
        done: Hours of all workers, summed over what is stored and what is under way.
        left: Hours of all workers still to come; None where no speed is known.
        seconds_left: Until the last job is done, evaluations included, on `lanes` lanes; None as `left`.
        device_tflops: The given speed, where any of what is left is estimated by it; None where all was measured.
    """

    unit: str
    done: float
    left: float | None
    seconds_left: float | None
    device_tflops: float | None = None

    def document(self) -> dict[str, float]:
        """Return the keys for `totals`; what is not known is not there."""
        found = {f"{self.unit}_hours_done": self.done}
        if self.left is not None and self.seconds_left is not None:
            found |= {f"{self.unit}_hours_left": self.left, "seconds_left": self.seconds_left}
            if self.device_tflops is not None:
                found["device_tflops"] = self.device_tflops
        return found


@dataclass
class _Speed:
    """Seconds and work measured of one kind of stage run at one number of workers."""

    seconds: float = 0.0
    work: float = 0.0
    workers: int = 1


def measured_hours(
    standing: TreeStatus,
    work: Mapping[str, float | None],
    lanes: int,
    workers: int,
    device_tflops: float | None = None,
    on_gpu: bool = False,
) -> Hours | None:
    """Return the hours of a tree; None where nothing was measured yet and no device's speed is given.

    Args:
        standing: What is done, and of which tree.
        work: Stage run to its work in any one unit (TFLOPs); None where that is not known.
        lanes: Worker groups side by side.
        workers: Workers of a lane, for what is under way.
        device_tflops: What one worker sustains, in TFLOPs a second; counts where no stage run of it was measured.
        on_gpu: Whether that device is a GPU.
    """
    tree = standing.tree
    speeds: dict[tuple[str, str], _Speed] = {}
    devices: set[str] = set()
    done, rest = 0.0, dict[str, float]()
    for job in tree.stage_runs.values():
        seconds, share, number = _measured(job, standing, workers, devices)
        amount = work[job.id] or float((job.last_step - job.first_step) * job.recipe["global_batch_size"])
        done += seconds * number
        if seconds and share:
            speed = speeds.setdefault((job.phase, _model(job)), _Speed())
            speed.seconds, speed.work = speed.seconds + seconds, speed.work + share * amount
            speed.workers = number
        if job.id in standing.needed and job.id not in standing.blocked:
            rest[job.id] = amount if job.id in standing.trained else amount * (1 - share)
    if not done and device_tflops is None:
        return None
    unit = "gpu" if (all(map(is_gpu, devices)) if devices else on_gpu) else "worker"
    left = {run: _seconds(tree.stage_runs[run], amount, speeds) for run, amount in rest.items()}
    given: float | None = None
    for run, amount in rest.items():
        if left[run] is None and device_tflops is not None and work[run]:
            left[run], given = (amount / (device_tflops * workers), workers), device_tflops
    known = {run: found for run, found in left.items() if found is not None}
    if len(known) < len(left):
        return Hours(unit, done / 3600, None, None)
    hours = sum(seconds * number for seconds, number in known.values()) / 3600
    seconds_of = {run: seconds for run, (seconds, _) in known.items()}
    return Hours(unit, done / 3600, hours, _until_the_end(standing, seconds_of, lanes), given)


def _measured(job: StageJob, standing: TreeStatus, workers: int, devices: set[str]) -> tuple[float, float, int]:
    """Return the seconds trained, the share of the stage run that they are for, and the workers they were spent on."""
    result = standing.ledger.result(job.id) if job.id in standing.trained else None
    if result is not None:
        mark = result.get("fingerprint") or {}
        devices.add(str(mark.get("device", "")))
        return float(result.get("train_seconds") or 0.0), 1.0, int(mark.get("world_size") or workers)
    lines = read_metrics(standing.ledger.metrics_file(job.id)) if job.id in standing.begun else []
    seconds = sum(float(line.get("step_seconds", 0.0)) for line in lines)
    share = steps_done(job, lines[-1] if lines else None) / (job.last_step - job.first_step)
    return seconds, share, workers


def _seconds(job: StageJob, amount: float, speeds: Mapping[tuple[str, str], _Speed]) -> tuple[float, int] | None:
    """Return the seconds and workers for some work: at the speed of its own phase and model, else of the model's
    other phase.
    """
    model = _model(job)
    same = [speeds[job.phase, model]] if (job.phase, model) in speeds else []
    for speed in same or [speed for (_, other), speed in speeds.items() if other == model]:
        return speed.seconds / speed.work * amount, speed.workers
    return None


def _model(job: StageJob) -> str:
    return str(job.model.get("model_name_or_path"))


def _until_the_end(standing: TreeStatus, seconds_of: Mapping[str, float], lanes: int) -> float:
    """At least the longest way through what is left, and at least all of it divided by the lanes."""
    tree = standing.tree
    done = (job for job in tree.evaluations if standing.evaluation(job) == "done")
    measured = [standing.ledger.evaluation(job) or {} for job in done]
    each = sum(float(r.get("seconds") or 0.0) for r in measured) / len(measured) if measured else 0.0
    total = longest = 0.0
    ends: dict[str, float] = {}
    for state in tree.order:
        job = tree.stage_runs.get(state)
        begin = ends.get(job.parent, 0.0) if job is not None else 0.0
        tests = [job.id for job in tree.evaluations_of.get(state, ()) if _is_open(standing, job.id)]
        total += seconds_of.get(state, 0.0) + each * len(tests)
        ends[state] = begin + seconds_of.get(state, 0.0)
        longest = max(longest, ends[state] + each * bool(tests))
    return max(longest, total / max(1, lanes))


def _is_open(standing: TreeStatus, evaluation: str) -> bool:
    return evaluation not in standing.blocked and standing.evaluation(evaluation) != "done"


def hours_document(standing: TreeStatus, work: Mapping[str, float | None], cluster: ClusterSpec) -> dict[str, float]:
    """Return the hours done and left as keys for `totals`; empty where no speed is measured or given."""
    # Lanes that hold something say more than the spec, which may say `auto`.
    working = {(holder.owner, holder.lane) for holder in standing.holders.values()}
    lanes = len(working) or (cluster.lanes if isinstance(cluster.lanes, int) else 1)
    workers = cluster.num_workers if isinstance(cluster.num_workers, int) else cluster.num_workers.min
    hours = measured_hours(standing, work, lanes, workers, cluster.device_tflops, cluster.use_gpu is True)
    return hours.document() if hours is not None else {}
