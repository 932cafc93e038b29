"""What a stage run records: a line of metrics per optimizer step, its result with a fingerprint, and its log file."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orchestrator.machine import processor_name, resident_peak_bytes
from orchestrator.plan.jobs import StageJob
from orchestrator.plan.ledger.files import log_path, storage_errors
from orchestrator.plan.step_history import whole_metrics
from orchestrator.spec.deepspeed import zero_stage
from orchestrator.training import distributed
from orchestrator.training.engine import Session


def peak_memory_gib() -> float:
    """Return the largest memory of any worker since `reset_peak_memory`: GPU memory, or resident memory on the CPU."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_peak_bytes()
    return distributed.reduce_values([peak / 2**30], largest=True)[0]


def fingerprint(job: StageJob, session: Session) -> dict[str, Any]:
    """Return what may change the last bits of a result; it is flagged where two cells of a table differ in it."""
    on_gpu = distributed.device().type == "cuda"
    return {
        "world_size": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "cpu": processor_name(),
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
    """Return `result.json`, computed from the metrics of all steps, so that an interruption does not change it.

    `train_seconds` is the sum over steps (without evaluations and checkpoints); token counts are means per sample;
    `loss` is the last step's.

    Raises:
        StorageError: the metrics lack a step: its time would be missing from the cost, and its point from the curve.
    """
    lines = whole_metrics(metrics_file, job.first_step, job.last_step)
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


LOGGER = logging.getLogger("llavolta.training")
LOGGER.setLevel(logging.INFO)
_LOGGERS = (LOGGER.name, "DeepSpeed", "transformers", "deepspeed", "torch.distributed")
# torch 2.13 warns of DeepSpeed's collectives on every rank and code path.
_KNOWN_NOISE = r".*_all_gather_base.*|.*all_gather_into_tensor.*|.*_reduce_scatter_base.*|.*reduce_scatter_tensor.*"


@contextmanager
def stage_log(work: Path) -> Iterator[None]:
    """Append to this rank's log what DeepSpeed, transformers and torch log inside, instead of to the terminal.

    Args:
        work: The job's work folder.
    """
    work.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_path(work, distributed.rank()), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    before = []
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        before.append((logger, logger.handlers[:], logger.propagate))
        logger.handlers, logger.propagate = [handler], False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_KNOWN_NOISE, category=FutureWarning)
        try:
            yield
        finally:
            for logger, handlers, propagate in before:
                logger.handlers, logger.propagate = handlers, propagate
            handler.close()


class MetricsLog:
    """`metrics.jsonl`: one line of JSON per optimizer step; it is in the file when `append` returns.

    Args:
        path: The file; created if missing.
        first_step: First step of the stage run.
        resume_step: Lines of this step and later ones are removed, as is a line cut short by a crash, so that no step
            is recorded twice.

    Raises:
        StorageError: a step before `resume_step` is missing, or the file cannot be written.
    """

    def __init__(self, path: Path, first_step: int, resume_step: int) -> None:
        self._path = path
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = whole_metrics(path, first_step, resume_step)
            # Written under another name, then renamed: a writer that lost its lease keeps writing where nobody reads.
            part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
            self._file = part.open("a", buffering=1, encoding="utf-8")
            self._file.writelines(json.dumps(line) + "\n" for line in kept)
            self._file.flush()
            os.replace(part, path)

    def append(self, line: dict[str, Any]) -> None:
        """Write one step.

        Raises:
            StorageError: the disk is full.
        """
        with storage_errors(self._path.parent):
            self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Flush the lines to the disk; called before a checkpoint relies on them.

        Raises:
            StorageError: the disk is full.
        """
        with storage_errors(self._path.parent):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
