"""`wandb`: cells as runs of Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from orchestrator import plugin

STEP = "optimizer_step"


class WandbTracker(plugin.Tracker):
    """A project with the experiment's name, and a run for each cell, with the cell's id.

    Account, server, entity and mode are wandb's own settings (`wandb login`, WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE).
    With WANDB_MODE=offline everything lies in `<storage>/wandb/<experiment>/wandb`, and `wandb sync` sends it; a cell
    that several sessions worked on has a folder of each, and `wandb sync --append` makes them one run.
    """

    kind: ClassVar[str] = "wandb"
    requires: ClassVar[Mapping[str, str]] = {"wandb": "llavolta-orchestrator[wandb]"}

    def __init__(self, experiment: str, folder: Path) -> None:
        super().__init__(experiment, folder)
        self._runs: dict[str, Any] = {}

    def log(self, record: plugin.CellRecord, points: Sequence[plugin.Point]) -> None:
        """Log the points by their own steps, since scores along the way may come after later steps of training."""
        run = self._runs.get(record.cell_id) or self._opened(record)
        rows: dict[tuple[int, int], dict[str, float]] = {}
        for name, value, step, timestamp_ms in points:
            rows.setdefault((step, timestamp_ms), {})[name] = value
        for (step, timestamp_ms), values in rows.items():
            run.log({STEP: step, **values, "_timestamp": timestamp_ms / 1000})
        run.summary.update(record.summary)
        if record.status not in ("new", "running"):
            del self._runs[record.cell_id]
            run.finish(exit_code=0 if record.status in ("finished", "stopped") else 1)

    def _opened(self, record: plugin.CellRecord) -> Any:
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self.experiment,
            id=record.cell_id,
            name=record.cell_name,
            config=dict(record.params),
            dir=str(self.folder),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, save_code=False),
        )
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        self._runs[record.cell_id] = run
        return run

    def close(self) -> None:
        """End the runs of cells that are not finished, which wandb shows as failed until a session resumes them."""
        for run in self._runs.values():
            run.finish(exit_code=1)
        self._runs.clear()
