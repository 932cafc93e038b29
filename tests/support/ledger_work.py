"""Work written into a real ledger without training: what tests of plans, states and views look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.jobs import EvaluationJob, Job, StageJob, job_to_json
from orchestrator.plan.ledger import Ledger


def finish(ledger: Ledger, job: Job, *, checkpoint: bool = True, **result: Any) -> None:
    """Commits a job; a stage run took two seconds on one worker unless `result` says otherwise."""
    if isinstance(job, EvaluationJob):
        ledger.write_evaluation(job.id, {"metrics": {"accuracy": 0.5}, "seconds": 1.0})
        return
    work = ledger.writing_folder(job.id)
    (work / "weights").mkdir(parents=True)
    (work / "weights" / "model.safetensors").write_bytes(b"w")
    (work / "job.json").write_text(json.dumps(job_to_json(job)))
    if isinstance(job, StageJob):
        if checkpoint:
            (work / "checkpoint").mkdir()
            (work / "checkpoint" / "state").write_bytes(b"o")
        told = {"train_seconds": 2.0, "peak_memory_gib": 1.0, "fingerprint": {"world_size": 1, "device": "x86_64"}}
        (work / "result.json").write_text(json.dumps({**told, **result}))
        spool(ledger, job, job.last_step)
    ledger.commit(job.id)


def finish_answered(plan: ExperimentPlan, said: Callable[[Cell, EvaluationJob], list[dict]]) -> None:
    """Finishes all work of a plan; an evaluation's accuracy is the share of the answers said that are right."""
    for job in plan.tree.work(plan.ledger):
        if not isinstance(job, EvaluationJob):
            finish(plan.ledger, job)
    for cell in plan.cells:
        for job in cell.evaluations:
            answers = said(cell, job)
            metrics = {"accuracy": sum(one["right"] for one in answers) / len(answers)}
            result = {"metrics": metrics, "seconds": 1.0, "num_samples": len(answers)}
            plan.ledger.write_evaluation(job.id, result, answers)


def fill(ledger: Ledger, state: str, *, checkpoint: bool = False, model: bytes = b"weights") -> Path:
    """Writes what a stage run of seven steps leaves to commit, without a job; gives its work folder."""
    work, writing = ledger.work_folder(state), ledger.writing_folder(state)
    (writing / "weights").mkdir(exist_ok=True)
    (writing / "weights" / "model.safetensors").write_bytes(model)
    if checkpoint:
        (writing / "checkpoint" / "rank0").mkdir(parents=True, exist_ok=True)
        (writing / "checkpoint" / "rank0" / "optimizer.pt").write_bytes(b"\1" * 5000)
    (writing / "job.json").write_text(json.dumps({"type": "stage", "last_step": 7}))
    (writing / "result.json").write_text(json.dumps({"id": state}))
    (work / "metrics.jsonl").write_text('{"step": 0}\n')
    (work / "log.txt").write_text("said\n")
    return work


def spool(ledger: Ledger, job: StageJob, step: int, step_seconds: float = 0.5) -> None:
    """Metrics of a stage run up to `step`, the last line torn."""
    lines = [
        {"step": s, "timestamp_ms": 1000 + s, "loss": 1 / (s + 1), "learning_rate": 0.1, "visual_tokens": 8.0,
         "step_seconds": step_seconds, "samples_per_second": 32.0, "variant": job.action_at(s).variant}
        for s in range(job.first_step, step)
    ]  # fmt: skip
    file = ledger.work_folder(job.id) / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "lo')
