"""The ablation table: one row a cell, or one row a group of cells that differ in the axes averaged over."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable

from orchestrator.errors import shorten
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.report.units import Operations, legend
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
    """

    name: str
    cells: tuple[str, ...]
    axes: dict[str, Any]
    values: dict[str, float]
    spread: dict[str, float]
    status: str
    marks: tuple[str, ...] = ()
    against: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows, the metrics and axes shown, and what makes the rows unequal to compare."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return it as what `--json` prints; values are not rounded."""
        rows = [
            {
                "name": r.name, "cells": r.cells, "axes": r.axes, "status": r.status, "metrics": r.values,
                "std": r.spread, "marks": r.marks, "to_baseline": r.against,
            }
            for r in self.rows
        ]  # fmt: skip
        return {"rows": rows, "warnings": self.warnings}

    def to_frame(self) -> pandas.DataFrame:
        """Return it as a frame with one row a cell (or group of cells), values not rounded.

        The columns are the status, the axes, the metrics; `METRIC/std` where a row stands for several cells, and
        `METRIC/to_baseline` where there is a baseline.
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
        head, body = text_cells(self)
        lines = [head, ["---"] + ["---:"] * (len(head) - 2) + ["---"], *body]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)

    def to_latex(self) -> str:
        """Return it as a LaTeX tabular (package booktabs), as the screen shows it."""
        return _latex(*text_cells(self))

    def render(self, form: str) -> str:
        """Return it as `md`, `csv`, `latex` or `json`."""
        return {"md": self.to_markdown, "csv": self.to_csv, "latex": self.to_latex, "json": self.to_json}[form]()

    def print(self, console: Console | None = None) -> None:
        """Print it with what its short heads mean and what makes its rows unequal; None takes standard output."""
        console = console or Console()
        head, body = text_cells(self)
        grid = plain_table(head, right=head[1:-1])
        for line in body:
            grid.add_row(*line)
        console.print(grid)
        if (legend_line := self.explanations()) is not None:
            console.print(legend_line, style="dim", highlight=False, markup=False)
        for warning in self.warnings:
            console.print(f"note: {warning}", style="yellow", highlight=False, markup=False)

    def explanations(self) -> str | None:
        """Return one line that says what short heads and brackets mean; None where there are none."""
        heads = text_cells(self)[0]
        brackets = "in brackets: difference from the baseline" if any(row.against for row in self.rows) else None
        return "; ".join(filter(None, (legend(heads), brackets))) or None

    def _repr_html_(self) -> str:
        notes = [*filter(None, [self.explanations()]), *(f"note: {warning}" for warning in self.warnings)]
        return html_table(*text_cells(self)) + "".join(f"<div>{html.escape(note)}</div>" for note in notes)

    def _unrounded(self, axes: Sequence[str]) -> list[list[Any]]:
        """Return head and rows of the table with every figure as it is, None where there is none."""
        spread = [name for name in self.columns if any(name in row.spread for row in self.rows)]
        against = [name for name in self.columns if any(name in row.against for row in self.rows)]
        head = ["cell", "status", *axes, *self.columns]
        lines: list[list[Any]] = [
            [*head, *(f"{name}/std" for name in spread), *(f"{name}/to_baseline" for name in against)]
        ]
        for row in self.rows:
            figures = [*map(row.values.get, self.columns), *map(row.spread.get, spread), *map(row.against.get, against)]
            lines.append([row.name, row.status, *map(row.axes.get, axes), *figures])
        return lines


# What the formula gives: equal for cells that differ in a seed alone, so that a deviation of nothing is not shown.
_BY_FORMULA = ("cost/train_tflops", "cost/compression_ratio", "cost/visual_layer_tokens")
_OPERATIONS = "cost/train_tflops"
_COSTS = ("cost/train_tflops", "cost/compression_ratio", "cost/train_seconds")
_HEADERS = {
    "cost/train_tflops": "train TFLOPs",
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
        records: One record a cell.
        axes: Cell id to the cell's axes.
        mean_over: Axes averaged over (mean and standard deviation).
        baseline: Axis values of the row the others are compared with.
        all_metrics: Show every metric, not the headline ones.
        shown_axes: Axes with a column of their own, where names do not show them.
        headlines: Evaluation to the metrics shown of it; `accuracy` of one that is not named.
    """
    groups: dict[str, list[CellRecord]] = {}
    for record in records:
        kept = {axis: value for axis, value in axes[record.cell_id].items() if axis not in mean_over}
        key = json.dumps(kept, sort_keys=True, default=str) if mean_over else record.cell_id
        groups.setdefault(key, []).append(record)
    rows = tuple(_row(group, axes, mean_over, baseline) for group in groups.values())
    if baseline:
        rows = tuple(_against(row, rows, baseline) for row in rows)
    return Table(_columns(records, all_metrics, headlines or {}), rows, tuple(_unequal(records)), tuple(shown_axes))


