"""Runs one job on one worker: writes initial weights, trains a stage, rehearses, or evaluates a state.

Only workers import this module, and with it torch and DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from orchestrator import registry
from orchestrator.dispatch.rehearsal import check_rehearsed, model_for_evaluation, rehearse
from orchestrator.evaluation.evaluate import evaluate_state
from orchestrator.models.initial_weights import write_initial_weights, write_start_weights
from orchestrator.plan.identity import share_caches
from orchestrator.plan.jobs import Job, RehearsalJob, RootJob, StageJob, StartJob, job_to_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import write_json
from orchestrator.training.distributed import decide
from orchestrator.training.engine import TrainingMemory
from orchestrator.training.stage_run import train_stage

Ending = Literal["finished", "interrupted"]


def execute(job: Job, ledger: Ledger, memory: dict[str, Any], should_stop: Callable[[], bool]) -> Ending:
    """Do one job on this rank.

    Args:
        memory: What this worker keeps from job to job; emptied when a job fails.
        should_stop: Asked at every step; ranks agree on the answer among themselves.

    Returns:
        `finished`, or `interrupted` when it left early: at an in-stage checkpoint, or with no result.

    Raises:
        LlavoltaError: the job cannot be done; trying again would not help.
    """
    share_caches(ledger.storage / "cache")
    for reference in job.plugins:
        registry.load_plugin(reference, Path.cwd())  # absolute already, or a module
    training: TrainingMemory = memory.setdefault("training", TrainingMemory())
    if isinstance(job, RootJob):
        _write_weights(job, ledger, partial(write_initial_weights, job))
    elif isinstance(job, StartJob):
        _write_weights(job, ledger, partial(_write_start, job, ledger))
    elif isinstance(job, RehearsalJob):
        rehearse(job, ledger, training)
    elif isinstance(job, StageJob):
        check_rehearsed(job, ledger)
        if train_stage(replace(job, rehearsed=None), ledger, training, should_stop) == "stopped":
            return "interrupted"
    else:
        model = model_for_evaluation(training, job.points, job.state)
        if evaluate_state(job, ledger, model=model, should_stop=should_stop) is None:
            return "interrupted"
    return "finished"


def _write_start(job: StartJob, ledger: Ledger, folder: Path) -> None:
    base, source = (
        None if state is None else ledger.fetch(state, "weights") / "model.safetensors"
        for state in (job.base, job.source)
    )
    write_start_weights(job, base, source, folder)


def _write_weights(job: RootJob | StartJob, ledger: Ledger, write: Callable[[Path], None]) -> None:
    """Write, from one rank, a state that consists of weights alone."""

    def commit() -> None:
        if ledger.is_done(job.id) and ledger.has(job.id, "weights"):
            return
        ledger.begin(job.id)
        folder = ledger.writing_folder(job.id)
        write(folder)
        write_json(folder / "job.json", job_to_json(job))
        ledger.commit(job.id)

    decide(commit)
