"""The ablation table: one row a cell, or one row a group of cells that differ in the axes averaged over."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, groupby
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable

from orchestrator.errors import UsageError, shorten
from orchestrator.plan.cell_record import AT_MOST, EVALUATION_TAG, CellRecord, flat
from orchestrator.plan.cells.cell import PROMOTED, Cell, tested_differently
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.trials import ADDED, STOPPED
from orchestrator.report.documents import Printed
from orchestrator.report.scores import Scores, job_of
from orchestrator.report.statistics import Comparison, holm, mean_interval
from orchestrator.report.sweeps import LEVEL, Sweep, sweeps_of, texts
from orchestrator.report.units import Operations, difference_text, legend, listed, lower_is_better, metric_text
from orchestrator.spec.grid import short_axes
from orchestrator.spec.infrastructure import ReportSpec
from orchestrator.spec.yaml.node import as_yaml

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        cells: Names of the cells it stands for.
        values: Metric name to mean over its cells.
        spread: Metric name to standard deviation, where it stands for several finished cells.
        against: Metric name to the difference from the baseline's row that it is compared with.
        marks: Remarks such as `failed` or `baseline`.
        base: Names of the cells of that row.
        ci95: Metric name to half of its 95 % interval: of the mean over several finished cells, of one over questions.
        tests: Metric name to the paired test of that difference, where both kept the score of every question.
        recorded: Metrics that someone else measured, and the source of each.
        origin: Which of the table's experiments it is of, counted from 0.
        is_trial: Whether it is a trial of a search, as it was searched.
        summaries: Metrics of each of its cells.
    """

    name: str
    cells: tuple[str, ...]
    axes: dict[str, Any]
    values: dict[str, float]
    spread: dict[str, float]
    status: str
    marks: tuple[str, ...] = ()
    against: dict[str, float] = field(default_factory=dict)
    base: tuple[str, ...] = ()
    ci95: dict[str, float] = field(default_factory=dict)
    tests: dict[str, Comparison] = field(default_factory=dict)
    recorded: dict[str, str] = field(default_factory=dict)
    origin: int = field(default=0, compare=False)
    is_trial: bool = field(default=False, compare=False)
    summaries: tuple[Mapping[str, float], ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Table(Printed):
    """Rows, the metrics and axes shown, what makes the rows unequal to compare, and sweeps of evaluations.

    People see the rows whose numbers are in `order` (None: all), as `layout` says; JSON, CSV and frames have every row.
    Scores under a sweep's variants have a table of their own where people read it; in CSV and frames they are columns.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    layout: ReportSpec = field(default_factory=ReportSpec)
    order: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"<Table: {len(self.rows)} rows, {len(self.columns)} metrics>"

    def document(self) -> dict[str, Any]:
        """Return it as what `--json` prints; values are not rounded."""
        rows = [
            {
                "name": r.name, "cells": r.cells, "axes": r.axes, "status": r.status, "metrics": r.values,
                "std": r.spread, "ci95": r.ci95, "marks": r.marks, "to_baseline": r.against, "tests": tests,
                **({"recorded": r.recorded} if r.recorded else {}),
            }
            for r, tests in zip(self.rows, self.tests(), strict=True)
        ]  # fmt: skip
        return {"rows": rows, "warnings": self.warnings, "sweeps": [sweep.document() for sweep in self.sweeps]}

    def tests(self) -> list[dict[str, dict[str, float]]]:
        """Return of each row, by metric, its paired test, with `p_corrected` for their number (Holm 1979)."""
        distinct = self._distinct_tests()
        corrected = dict(zip(distinct, holm([test.p_value for _, test in distinct]), strict=True))
        return [
            {name: {**asdict(test), "p_corrected": corrected[number, test]} for name, test in row.tests.items()}
            for number, row in enumerate(self.rows)
        ]

    def _distinct_tests(self) -> list[tuple[int, Comparison]]:
        """Return the tests by row; what was evaluated once and stands in two columns is one."""
        return list(
            dict.fromkeys((number, test) for number, row in enumerate(self.rows) for test in row.tests.values())
        )

    def to_frame(self) -> pandas.DataFrame:
        """Return it as a frame with one row a cell (or group of cells), values not rounded.

        The columns are the status, the axes, the metrics; `METRIC/std` where a row stands for several cells,
        `METRIC/ci95` where there is an interval, and `METRIC/to_baseline` and `METRIC/p_corrected` where there is a
        baseline.
        """
        import pandas

        axes = list(dict.fromkeys([*self.axes, *(axis for row in self.rows for axis in row.axes)]))
        head, *body = self._unrounded(axes)
        return pandas.DataFrame(body, columns=head).set_index("cell")

    def to_json(self) -> str:
        """Return it as JSON, values not rounded."""
        return json.dumps(self.document(), indent=2, default=str)

    def to_csv(self) -> str:
        """Return it as CSV, values not rounded; like `to_frame`, but without the axes that the names show."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows(["" if value is None else value for value in line] for line in self._unrounded(self.axes))
        return out.getvalue().rstrip("\n")

    def to_markdown(self) -> str:
        """Return it as a Markdown table, as the screen shows it."""
        head, body = text_cells(self, bold="**{}**")
        blocks = [_markdown(head, body, ["---"] + ["---:"] * (len(head) - 2) + ["---"])]
        for title, head, body in self._swept():
            blocks += [f"**{title}**", _markdown(head, body, ["---"] * (len(head) - 2) + ["---:"] * 2)]
        return "\n\n".join(blocks)

    def to_latex(self) -> str:
        """Return it as a LaTeX tabular (package booktabs), as the screen shows it; one more for each swept metric.

        Without the status where `report.columns` chose what is shown and all of it is finished.
        """
        head, body = text_cells(self, bold=_BOLD)
        if self.layout.columns and all(line[-1].startswith("finished") for line in body):
            head, body = head[:-1], [line[:-1] for line in body]
        swept = (f"% {title}\n{_latex(head, body)}" for title, head, body in self._swept())
        return "\n\n".join([_latex(head, body), *swept])

    def render(self, form: str) -> str:
        """Return it as `md`, `csv`, `latex` or `json`."""
        return {"md": self.to_markdown, "csv": self.to_csv, "latex": self.to_latex, "json": self.to_json}[form]()

    def print(self, console: Console | None = None) -> None:
        """Print it with what its short heads mean and what makes its rows unequal; None takes standard output."""
        console = console or Console()
        for number, grid in enumerate(_grids(*text_cells(self), console.width)):
            console.print(*([""] if number else []), grid, sep="\n")
        for title, head, body in self._swept():
            grid = plain_table(head, right=head[-2:])
            for line in body:
                grid.add_row(*line)
            console.print("", f"[bold]{title}[/bold]", grid, sep="\n", highlight=False)
        if (legend_line := self.explanations()) is not None:
            console.print(legend_line, style="dim", highlight=False, markup=False)
        for warning in self.warnings:
            console.print(f"note: {warning}", style="yellow", highlight=False, markup=False)

    def explanations(self) -> str | None:
        """Return one line that says what short heads and brackets mean; None where there are none."""
        heads = text_cells(self)[0]
        several = any(row.spread for row in self.rows)
        alone = any(row.ci95.keys() - row.spread.keys() for row in self.rows)
        over = [
            *(["a row's cells"] if several else []),
            *(["questions, by image, of a row of one cell"] if alone else []),
        ]
        interval = f"±: half of the 95% interval over {' or '.join(over)}" if over else None
        brackets = "in brackets: difference from the baseline" if any(row.against for row in self.rows) else None
        number = len(self._distinct_tests())
        tests = (
            f"* more than chance, ns not (p < {LEVEL:g}, paired by question, clustered by image and seed, "
            f"corrected for {number} test{'s' if number != 1 else ''})"
            if number
            else None
        )
        sources = dict.fromkeys(source for row in self.rows for source in row.recorded.values())
        recorded = f"{RECORDED} recorded, not measured here: {'; '.join(sources)}" if sources else None
        return "; ".join(filter(None, (legend(heads), interval, brackets, tests, recorded))) or None

    def _repr_html_(self) -> str:
        notes = [*filter(None, [self.explanations()]), *(f"note: {warning}" for warning in self.warnings)]
        tables = [
            html_table(*text_cells(self)),
            *(html_table(head, body, title) for title, head, body in self._swept()),
        ]
        return "".join(tables) + "".join(f"<div>{html.escape(note)}</div>" for note in notes)

    def _swept(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Yield title, head and body of the table of each swept metric."""
        for _, found in groupby(self.sweeps, key=lambda sweep: (sweep.evaluation, sweep.metric)):
            sweeps = list(found)
            tests = sorted({sum(score.test is not None for score in sweep.scores) for sweep in sweeps} - {0})
            number = " or ".join(map(str, tests))
            marks = f"; in brackets: difference from full, corrected for {number} tests a row" if tests else ""
            marks = f"; tokens: visual tokens left, mean over decoder layers{marks}"
            yield f"{sweeps[0].evaluation}: {sweeps[0].metric} by what the model is tested under{marks}", *texts(sweeps)

    def _unrounded(self, axes: Sequence[str]) -> list[list[Any]]:
        """Return head and rows of the table with every figure as it is, None where there is none."""
        spread = [name for name in self.columns if any(name in row.spread for row in self.rows)]
        against = [name for name in self.columns if any(name in row.against for row in self.rows)]
        tested = [name for name in self.columns if any(name in row.tests for row in self.rows)]
        kinds = (("std", spread), ("ci95", spread), ("to_baseline", against), ("p_corrected", tested))
        further = [f"{name}/{kind}" for kind, names in kinds for name in names]
        lines: list[list[Any]] = [["cell", "status", *axes, *self.columns, *further]]
        for row, tests in zip(self.rows, self.tests(), strict=True):
            p_values = {name: test["p_corrected"] for name, test in tests.items()}
            found = zip((row.spread, row.ci95, row.against, p_values), kinds, strict=True)
            figures = [value.get(name) for value, (_, names) in found for name in names]
            lines.append([row.name, row.status, *map(row.axes.get, axes), *map(row.values.get, self.columns), *figures])
        return lines


# Every answer of both cells is read for a test; beyond this many a table would keep its reader waiting.
MOST_TESTS = 1000

# What the formula gives: equal for cells that differ in a seed alone, so that a deviation of nothing is not shown.
BY_FORMULA = ("cost/train_tflops", ADDED, "cost/compression_ratio", "cost/visual_layer_tokens")
BOUND = "costs at most"
"""Mark of a row whose figures by the formula are bounds."""
_BOLD = "\ue000{}\ue001"  # of no font: what stands for bold until the text around it is escaped
RECORDED = "†"
"""Mark of a score that someone else measured, such as a benchmark's server."""
_OPERATIONS = {"cost/train_tflops": "train", ADDED: "added"}
"""Columns in the table's unit of operations, and what of them they are."""
COSTS = ("cost/train_tflops", ADDED, "cost/compression_ratio", "cost/train_seconds")
_HEADERS = {
    "cost/train_tflops": "train TFLOPs",
    ADDED: "added TFLOPs",
    "cost/compression_ratio": "CR",
    "cost/train_seconds": "seconds",
    "cost/visual_layer_tokens": "visual layer-tokens",
}


def ablation_table(
    records: Sequence[CellRecord],
    axes: Mapping[str, Mapping[str, Any]],
    *,
    mean_over: Sequence[str] = (),
    baseline: Mapping[str, Any] | None = None,
    all_metrics: bool = False,
    shown_axes: Sequence[str] = (),
    headlines: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """Return the table of an experiment, from its records alone.

    Args:
        records: One record a cell, also where several cells are the same work.
        axes: Cell name to the cell's axes.
        mean_over: Axes averaged over (mean, standard deviation, 95 % interval).
        baseline: Axis values of the row the others are compared with.
        all_metrics: Show every metric, not the headline ones.
        shown_axes: Axes with a column of their own, where names do not show them.
        headlines: Evaluation to the metrics shown of it; `accuracy` of one that is not named.
    """
    rows, remarks = _rows(records, axes, mean_over, baseline, shown_axes)
    return _table(records, rows, remarks, all_metrics, shown_axes, headlines or {})


def table_of(plans: Sequence[ExperimentPlan], *, all_metrics: bool = False) -> Table:
    """Return one table over one or several experiments, each averaged and compared as its own `report` says.

    A row of the same cells as one of an earlier experiment is shown there alone; where it would read otherwise, a
    warning names it.
    """
    headlines: dict[str, Sequence[str]] = {}
    records: list[CellRecord] = []
    remarks: list[str] = []
    shown: list[tuple[str, Row]] = []
    earlier: dict[frozenset[tuple[str, tuple[str, ...]]], list[Row]] = {}
    shown_axes: dict[str, None] = {}
    order: list[int] = []
    blocks: list[Sweep] = []
    for origin, plan in enumerate(plans):
        report, search, name = plan.loaded.spec.report, plan.loaded.spec.search, plan.loaded.spec.name
        own = [plan.record(cell) for cell in plan.cells]
        headlines |= {test: entry.shown for cell in plan.cells for test, entry in cell.spec.evaluate.items()}
        drawn = () if search is None else tuple(search.space)
        mean_over = report.mean_over if search is None else (*report.mean_over, "seed")
        baseline = report.baseline
        if search is not None and search.promote is not None and search.promote.baseline is not None:
            baseline = {PROMOTED: search.promote.baseline}
        rows, notes = _rows(own, {cell.name: cell.axes for cell in plan.cells}, mean_over, baseline, drawn)
        is_search = search is not None
        rows = [replace(row, origin=origin, is_trial=is_search and PROMOTED not in row.axes) for row in rows]
        ids = {record.cell_name: (record.cell_id, record.tested) for record in own}
        scores = Scores(plan.ledger)
        notes += [f"{name}: {note}" for note in (*_judged(rows, plan, mean_over, scores), *scores.notes)]
        blocks += sweeps_of(plan, rows, scores)
        keys = [frozenset(map(ids.__getitem__, row.cells)) for row in rows]
        repeated = [row.name for row, key in zip(rows, keys, strict=True) if row not in earlier.get(key, [row])]
        if repeated:
            notes.append(f"{name}: shown once, in the experiment before it: {', '.join(repeated)}")
        new = [row for row, key in zip(rows, keys, strict=True) if key not in earlier]
        notes += [
            f"{name}: no row fits {pattern!r} of report.rows"
            for pattern in _chosen([row.name for row in rows], report.rows)[1]
        ]
        chosen, _ = _chosen([row.name for row in new], report.rows or ("*",))
        order += [len(shown) + number for number in chosen]
        shown += [(name, row) for row in new]
        for row, key in zip(rows, keys, strict=True):
            earlier.setdefault(key, []).append(row)
        remarks += [*notes, *plan.repeated_trials(), *tested_differently(plan.cells)]
        records += own
        shown_axes |= dict.fromkeys(drawn)
    counts = Counter(row.name for _, row in shown)
    named = [row if counts[row.name] == 1 else replace(row, name=f"{name}/{row.name}") for name, row in shown]
    layout = _merged([plan.loaded.spec.report for plan in plans])
    columns = () if all_metrics else layout.columns
    table = _table(records, named, dict.fromkeys(remarks), all_metrics, tuple(shown_axes), headlines, columns)
    sweeps = tuple(sorted(blocks, key=lambda sweep: (sweep.evaluation, sweep.metric)))
    return replace(table, sweeps=sweeps, layout=layout, order=tuple(order))


def _chosen(names: Sequence[str], patterns: Iterable[str]) -> tuple[list[int], list[str]]:
    """Return the places of the names that fit some pattern, in the order of the patterns, and those none fits."""
    fits = {
        pattern: [n for n, name in enumerate(names) if name == pattern or fnmatchcase(name, pattern)]
        for pattern in patterns
    }
    return list(dict.fromkeys(chain(*fits.values()))), [pattern for pattern, found in fits.items() if not found]


def _merged(layouts: Sequence[ReportSpec]) -> ReportSpec:
    """Return one layout for a table of several experiments: all they show, the first word on each name."""
    first, *others = layouts or [ReportSpec()]
    for other in others:
        first = first.model_copy(
            update={
                "columns": tuple(dict.fromkeys([*first.columns, *other.columns])),
                "labels": {**other.labels, **first.labels},
                "decimals": {**first.decimals, **other.decimals},
                "bold": first.bold or other.bold,
            }
        )
    return first


def _table(
    records: Sequence[CellRecord],
    rows: Iterable[Row],
    remarks: Iterable[str],
    all_metrics: bool,
    shown_axes: Sequence[str],
    headlines: Mapping[str, Sequence[str]],
    wanted: Sequence[str] = (),
) -> Table:
    names = list(dict.fromkeys(name for record in records for name in record.summary))
    chosen, unknown = _chosen(names, wanted)
    columns = tuple(names[number] for number in chosen) if wanted else _columns(records, all_metrics, headlines)
    warnings = (
        *_unequal(records),
        *_unequal_evaluations(records),
        *_notices(records),
        *remarks,
        *(f"no cell has a metric that fits {pattern!r} of report.columns" for pattern in unknown if names),
        *(() if wanted else _lacking(columns, headlines)),
    )
    return Table(columns, tuple(rows), warnings, tuple(shown_axes))


def _rows(
    records: Sequence[CellRecord],
    axes: Mapping[str, Mapping[str, Any]],
    mean_over: Sequence[str],
    baseline: Mapping[str, Any] | None,
    shown_axes: Sequence[str],
) -> tuple[list[Row], list[str]]:
    """Return the rows of one experiment, and what one should know of them."""
    groups: dict[str, tuple[dict[str, Any], list[CellRecord]]] = {}
    for record in records:
        own = {axis: value for axis, value in axes[record.cell_name].items() if axis not in mean_over}
        key = json.dumps(own, sort_keys=True, default=str) if mean_over else record.cell_name
        groups.setdefault(key, (own, []))[1].append(record)
    rows = [_row(group, own, baseline, shown_axes, mean_over) for own, group in groups.values()]
    if not baseline:
        return rows, []
    bases = [row for row in rows if "baseline" in row.marks]
    # A trial of a search is compared with no baseline of its promoted ones.
    alike = [row for row in rows if PROMOTED not in baseline or PROMOTED in row.axes]
    found = [(row, _base_of(row, bases, baseline) if row in alike and row not in bases else None) for row in rows]
    without = [row.name for row, base in found if base is None and row in alike and row not in bases]
    named = ", ".join(row.name for row in bases) or "no row"
    why = f"the baseline is {named}{', which differ in other axes' if bases else ''}"
    remarks = [f"no difference from the baseline in {', '.join(without)}: {why}"] if without else []
    return [row if base is None else _against(row, base) for row, base in found], remarks


def _row(
    group: Sequence[CellRecord],
    own: dict[str, Any],
    baseline: Mapping[str, Any] | None,
    shown_axes: Sequence[str],
    mean_over: Sequence[str],
) -> Row:
    """Return the row of some cells that have the axes `own` in common."""
    # Cells that are the same work are one measurement: its numbers count once, and have no deviation.
    distinct = list({(record.cell_id, record.tested): record for record in group}.values())
    # All cells of a trial stop together: what they have is what they have in common.
    finished = [record for record in distinct if record.status in ("finished", "stopped")]
    values: dict[str, float] = {}
    spread: dict[str, float] = {}
    ci95: dict[str, float] = {}
    # A cell of its own shows what it has, whatever failed beside it; a mean is over finished cells only.
    counted = finished if len(distinct) > 1 else distinct
    for name in dict.fromkeys(name for record in counted for name in record.summary):
        found = {
            (record.cell_id, record.tested if name.startswith("eval/") else None): record.summary[name]
            for record in counted
            if math.isfinite(record.summary.get(name, math.nan))
        }
        numbers = list(found.values())
        if numbers:
            values[name] = mean(numbers)
        if len(numbers) > 1:
            spread[name] = stdev(numbers)
            interval = mean_interval(numbers)
            ci95[name] = float(interval.high or 0.0) - interval.mean
    marks = [PROMOTED] if PROMOTED in own else []
    if "control" in own:
        marks.append("control")
    elif baseline and all(own.get(axis) == value for axis, value in baseline.items()):
        marks.append("baseline")
    if any(record.tags.get("pareto") == "true" for record in group):
        marks.append("pareto")
    marks += [
        f"violates {metrics}" for metrics in dict.fromkeys(r.tags["violates"] for r in group if "violates" in r.tags)
    ]
    marks += dict.fromkeys(record.tags[STOPPED] for record in group if record.status == "stopped")
    if any(AT_MOST in record.tags for record in group):
        marks.append(BOUND)
    if len(distinct) > 1:
        marks.append(f"{len(finished)} of {len(distinct)} cells")
    states = {record.status for record in group}
    worst = (state for state in ("failed", "running", "interrupted", "trained") if state in states)
    status = states.pop() if len(states) == 1 else next(worst, "unfinished")
    name = group[0].cell_name if len(group) == 1 else _group_name(own, group, shown_axes, mean_over)
    cells = tuple(record.cell_name for record in group)
    recorded = {metric: source for record in counted for metric, source in record.recorded.items()}
    summaries = tuple(record.summary for record in group)
    return Row(
        name, cells, own, values, spread, status, tuple(marks), ci95=ci95, recorded=recorded, summaries=summaries
    )


def _base_of(row: Row, bases: Sequence[Row], baseline: Mapping[str, Any]) -> Row | None:
    """Return the baseline's row that is equal in all other axes, or the only one there is."""
    rest = {axis: value for axis, value in row.axes.items() if axis not in (*baseline, "control")}
    equal = [base for base in bases if all(base.axes.get(axis) == value for axis, value in rest.items())]
    return equal[0] if equal else bases[0] if len(bases) == 1 else None


def _against(row: Row, base: Row) -> Row:
    """Return the row with its differences from the baseline's; a bound is compared with nothing."""
    left_out = BY_FORMULA if BOUND in (*row.marks, *base.marks) else ()
    known = base.values.keys() - left_out
    shown = {name: value - base.values[name] for name, value in row.values.items() if name in known}
    return replace(row, against=shown, base=base.cells)


def _judged(rows: list[Row], plan: ExperimentPlan, mean_over: Sequence[str], scores: Scores) -> list[str]:
    """Add to rows what their kept answers say: paired tests of differences from the baseline, and where a row is one
    cell its interval over questions.

    A metric is tested where it is the mean of the scores that both sides kept, of the same questions and the same
    seeds; of others, such as an F1, no question has a share.

    Returns:
        What was not tested for its number.
    """
    cells = {cell.name: cell for cell in plan.cells}
    finished = [(number, row) for number, row in enumerate(rows) if row.status == "finished"]

    def seeds(names: Sequence[str]) -> dict[tuple[str, ...], Cell]:
        return {tuple(str(cells[name].axes.get(axis)) for axis in mean_over): cells[name] for name in names}

    pairs = [
        (number, name, [job_of(cell, name) for cell in own.values()], [job_of(base[seed], name) for seed in own])
        for number, row in finished
        if row.base
        for own, base in [(seeds(row.cells), seeds(row.base))]
        if own.keys() == base.keys() and len(own) == len(row.cells)
        for name in row.against
        if name.startswith("eval/")
    ]
    alone = [
        (number, name, jobs[0])
        for number, row in finished
        for name in row.values
        if name.startswith("eval/") and name not in row.ci95
        for jobs in [[job_of(cells[cell], name) for cell in row.cells]]
        if len({job and job.id for job in jobs}) == 1
    ]
    notes = []
    if len(pairs) > MOST_TESTS:
        text = "differences from the baseline are not tested, which is done for up to"
        notes.append(f"{len(pairs):,} {text} {MOST_TESTS:,}")
        pairs = []
    for number, name, ours, theirs in pairs:
        with contextlib.suppress(UsageError):  # other rows, or all about one image
            if (test := scores.compared(ours, theirs, name.rpartition("/")[2])) is not None:
                rows[number].tests[name] = test
    for number, name, job in alone if len(alone) <= MOST_TESTS else ():
        if job is not None and (interval := scores.interval(job, name.rpartition("/")[2])) is not None:
            rows[number].ci95[name] = interval
    return notes


def _group_name(
    own: Mapping[str, Any], group: Sequence[CellRecord], shown_axes: Sequence[str], mean_over: Sequence[str]
) -> str:
    """Return what the cells have in common, as their names say it; a trial's name where the axes have columns."""
    if shown_axes:
        return group[0].cell_name.partition(",")[0]
    short = short_axes(tuple(own))
    values = (
        (axis, value if isinstance(value, str) else json.dumps(value, default=str)) for axis, value in own.items()
    )
    return ",".join(f"{short[axis]}={value}" for axis, value in values) or f"mean over {', '.join(mean_over)}"


def _columns(
    records: Sequence[CellRecord], all_metrics: bool, headlines: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    names = list(dict.fromkeys(name for record in records for name in record.summary))
    if all_metrics:
        return tuple(names)
    scores: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("eval/"):
            scores.setdefault(name.split("/")[1], []).append(name)
    shown: list[str] = []
    for evaluation, found in scores.items():
        wanted = headlines.get(evaluation, ("accuracy",))
        chosen = [name for name in found if any(fnmatchcase(_split(name)[2], pattern) for pattern in wanted)]
        shown += chosen or [name for name in found if name.count("/") == 2]  # of one without its headline: all
    return (*shown, *(name for name in COSTS if name in names))


def _lacking(columns: Sequence[str], headlines: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one sentence for each evaluation whose results lack a metric of its own headline."""
    shown = [_split(name) for name in columns if name.startswith("eval/")]
    found = {evaluation: {metric for name, _, metric in shown if name == evaluation} for evaluation in headlines}
    lacking = {
        evaluation: [name for name in wanted if "*" not in name and name not in found[evaluation]]
        for evaluation, wanted in headlines.items()
        if found[evaluation] and tuple(wanted) != ("accuracy",)
    }
    return [
        f"evaluate.{evaluation} has no metric {', '.join(names)}, which its headline names (--all shows all it has)"
        for evaluation, names in lacking.items()
        if names
    ]


def _unequal(records: Sequence[CellRecord]) -> list[str]:
    """Return one sentence for each part of the fingerprint in which finished cells differ."""
    seen: dict[str, dict[str, list[str]]] = {}
    for record in records:
        if record.status == "finished":
            for tag, value in record.tags.items():
                if tag.startswith("fingerprint.") and not tag.startswith(EVALUATION_TAG):
                    seen.setdefault(tag, {}).setdefault(value, []).append(record.cell_name)
    return [
        f"unequal comparison: {tag.removeprefix('fingerprint.')} differs ("
        + "; ".join(f"{value}: {listed(names)}" for value, names in values.items())
        + ")"
        for tag, values in seen.items()
        if len(values) > 1
    ]


def _unequal_evaluations(records: Sequence[CellRecord]) -> list[str]:
    """Return one sentence for each part of an evaluation's fingerprint in which cells differ.

    What the cells were tested under is theirs in `final`, and an axis may say what a variant is; a named one is else to
    be the same.
    """
    seen: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}
    without: dict[str, dict[str, None]] = {}
    varied = any(name.partition(".")[0] == "compressors" for record in records for name in record.params)
    for record in records:
        for place, found in record.evaluated.items():
            evaluation = place.split("/")[1]
            if not found:
                without.setdefault(evaluation, {})[record.cell_name] = None
            for part, value in flat(found).items():
                if part != "compressor" or not (varied or "/under_" not in place):
                    values = seen.setdefault((evaluation, part), {}).setdefault(place, {})
                    values.setdefault(str(value), []).append(record.cell_name)
    sentences = []
    for (evaluation, part), places in seen.items():
        unlike: dict[str, dict[str, None]] = {}
        for values in places.values():
            for value, names in values.items() if len(values) > 1 else ():
                unlike.setdefault(value, {}).update(dict.fromkeys(names))
        if unlike:
            shown = "; ".join(f"{value}: {listed(names)}" for value, names in unlike.items())
            sentences.append(f"unequal comparison: {part} of evaluate.{evaluation} differs ({shown})")
    known = {evaluation for evaluation, _ in seen}
    sentences += [
        f"unequal comparison: how evaluate.{evaluation} was done is not recorded of {listed(names)}, tested by an "
        "older version"
        for evaluation, names in without.items()
        if evaluation in known
    ]
    return sentences


def _notices(records: Sequence[CellRecord]) -> list[str]:
    """Return what evaluations say of their scores, with the cells of which they do."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for evaluation, notices in record.evaluation_notices.items():
            for notice in notices:
                found.setdefault(f"evaluate.{evaluation}: {notice}", {})[record.cell_name] = None
    return [f"{text} ({listed(names)})" for text, names in found.items()]


def _split(column: str) -> tuple[str, str, str]:
    """Return the evaluation, the variant and the metric (of a suite `PART/METRIC`) that a score's column is of."""
    _, evaluation, *rest = column.split("/")
    under = rest.pop(0).removeprefix("under_") if rest[0].startswith("under_") and len(rest) > 1 else "final"
    return evaluation, under, "/".join(rest)


def header(column: str) -> str:
    """Return a metric's name as a column head: `eval/vqa/under_full/accuracy` becomes `vqa accuracy (full)`."""
    if column in _HEADERS:
        return _HEADERS[column]
    if not column.startswith("eval/"):
        return column
    evaluation, under, metric = _split(column)
    return f"{evaluation} {metric.replace('/', ' ')} ({under})"


def _unit(table: Table) -> Operations:
    return Operations.of(row.values.get("cost/train_tflops") for row in table.rows)


def _text(
    row: Row, column: str, value_text: Callable[[float | None], str], p_corrected: float | None, bold: str
) -> str:
    """Return a value, its interval, and how it differs from the baseline: in points of a score, in per cent of a
    cost.
    """
    value = row.values.get(column)
    text = value_text(value)
    if value is None:
        return text
    if column in BY_FORMULA and BOUND in row.marks:
        text = f"{'≥' if column == 'cost/compression_ratio' else '≤'} {text}"
    if column in row.recorded:
        text += RECORDED
    text = bold.format(text)
    half = row.ci95.get(column)
    if half is not None and not (column in BY_FORMULA and half <= 1e-6 * abs(value)):
        text += f" ± {value_text(half)}"
    difference = row.against.get(column)
    if difference is None:
        return text
    sure = "" if p_corrected is None else " *" if p_corrected < LEVEL else " ns"
    shown = None if column == "cost/compression_ratio" else difference_text(column, value, difference)
    return text if shown is None else f"{text} ({shown}{sure})"


def text_cells(table: Table, bold: str = "{}") -> tuple[list[str], list[list[str]]]:
    """Return the head and body of the table as text, as its `layout` has it.

    Args:
        table: The table.
        bold: What a bold value becomes.
    """
    unit, layout = _unit(table), table.layout
    apart = {score.column for sweep in table.sweeps for score in sweep.scores if score.values}
    columns = [column for column in table.columns if column not in apart]

    def text_of(column: str) -> Callable[[float | None], str]:
        places = [n for pattern, n in layout.decimals.items() if column == pattern or fnmatchcase(column, pattern)]
        scale = unit.scale if column in _OPERATIONS else 1.0
        if places:
            return lambda value: "–" if value is None else f"{value / scale:,.{places[0]}f}"
        return unit.text if column in _OPERATIONS else partial(metric_text, column)

    heads = [
        layout.labels.get(column) or (f"{_OPERATIONS[column]} {unit.name}" if column in _OPERATIONS else header(column))
        for column in columns
    ]
    head = ["cell", *(axis.rpartition(".")[2] for axis in table.axes), *heads, "status"]
    order = range(len(table.rows)) if table.order is None else table.order
    rows, tests, texts = [table.rows[n] for n in order], table.tests(), {column: text_of(column) for column in columns}
    best = {
        column: _best(rows, column, texts[column]) for column in columns if layout.bold and column.startswith("eval/")
    }
    body = []
    for number, row in zip(order, rows, strict=True):
        drawn = map(row.axes.get, table.axes)
        values = [f"{value:.4g}" if isinstance(value, float) else shorten(as_yaml(value)) for value in drawn]
        for column in columns:
            is_best = column in row.values and texts[column](row.values[column]) == best.get(column)
            p_corrected = tests[number].get(column, {}).get("p_corrected")
            values.append(_text(row, column, texts[column], p_corrected, bold if is_best else "{}"))
        status = row.status if not row.marks else f"{row.status} ({', '.join(row.marks)})"
        body.append([layout.labels.get(row.name, row.name), *values, status])
    return head, body


def _best(rows: Sequence[Row], column: str, text: Callable[[float], str]) -> str | None:
    """Return the best value of a column as it is shown, so that values that look equal are equally bold."""
    values = [row.values[column] for row in rows if column in row.values]
    return text(min(values) if lower_is_better(column) else max(values)) if values else None


def plain_table(heads: Sequence[str], right: Sequence[str] = ()) -> RichTable:
    """Return an empty table without lines, for a console; the columns of `right` are of numbers."""
    table = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in heads:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _grids(head: Sequence[str], body: Sequence[Sequence[str]], width: int) -> Iterator[RichTable]:
    """Return the table for a console; where it is too wide, in parts side by side that all begin with the names."""
    columns = [list(texts) for texts in zip(head, *body, strict=True)]
    widths = [max(map(len, texts)) for texts in columns]
    if too_wide := sum(widths) + 2 * len(widths) > width:
        # Heads may be broken between words, numbers are not.
        widths = [max(map(len, (*texts[0].split(), *texts[1:]))) for texts in columns]
    parts: list[list[int]] = [[0]]
    for index in range(1, len(columns)):
        if len(parts[-1]) > 1 and sum(widths[i] + 2 for i in (*parts[-1], index)) > width:
            parts.append([0])
        parts[-1].append(index)
    for part in parts:
        grid = plain_table([head[i] for i in part], right=head[1:-1])
        for column, index in zip(grid.columns, part, strict=True):
            column.width = widths[index] if too_wide and sum(widths[i] + 2 for i in part) <= width else None
        for line in body:
            grid.add_row(*(line[i] for i in part))
        yield grid


def html_table(head: Sequence[str], body: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return texts as an HTML table, for notebooks."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    rows = "".join(line(row, "td") for row in body)
    return f"<table>{title}<thead>{line(head, 'th')}</thead><tbody>{rows}</tbody></table>"


def _markdown(head: Sequence[str], body: Iterable[Sequence[str]], align: Sequence[str]) -> str:
    lines = [head, align, *body]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _latex(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    escapes = {
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        "†": r"$\dagger$",
        "–": "--",
        _BOLD[0]: r"\textbf{",
        _BOLD[-1]: "}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{c: "\\" + c for c in "&%$#_{}"},
    }

    def escape(text: str) -> str:
        return "".join(escapes.get(character, character) for character in text)

    right = [number > 0 and title not in ("status", "kind") for number, title in enumerate(head)]
    lines = [r"\begin{tabular}{" + "".join("r" if each else "l" for each in right) + "}", r"\toprule"]
    lines.append(" & ".join(map(escape, head)) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(map(escape, line)) + r" \\" for line in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])
