"""A finished grid of two schedules and two seeds, recorded in the MLflow that the environment names."""

from __future__ import annotations

import io
import re
from pathlib import Path

from ledger_work import finish
from rich.console import Console

from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.run import run_experiment

ACCURACY = {"schedule=full,seed=0": 0.8125, "schedule=full,seed=1": 0.6875,
            "schedule=heavy,seed=0": 0.5625, "schedule=heavy,seed=1": 0.4375}  # fmt: skip


def printed_address(folder: Path, tiny_text: str, name: str) -> str:
    """Runs it twice, the second time with nothing to do; the address that both print at their end."""
    schedules = "  phases.finetune.schedule: [full, heavy, two_stage]"
    assert schedules in tiny_text
    text = tiny_text.replace(schedules, "  phases.finetune.schedule: [full, heavy]\n  seed: [0, 1]")
    (folder / "tiny.yaml").write_text(text.replace("name: tiny\n", f"name: {name}\n"))
    plan = prepare(folder / "tiny.yaml")
    accuracy = {test.id: ACCURACY[cell.name] for cell in plan.cells for test in cell.evaluations}
    for job in plan.tree.work(plan.ledger):
        if isinstance(job, EvaluationJob):
            plan.ledger.write_evaluation(job.id, {"metrics": {"accuracy": accuracy[job.id]}, "seconds": 1.0})
        else:
            finish(plan.ledger, job)
    addresses = []
    for _ in range(2):
        told = io.StringIO()
        outcome = run_experiment(plan.loaded, local=True, console=Console(file=told))
        assert outcome.exit_code == 0 and not outcome.unsent, outcome.tracking_problem
        outcome.print(Console(file=told, soft_wrap=True))
        addresses += re.findall(r"MLflow: (http\S+)", told.getvalue())
    first, again = addresses
    assert first == again, "with nothing to do it is the same"
    return first
