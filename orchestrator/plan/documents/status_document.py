"""`status` as one document: what runs where, what is done, waiting or failed and why, and the time left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.documents.plan_document import stage_run_document, with_plans
from orchestrator.plan.documents.reasons import Reasons
from orchestrator.plan.documents.time_left import hours_document, steps_done
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.io_retry import stat_or_none
from orchestrator.plan.jobs import EvaluationJob, StageJob
from orchestrator.plan.status import TreeStatus
from orchestrator.plan.step_history import last_metrics

# Only ratios between variants count here; the data's real lengths need not be read.
_TEXT_TOKENS = 64.0


def status_document(walk: ExperimentPlan) -> dict[str, Any]:
    """Return the cells, stage runs and evaluations as they stand, who works on what, and the time spent and left.

    A job is `running` where a living driver holds it, `interrupted` where it was begun and nobody does, `waiting`
    where it was begun and a driver of this experiment is busy elsewhere. A cell is `trained` where only evaluations
    are missing.
    """
    standing = TreeStatus(walk.tree, walk.ledger)
    jobs = {*walk.tree.order, *walk.tree.evaluations}
    busy = not jobs.isdisjoint(standing.holders)
    runs = [_stage_run(walk, standing, job, stage_run_document(job, plan, standing), busy)
            for job, _, plan in with_plans(walk.cells, walk.tree)]  # fmt: skip
    wanted: dict[str, list[str]] = {}
    for cell in walk.cells:
        for test in dict.fromkeys(job.id for job in cell.evaluations):
            wanted.setdefault(test, []).append(cell.id)
    tests = [_evaluation(walk, standing, job, wanted[job.id]) for job in walk.tree.evaluations.values()]
    roots = [
        {"id": root, "state": standing.state(root), **_about(walk, standing, root, standing.state(root))}
        for root in (*walk.tree.roots, *walk.tree.starts)
    ]
    reasons = Reasons(standing, walk.cells, None)
    steps = {run["id"]: run["steps_done"] for run in runs}
    return {
        "experiment": walk.loaded.spec.name,
        "storage": walk.ledger.url,
        "cells": [_cell(walk, standing, cell, steps, reasons, busy) for cell in walk.cells],
        "stage_runs": runs,
        "evaluations": tests,
        "roots": roots,
        "totals": _totals(walk, standing, runs, tests),
    }


def _cell(
    walk: ExperimentPlan, standing: TreeStatus, cell: Cell, steps: Mapping[str, int], reasons: Reasons, busy: bool
) -> dict[str, Any]:
    path = walk.tree.path_of[cell.id]
    done, state = sum(steps[run] for run in path), str(standing.cell(cell))
    begun = done > 0 or any(standing.evaluation(job.id) == "done" for job in cell.evaluations)
    if state == "new" and begun:
        trained = not standing.needed_of(cell)
        state = "waiting" if busy else "trained" if trained else "interrupted"
    failure = standing.failure(cell)
    return {
        "name": cell.name,
        "id": cell.id,
        "state": "finished" if state == "done" else state,
        "steps_done": done,
        "steps": sum(plan.total_steps for plan in cell.phases),
        "stage_runs": list(path),
        "evaluations": [job.id for job in cell.evaluations],
        "error": failure[1] if failure else None,
        "log": str(walk.ledger.log_file(failure[0])) if failure else None,
        "reasons": reasons.of(cell),
    }


def _stage_run(
    walk: ExperimentPlan, standing: TreeStatus, job: StageJob, about: dict[str, Any], busy: bool
) -> dict[str, Any]:
    state = about["state"]
    metrics = last_metrics(walk.ledger.metrics_file(job.id)) if job.id in standing.begun else None
    done = job.last_step - job.first_step if state == "done" else steps_done(job, metrics)
    if state == "new" and done:
        state = "waiting" if busy else "interrupted"
    figures = {key: metrics.get(key) for key in ("step", "loss", "samples_per_second")} if metrics else {}
    return {
        **about,
        "state": state,
        "steps_done": done,
        **({} if state == "done" else figures),
        **_about(walk, standing, job.id, state),
    }


def _evaluation(walk: ExperimentPlan, standing: TreeStatus, job: EvaluationJob, cells: list[str]) -> dict[str, Any]:
    state = standing.evaluation(job.id)
    about = {"id": job.id, "name": job.name, "under": job.under, "of": job.state, "state": state, "cells": cells}
    return {**about, **_about(walk, standing, job.id, state)}


def _about(walk: ExperimentPlan, standing: TreeStatus, identity: str, state: str) -> dict[str, Any]:
    """Return who works on a job; why it failed; where its log is."""
    holder = standing.holders.get(identity) if state == "running" else None
    failure = walk.ledger.failure(identity) if state == "failed" else None
    log = walk.ledger.log_file(identity) if state != "new" else None
    return {
        "holder": holder and {"lane": holder.lane, "host": holder.host, "pid": holder.pid, "owner": holder.owner},
        "error": str(failure.get("error", "")).strip() or "no reason recorded" if failure else None,
        "log": str(log) if log is not None and stat_or_none(log) is not None else None,
    }


def _totals(
    walk: ExperimentPlan, standing: TreeStatus, runs: list[dict[str, Any]], tests: list[dict[str, Any]]
) -> dict[str, Any]:
    costs = Costs(_TEXT_TOKENS)
    work = {
        job.id: costs.stage_run(cell, plan, job.first_step, job.last_step)["train_tflops"]
        for job, cell, plan in with_plans(walk.cells, walk.tree)
    }
    return {
        "cells": len(walk.cells),
        "stage_runs": len(runs),
        "stage_runs_done": sum(run["state"] == "done" for run in runs),
        "evaluations": len(tests),
        "evaluations_done": sum(test["state"] == "done" for test in tests),
        # The work is not exact here, so that only what was measured may tell hours by it.
        **hours_document(standing, work, walk.loaded.spec.cluster.model_copy(update={"device_tflops": None})),
    }
