"""What a stage run reports about itself: time, tokens, memory, and the fingerprint of how it was computed."""

from __future__ import annotations

import contextlib
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orchestrator.plan.jobs import StageJob
from orchestrator.training import group
from orchestrator.training.deepspeed_config import zero_stage
from orchestrator.training.memory import Session
from orchestrator.training.spool import read_metrics

_GIB = 2**30


def reset_peak_memory() -> None:
    """Start the peak anew, so that a stage run is not charged for the one before it in the same process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gib() -> float:
    """Return the largest memory of any worker since `reset_peak_memory`: GPU memory, or resident memory on the CPU."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / _GIB
    else:
        peak = resident_peak_bytes() / _GIB
    return group.reduce_values([peak], largest=True)[0]


def resident_peak_bytes() -> int:
    """Return the largest resident memory of this process since `reset_peak_memory`."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _processor() -> str:
    """Return the processor's model, which decides what its kernels round; its architecture where the system does not
    say.
    """
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def fingerprint(job: StageJob, session: Session) -> dict[str, Any]:
    """Return how it was computed: what may move the last bits, and is flagged where two cells in one table differ."""
    on_gpu = group.device().type == "cuda"
    return {
        "world_size": group.world_size(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "zero_stage": zero_stage(session.config),
        "offload": "offload_optimizer" in session.config.get("zero_optimization", {}),
        "dtype": str(session.compute_dtype).removeprefix("torch."),
        "micro_batch_size": session.micro_batches.shown(),
        "gradient_checkpointing": bool(job.recipe["gradient_checkpointing"]),
        "attn_implementation": job.model.get("attn_implementation"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")},
    }


def stage_result(job: StageJob, metrics_file: Path, peak_gib: float, marks: dict[str, Any]) -> dict[str, Any]:
    """result.json, computed from the step lines, so that an interrupted stage run reports like one left alone.

    `train_seconds` is the sum of the steps' seconds (no evaluation, no checkpoint); token figures are means per
    sample; `loss` is the last step's.
    """
    lines = [line for line in read_metrics(metrics_file) if job.first_step <= line["step"] < job.last_step]
    seconds = sum(line["step_seconds"] for line in lines)
    samples = sum(line["samples_per_second"] * line["step_seconds"] for line in lines)

    def mean(key: str) -> float:
        return sum(line[key] for line in lines) / max(1, len(lines))

    return {
        "id": job.id,
        "steps": job.last_step - job.first_step,
        "train_seconds": seconds,
        "peak_memory_gib": peak_gib,
        "samples_per_second": samples / seconds if seconds else 0.0,
        "loss": lines[-1]["loss"] if lines else None,
        "visual_tokens": mean("visual_tokens"),
        "text_tokens": mean("text_tokens"),
        "label_tokens": mean("label_tokens"),
        "fingerprint": marks,
    }
