"""`tensorboard`: cells as TensorBoard runs, with curves, final values and the recipe for its HPARAMS tab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from orchestrator import plugin


class TensorBoardTracker(plugin.Tracker):
    """Event files in `<storage>/tensorboard/<experiment>/<cell>`, written by tensorboardX, which Ray Tune brings.

    `tensorboard --logdir <storage>/tensorboard` shows them. A run is complete when its cell is: the final values are
    scalars at its last step.
    """

    kind: ClassVar[str] = "tensorboard"
    requires: ClassVar[Mapping[str, str]] = {"tensorboardX": "tensorboardX"}

    def log(self, record: plugin.CellRecord, points: Sequence[plugin.Point]) -> None:
        """Append a file of events to the cell's run."""
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        with SummaryWriter(str(self.folder_of(record))) as writer:
            for name, value, step, timestamp_ms in points:
                writer.add_scalar(name, value, step, timestamp_ms / 1000)
            if record.status != "finished":
                return
            for name, value in record.summary.items():
                writer.add_scalar(name, value, record.last_step)
            # Without the summary of all runs that comes first: TensorBoard would list its metrics alone, of one cell.
            _, *session = hparams({name: _typed(text) for name, text in record.params.items()}, {})
            for part in session:
                writer.file_writer.add_summary(part)


def _typed(text: str) -> str | float:
    """Return a number as such, so that its column is sorted by value."""
    try:
        return float(text)
    except ValueError:
        return text
