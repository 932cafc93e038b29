"""The scores that evaluations kept of every question, read once from the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.plan.ledger.ledger import Ledger
from orchestrator.report.statistics import Comparison, compare, score_interval, scores_of


def job_of(cell: Cell, column: str) -> EvaluationJob | None:
    """Return the evaluation of the final state that a metric, by its tracked name, is of."""
    fits = [job for job in cell.evaluations if column.startswith(f"{job.place}/")]
    return max(fits, key=lambda job: len(job.place), default=None)


class Scores:
    """Scores by evaluation.

    Args:
        ledger: Where evaluations keep them.

    Attributes:
        notes: What could not be read, and why.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._read: dict[str, list[dict[str, Any]] | None] = {}
        self.notes: list[str] = []

    def behind(self, job: EvaluationJob, metric: str) -> list[dict[str, Any]] | None:
        """Return the scores whose mean a metric is; None where it is no such mean, as an F1 is none."""
        if job.id not in self._read:
            try:
                self._read[job.id] = scores_of(self._ledger.predictions(job.id) or ())
            except StorageError as error:
                self._read[job.id] = None
                self.notes.append(f"not tested: {error}")
        found, result = self._read[job.id], self._ledger.evaluation(job.id)
        value = (result or {}).get("metrics", {}).get(metric)
        is_mean = found and value is not None and abs(mean(each["score"] for each in found) - value) < 1e-9
        return found if is_mean else None

    def interval(self, job: EvaluationJob, metric: str) -> float | None:
        """Return half of the 95 % interval of one evaluation's metric over questions, clustered by image."""
        found = self.behind(job, metric)
        interval = score_interval(found) if found else None
        return None if interval is None or interval.high is None else interval.high - interval.mean

    def compared(
        self, ours: Sequence[EvaluationJob | None], theirs: Sequence[EvaluationJob | None], metric: str
    ) -> Comparison | None:
        """Return the paired test of two rows' evaluations, one a seed in the same order of seeds.

        Returns:
            None where the metric is no mean of scores, or a seed has not both, or both have the same.

        Raises:
            UsageError: the rows of the two differ, or all are about one image.
        """
        # Cells that are the same work are one measurement.
        both = {(a.id, b.id): (a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None}
        if not both or not all(len(set(side)) == len(both) for side in zip(*both, strict=True)):
            return None
        first, second = (
            [found for job in side if (found := self.behind(job, metric)) is not None]
            for side in zip(*both.values(), strict=True)
        )
        return compare(first, second) if len(first) == len(second) == len(both) else None
