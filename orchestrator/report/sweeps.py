"""Sweeps: one score of a finished model under many variants that it was not trained under (the paper's Figure 1)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from orchestrator.errors import UsageError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.cost import visual_layer_tokens
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.registry import COMPRESSORS, spec_class
from orchestrator.report.scores import Scores, job_of
from orchestrator.report.statistics import Comparison, holm
from orchestrator.report.units import difference_text, metric_text
from orchestrator.spec.sweep import given

AMOUNTS = ("stride", "keep_tokens", "keep_ratio", "layer_average_tokens")
FULL = "full"


class _Row(Protocol):
    """What is needed of a row of the ablation table."""

    @property
    def name(self) -> str: ...
    @property
    def cells(self) -> tuple[str, ...]: ...
    @property
    def values(self) -> dict[str, float]: ...
    @property
    def spread(self) -> dict[str, float]: ...
    @property
    def ci95(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Swept:
    """A score under one variant.

    Attributes:
        column: The metric's tracked name.
        variant: The variant's name; `full`: without compression.
        values: What the sweep gives of it, `kind` first; empty for `full`.
        mean: The score, a mean over seeds where the row has several.
        std: Standard deviation over seeds; None of one.
        ci95: Half of its 95 % interval: over seeds, of one seed over questions; None where there is none.
        test: The paired test of its difference from `full`; None where that was not tested under.
        p_corrected: Its p-value, corrected for the number of tests of this sweep (Holm 1979).
        token_share: Visual layer-tokens that are left of an image, as a share of all; None where images vary in size or
            the method's tokens depend on the image.
    """

    column: str
    variant: str
    values: Mapping[str, Any]
    mean: float
    std: float | None = None
    ci95: float | None = None
    to_full: float | None = None
    test: Comparison | None = None
    p_corrected: float | None = None
    token_share: float | None = None


@dataclass(frozen=True)
class Sweep:
    """All scores of one row of the table under one evaluation's sweeps; `full` first, if it was tested.

    Attributes:
        evaluation: Its name under `evaluate`.
        metric: The metric's name, without the evaluation's.
        row: Name of the table's row.
        cells: Cells that it stands for.
    """

    evaluation: str
    metric: str
    row: str
    cells: tuple[str, ...]
    scores: tuple[Swept, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """What the sweeps give, `kind` first."""
        return tuple(dict.fromkeys(name for score in self.scores for name in score.values))

    @property
    def along(self) -> str | None:
        """What a curve is drawn along: the amount, or if that does not vary the layer; None where neither does."""
        varies = [
            key for key in (*AMOUNTS, "layer") if len({score.values.get(key) for score in self.scores} - {None}) > 1
        ]
        return varies[0] if varies else None

    def document(self) -> dict[str, Any]:
        """Return it for `--json`."""
        scores = [
            {
                **{name: value for name, value in asdict(score).items() if name != "test"},
                "values": dict(score.values),
                "test": None if score.test is None else asdict(score.test),
            }
            for score in self.scores
        ]
        return {
            "evaluation": self.evaluation,
            "metric": self.metric,
            "name": self.row,
            "cells": self.cells,
            "scores": scores,
        }


LEVEL = 0.05
"""Differences with a smaller corrected p-value are marked as more than chance."""


def texts(sweeps: Sequence[Sweep]) -> tuple[list[str], list[list[str]]]:
    """Return head and body of the table of an evaluation's metric, a line a variant."""
    keys = list(dict.fromkeys(key for sweep in sweeps for key in sweep.keys))
    body = []
    for sweep in sweeps:
        for score in sweep.scores:
            values = [score.values.get(key, "") for key in keys] if score.values else [FULL, *("" for _ in keys[1:])]
            share = "–" if score.token_share is None else f"{score.token_share:.0%}"
            body.append([sweep.row, *map(str, values), share, _text(score)])
    return ["cell", *keys, "tokens", sweeps[0].metric], body


def _text(score: Swept) -> str:
    """Return a score, its interval, and its difference from full tokens."""
    text = metric_text(score.column, score.mean)
    text += f" ± {metric_text(score.column, score.ci95)}" if score.ci95 is not None else ""
    shown = None if score.to_full is None else difference_text(score.column, score.mean, score.to_full)
    sure = "" if score.p_corrected is None else " *" if score.p_corrected < LEVEL else " ns"
    return text if shown is None else f"{text} ({shown}{sure})"


def sweeps_of(plan: ExperimentPlan, rows: Sequence[_Row], scores: Scores) -> list[Sweep]:
    """Return the sweeps of an experiment's rows, of what is finished of them; every headline metric is one.

    Args:
        plan: The experiment.
        rows: Its rows, with intervals.
        scores: What evaluations kept.
    """
    cells = {cell.name: cell for cell in plan.cells}
    found = []
    for row in rows:
        own = [cells[name] for name in row.cells]
        for evaluation, spec in own[0].spec.evaluate.items():
            swept = (given(under) for under in spec.under if not isinstance(under, str))
            variants = {name: values for each in swept for name, values in each.items()}
            for metric in spec.shown if variants else ():
                columns = {name: f"eval/{evaluation}/under_{name}/{metric}" for name in (FULL, *variants)}
                shown = [name for name, column in columns.items() if column in row.values]
                measured = [_score(row, own, scores, name, columns, variants.get(name, {})) for name in shown]
                if any(score.values for score in measured):
                    found.append(Sweep(evaluation, metric, row.name, row.cells, tuple(_corrected(measured))))
    return found


def _score(
    row: _Row,
    cells: Sequence[Cell],
    scores: Scores,
    name: str,
    columns: Mapping[str, str],
    values: Mapping[str, Any],
) -> Swept:
    column, full = columns[name], row.values.get(columns[FULL])
    score = Swept(
        column, name, values, row.values[column], row.spread.get(column), row.ci95.get(column),
        token_share=_token_share(cells[0], column),
    )  # fmt: skip
    if name == FULL or full is None:
        return score
    test = None
    with contextlib.suppress(UsageError):  # other rows, or all about one image
        ours, theirs = ([job_of(cell, each) for cell in cells] for each in (column, columns[FULL]))
        test = scores.compared(ours, theirs, column.rpartition("/")[2])
    return replace(score, to_full=score.mean - full, test=test)


def _token_share(cell: Cell, column: str) -> float | None:
    job, facts = job_of(cell, column), cell.facts
    if job is None or facts is None or facts.visual_grid is None:
        return None
    if any(spec_class(COMPRESSORS, point["kind"]).adaptive for point in job.points):
        return None
    kept = visual_layer_tokens(facts.visual_grid, job.points, facts.num_layers)
    return kept / visual_layer_tokens(facts.visual_grid, (), facts.num_layers)


def _corrected(measured: Sequence[Swept]) -> Iterator[Swept]:
    p_values = iter(holm([score.test.p_value for score in measured if score.test is not None]))
    for score in measured:
        yield score if score.test is None else replace(score, p_corrected=next(p_values))
