"""A tracker that sends a record completely, without the queue that does so by turns."""

from __future__ import annotations

from orchestrator.plan.cell_record import CellRecord
from orchestrator.tracking.mlflow_tracker import CellTracker


class Tracker(CellTracker):
    def log(self, record: CellRecord) -> str:
        """Updates the run of a cell and returns its id."""
        with self._as_tracking_error():
            self._refresh(now=True)
        while not self.log_some(record, points=1_000_000):
            pass
        return self._known().runs[record.cell_id].run_id

    def experiment(self) -> str | None:
        self._refresh()
        return self._known().experiment_id
