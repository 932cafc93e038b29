"""STORAGE/cells/EXPERIMENT/CELL_NAME/: a cell's weights, log and recipe under its name."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.io_retry import retry_io, stat_or_none
from orchestrator.plan.reasons import cell_values


def write_cell_folder(plan: ExperimentPlan, cell: Cell, record: CellRecord) -> Path:
    """Point a cell's folder to its weights and log, and writes its resolved YAML and record."""
    return retry_io(lambda: _written_folder(plan, cell, record))  # writing it twice gives the same


def _written_folder(plan: ExperimentPlan, cell: Cell, record: CellRecord) -> Path:
    folder = plan.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    _link(folder / "weights", plan.ledger.state_folder(cell.state) / "weights")
    for name, content in record.artifacts.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
    summary = {
        "cell_id": cell.id, "status": record.status, "params": record.params, "metrics": record.summary,
        "values": cell_values(cell),
    }  # fmt: skip
    text, file = json.dumps(summary, indent=2) + "\n", folder / "record.json"
    if stat_or_none(file) is None or file.read_text() != text:
        plan.ledger.point_to(cell.state, folder, summary)
        file.write_text(text)
    return folder


def weights_folder(plan: ExperimentPlan, cell: Cell) -> Path:
    """Return where a cell's weights are found by name, downloaded if they lie in a bucket; it need not
    exist.

    Raises:
        DamagedStateError: they are damaged there.
    """
    link = plan.folder(cell) / "weights"
    if stat_or_none(link) is None and plan.ledger.has(cell.state, "weights"):
        retry_io(lambda: link.parent.mkdir(parents=True, exist_ok=True))
        _link(link, plan.ledger.fetch(cell.state, "weights"))
    return link


def log_files(plan: ExperimentPlan, cell: Cell) -> list[Path]:
    """Return what a cell's stage runs and evaluations printed, in order."""
    return [path for identity in plan.jobs_of(cell) if stat_or_none(path := plan.ledger.log_file(identity)) is not None]


def _link(link: Path, target: Path) -> None:
    if stat_or_none(target) is None:
        return
    # Two runs on one storage may do this at once.
    fresh = link.with_name(f".{link.name}.{secrets.token_hex(6)}")
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)
