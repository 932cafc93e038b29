"""Cells from the ledger to their folders and to MLflow: whatever MLflow lacks is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.io_retry import stat_or_none
from orchestrator.plan.ledger.process import Process
from orchestrator.report.cell_folders import write_cell_folder
from orchestrator.report.figures import training_figure
from orchestrator.tracking.mlflow_state import abandoned, has_record, read_state
from orchestrator.tracking.mlflow_tracker import CellTracker, one_at_a_time
from orchestrator.tracking.upload_queue import UploadQueue


def open_recorder(walk: ExperimentPlan, console: Console) -> UploadQueue:
    """Return the queue that records cells in MLflow; drivers make runs one at a time, so that no cell gets two."""

    def open_tracker() -> CellTracker:
        def alone() -> contextlib.AbstractContextManager[None]:
            return one_at_a_time(walk.ledger.store, walk.experiment_name)

        return CellTracker(walk.tracking_uri, walk.experiment_name, alone, _lives(walk), walk.ledger.url)

    return UploadQueue(open_tracker, lambda text: console.print(text, highlight=False, markup=False))


def _lives(walk: ExperimentPlan) -> Callable[[Process, str], bool]:
    """Return whether a driver lives: on this machine by its process, elsewhere by the leases it holds here."""

    def lives(driver: Process, storage: str) -> bool:
        gone = driver.is_gone()
        if gone is not None:
            return not gone
        holders = walk.ledger.living_holders().values() if storage == walk.ledger.url else None
        return holders is None or any((holder.host, holder.pid) == (driver.host, driver.pid) for holder in holders)

    return lives


def record_cells(walk: ExperimentPlan, recorder: UploadQueue) -> None:
    """Write the cells' folders and queue every record that MLflow does not have as it stands."""
    seen = read_state(walk.tracking_uri, walk.experiment_name)
    lacking = []
    for cell in walk.cells:
        record = walk.record(cell)
        # Where another driver works on it, that one records it.
        if record.status in ("new", "running"):
            continue
        write_cell_folder(walk, cell, record)
        drawn = _with_figure(walk, cell, record, draw=False)
        if drawn is None or seen is None or not has_record(seen.runs.get(cell.id), drawn):
            lacking.append(cell)
    for cell in lacking:
        put_record(walk, cell, recorder)
    if seen is not None and not lacking and abandoned(seen, _lives(walk)):
        recorder.end_abandoned()


def put_record(walk: ExperimentPlan, cell: Cell, recorder: UploadQueue) -> None:
    """Queue a cell, whose record is read when its turn comes."""

    def make() -> CellRecord:
        record = _with_figure(walk, cell, walk.record(cell), draw=True)
        assert record is not None
        return record

    recorder.put(cell.id, make)


def _with_figure(walk: ExperimentPlan, cell: Cell, record: CellRecord, *, draw: bool) -> CellRecord | None:
    """Return a finished cell's record with its training figure; None if that has to be drawn first."""
    if record.status != "finished" or next(iter(record.history), None) is None:
        return record
    path = walk.folder(cell) / "training.png"
    is_drawn = stat_or_none(path) is not None
    if not is_drawn and not draw:
        return None
    if not is_drawn and not training_figure(record, path):
        return record
    return replace(record, artifacts={**record.artifacts, path.name: path})