def table_of(plans: Sequence[ExperimentPlan], *, all_metrics: bool = False) -> Table:
    """Return one table over one or several experiments; a cell found in two of them is shown once."""
    cells = {cell.id: (plan, cell) for plan in plans for cell in plan.cells}
    report, search = plans[0].loaded.spec.report, plans[0].loaded.spec.search
    return ablation_table(
        [plan.record(cell) for plan, cell in cells.values()],
        {identity: cell.axes for identity, (_, cell) in cells.items()},
        mean_over=report.mean_over if search is None else (*report.mean_over, "seed"),
        baseline=report.baseline,
        all_metrics=all_metrics,
        shown_axes=() if search is None else tuple(search.space),
        headlines={
            name: test.headline for plan in plans for cell in plan.cells for name, test in cell.spec.evaluate.items()
        },
    )


def _row(
    group: Sequence[CellRecord],
    axes: Mapping[str, Mapping[str, Any]],
    mean_over: Sequence[str],
    baseline: Mapping[str, Any] | None,
) -> Row:
    own = {axis: value for axis, value in axes[group[0].cell_id].items() if axis not in mean_over}
    finished = [record for record in group if record.status == "finished"]
    values: dict[str, float] = {}
    spread: dict[str, float] = {}
    # A cell of its own shows what it has, whatever failed beside it; a mean is over finished cells only.
    counted = finished if len(group) > 1 else group
    for name in dict.fromkeys(name for record in counted for name in record.summary):
        numbers = [r.summary[name] for r in counted if name in r.summary and math.isfinite(r.summary[name])]
        if numbers:
            values[name] = mean(numbers)
        if len(numbers) > 1:
            spread[name] = stdev(numbers)
    marks = []
    if "control" in own:
        marks.append("control")
    elif baseline and all(own.get(axis) == value for axis, value in baseline.items()):
        marks.append("baseline")
    if any(record.tags.get("pareto") == "true" for record in group):
        marks.append("pareto")
    if len(group) > 1:
        marks.append(f"{len(finished)} of {len(group)} cells")
    states = {record.status for record in group}
    worst = (state for state in ("failed", "running", "interrupted", "trained") if state in states)
    status = states.pop() if len(states) == 1 else next(worst, "unfinished")
    name = group[0].cell_name if len(group) == 1 else _group_name(own, group)
    return Row(name, tuple(r.cell_name for r in group), own, values, spread, status, tuple(marks))


def _against(row: Row, rows: Sequence[Row], baseline: Mapping[str, Any]) -> Row:
    """Return the row with its differences from the baseline: from the one that is equal in all other axes, or the
    only one.
    """
    bases = [other for other in rows if "baseline" in other.marks]
    if not bases or row in bases:
        return row
    rest = {axis: value for axis, value in row.axes.items() if axis not in (*baseline, "control")}
    equal = [base for base in bases if all(base.axes.get(axis) == value for axis, value in rest.items())]
    base = equal[0] if equal else bases[0] if len(bases) == 1 else None
    if base is None:
        return row
    shown = {name: value - base.values[name] for name, value in row.values.items() if name in base.values}
    return replace(row, against=shown)


