"""`status`: what is done, running, failed and still to do."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from orchestrator.plan.jobs import StageJob
from orchestrator.plan.walk import Walk
from orchestrator.report.live import last_metrics


def status_document(walk: Walk) -> dict[str, Any]:
    """Every cell's state, the steps it has done, and why it failed."""
    failures = walk.failures()
    cells = []
    for cell in walk.cells:
        done = total = 0
        for identity in walk.tree.path_of[cell.id]:
            job = walk.tree.stage_runs.get(identity)
            if isinstance(job, StageJob):
                total += job.last_step - job.first_step
                done += _steps_done(walk, job)
        state = walk.status(cell)
        cells.append(
            {
                "name": cell.name,
                "id": cell.id,
                "state": "failed" if cell.name in failures else state,
                "steps_done": done,
                "steps": total,
                "error": failures.get(cell.name),
            }
        )
    return {"experiment": walk.loaded.spec.name, "storage": str(walk.ledger.storage), "cells": cells}


def _steps_done(walk: Walk, job: StageJob) -> int:
    if walk.ledger.is_done(job.id):
        return job.last_step - job.first_step
    metrics = last_metrics(walk.ledger.metrics_file(job.id))
    return 0 if metrics is None else int(metrics["step"]) + 1 - job.first_step


def print_status(document: dict[str, Any], console: Console) -> None:
    """A line a cell."""
    grid = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("cell", "state", "steps", "id", "reason"):
        grid.add_column(name, overflow="fold")
    for cell in document["cells"]:
        reason = (cell["error"] or "").strip().splitlines()
        steps = f"{cell['steps_done']}/{cell['steps']}"
        grid.add_row(cell["name"], cell["state"], steps, cell["id"][:12], reason[0] if reason else "")
    console.print(f"{document['experiment']}  {document['storage']}", highlight=False, markup=False)
    console.print(grid)