def _group_name(own: Mapping[str, Any], group: Sequence[CellRecord]) -> str:
    parts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in own.values()]
    return ",".join(parts) or group[0].cell_name


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
        chosen = [name for name in found if name.rpartition("/")[2] in wanted]
        shown += chosen or [name for name in found if name.count("/") == 2]  # of one without its headline: all
    return (*shown, *(name for name in _COSTS if name in names))


def _unequal(records: Sequence[CellRecord]) -> list[str]:
    """Return one sentence for each part of the fingerprint in which finished cells differ."""
    seen: dict[str, dict[str, list[str]]] = {}
    for record in records:
        if record.status == "finished":
            for tag, value in record.tags.items():
                if tag.startswith("fingerprint."):
                    seen.setdefault(tag, {}).setdefault(value, []).append(record.cell_name)
    return [
        f"unequal comparison: {tag.removeprefix('fingerprint.')} differs ("
        + "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())
        + ")"
        for tag, values in seen.items()
        if len(values) > 1
    ]


def header(column: str) -> str:
    """Return a metric's name as a column head: `eval/vqa/under_full/accuracy` becomes `vqa accuracy (full)`."""
    if column in _HEADERS:
        return _HEADERS[column]
    parts = column.split("/")
    if parts[0] != "eval":
        return column
    under = parts[2].removeprefix("under_") if len(parts) == 4 else "final"
    return f"{parts[1]} {parts[-1]} ({under})"


def _unit(table: Table) -> Operations:
    return Operations.of(row.values.get(_OPERATIONS) for row in table.rows)


def _text(row: Row, column: str, unit: Operations) -> str:
    """Return a value, its deviation, and how it differs from the baseline: in points of a score, in per cent of a
    cost.
    """
    value = row.values.get(column)
    text = unit.text(value) if column == _OPERATIONS else number(column, value)
    if value is None:
        return text
    spread = row.spread.get(column)
    if spread is not None and not (column in _BY_FORMULA and spread <= 1e-6 * abs(value)):
        text += f" ± {unit.text(spread) if column == _OPERATIONS else number(column, spread)}"
    difference = row.against.get(column)
    if difference is None:
        return text
    if column.startswith("eval/"):
        return f"{text} ({difference:+.3f})"
    if column.startswith("cost/") and column != "cost/compression_ratio" and value != difference:
        return f"{text} ({difference / (value - difference):+.0%})"
    return text


def number(column: str, value: float | None) -> str:
    """Return a value with the digits that mean something for its column."""
    if value is None:
        return "–"
    if column.startswith("eval/"):
        return f"{value:.3f}"
    if column.endswith("compression_ratio"):
        return f"{value:.2f}"
    if column.endswith("seconds"):
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def text_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the head and body of the table as text."""
    unit = _unit(table)
    heads = [f"train {unit.name}" if column == _OPERATIONS else header(column) for column in table.columns]
    head = ["cell", *(axis.rpartition(".")[2] for axis in table.axes), *heads, "status"]
    body = []
    for row in table.rows:
        values = [shorten(as_yaml(row.axes.get(axis))) for axis in table.axes]
        for column in table.columns:
            values.append(_text(row, column, unit))
        status = row.status if not row.marks else f"{row.status} ({', '.join(row.marks)})"
        body.append([row.name, *values, status])
    return head, body


def plain_table(heads: Sequence[str], right: Sequence[str] = ()) -> RichTable:
    """Return an empty table without lines, for a console; the columns of `right` are of numbers."""
    table = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in heads:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def html_table(head: Sequence[str], body: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return texts as an HTML table, for notebooks."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    rows = "".join(line(row, "td") for row in body)
    return f"<table>{title}<thead>{line(head, 'th')}</thead><tbody>{rows}</tbody></table>"


def _latex(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    escapes = {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", **{c: "\\" + c for c in "&%$#_{}"}}

    def escape(text: str) -> str:
        return "".join(escapes.get(character, character) for character in text)

    lines = [r"\begin{tabular}{l" + "r" * (len(head) - 2) + "l}", r"\toprule"]
    lines.append(" & ".join(map(escape, head)) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(map(escape, line)) + r" \\" for line in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])
