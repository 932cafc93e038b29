"""Figures: accuracy over cost of a grid, the training of a cell, the speed of variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.io_retry import retry_io
from orchestrator.report.front import OTHER_TRIALS, front_of_rows, palette, palette_key
from orchestrator.report.sweeps import Sweep, Swept
from orchestrator.report.table import BOUND, Table, header
from orchestrator.report.units import Operations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PANELS = 24
_CHARACTERS = 14
"""Of a legend, an inch."""


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure, sizes in inches; not pyplot's, so that the backend of a notebook stays as it is."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path, dpi: int) -> None:
    retry_io(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    figure.savefig(path, dpi=dpi)


def experiment_figures(plan: ExperimentPlan, table: Table) -> list[Path]:
    """Draw the figures of an experiment into `cells/EXPERIMENT`: of the grid, and of each metric of its sweeps.

    Args:
        plan: The experiment.
        table: Its table.

    Returns:
        The files drawn; none where nothing is finished.
    """
    folder = plan.ledger.storage / "cells" / plan.loaded.spec.name
    grid = folder / "grid.png"
    drawn = [grid] if grid_figure(table, plan.loaded.spec.name, grid) else []
    for (evaluation, metric), sweeps in groupby(table.sweeps, key=lambda sweep: (sweep.evaluation, sweep.metric)):
        swept = folder / f"sweep_{evaluation}_{metric.replace('/', '_')}.png"
        if sweep_figure(list(sweeps), swept):
            drawn.append(swept)
    return drawn


def grid_figure(table: Table, title: str, path: Path) -> bool:
    """Draw accuracy over training cost, one panel an evaluation setting, as PNG; the report's figure on paper.

    One colour a schedule, rows with their intervals, their cells faint, the baseline a line across; a front only
    through rows that differ (`front_of_rows`). Of a search's trials those on its front are hollow, the others grey.

    Args:
        table: Its rows are drawn.
        title: Stands above.
        path: The file to write.

    Returns:
        False, with nothing written, where no finished cell has both figures.
    """
    cost = "cost/train_tflops"
    swept = {score.column for sweep in table.sweeps for score in sweep.scores if score.values}
    scores = [column for column in table.columns if column.startswith("eval/") and column not in swept]
    rows = [row for row in table.rows if cost in row.values and any(score in row.values for score in scores)]
    if not rows:
        return False
    unit, metrics = Operations.of(row.values[cost] for row in rows), {score.rpartition("/")[2] for score in scores}
    looks = palette(map(palette_key, rows))
    figure = _figure(5.2 * len(scores), 4.2)
    panels = figure.subplots(1, len(scores), squeeze=False, sharey=len(metrics) == 1)
    named: dict[str, Any] = {}
    for score, panel in zip(scores, panels[0], strict=True):
        shown = [row for row in rows if score in row.values]
        front = front_of_rows(shown, score, cost)
        panel.plot(
            [shown[n].values[cost] / unit.scale for n in front], [shown[n].values[score] for n in front], color="0.6",
            zorder=1,
        )  # fmt: skip
        for row in shown:
            (colour, marker), x, y = looks[palette_key(row)], row.values[cost], row.values[score]
            if palette_key(row) == OTHER_TRIALS:
                named.setdefault(OTHER_TRIALS, panel.scatter(x / unit.scale, y, color=colour, s=16, alpha=0.6))
                continue
            own = row.summaries if len(row.cells) > 1 else ()
            both = [(cell[cost] / unit.scale, cell[score]) for cell in own if {cost, score} <= cell.keys()]
            panel.scatter(
                [x for x, _ in both], [y for _, y in both], color=colour, marker=marker, alpha=0.35, s=14, linewidths=0
            )
            is_base = "baseline" in row.marks
            if is_base:
                panel.axhline(y, color="0.6", linewidth=1, linestyle="--", zorder=0)
            drawn = panel.errorbar(
                x / unit.scale, y, yerr=row.ci95.get(score), capsize=3, color=colour, markersize=7,
                fmt="<" if BOUND in row.marks else "D" if is_base else marker,
                fillstyle="none" if row.is_trial else "full",
            )  # fmt: skip
            name = f"{palette_key(row)} ({BOUND})" if BOUND in row.marks else palette_key(row)
            named.setdefault(name, drawn)
        panel.set_title(header(score), fontsize=10)
        panel.set_xlabel(f"training cost ({unit.name})")
        _widen(panel, [row.values[cost] / unit.scale for row in shown])
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel(next(iter(metrics)) if len(metrics) == 1 else "")
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside lower center",
        ncols=max(1, min(3, len(named), int(5.2 * len(scores) * _CHARACTERS) // (max(map(len, named)) + 6))),
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(title, fontsize=11)
    _save(figure, path, 150)
    return True


def _widen(panel: Any, costs: Sequence[float]) -> None:
    """Give a panel room, so that it makes no difference of costs or scores larger than it is."""
    panel.margins(0.15)
    low, high = panel.get_ylim()
    room = max(0.0, (0.1 * abs(low + high) / 2 - (high - low)) / 2)
    panel.set_ylim(low - room, high + room)
    room = max(0.15 * (max(costs) - min(costs)), (0.1 * max(costs) - (max(costs) - min(costs))) / 2)
    if room > 0:  # else all of them cost nothing: nothing was trained
        panel.set_xlim(min(costs) - room, max(costs) + room)


def sweep_figure(sweeps: Sequence[Sweep], path: Path) -> bool:
    """Draw a metric over the amount of compression at test time, one panel a row of the table, as PNG.

    Every method and layer is a curve with its intervals, full tokens a line across with its own.

    Args:
        sweeps: Those of one metric of one evaluation.
        path: The file to write.

    Returns:
        False, with nothing written, where neither amount nor layer varies, or there are too many rows to be seen.
    """
    along = next((sweep.along for sweep in sweeps if sweep.along), None)
    if along is None or len(sweeps) > _MOST_PANELS:
        return False
    across = min(4, len(sweeps))
    down = -(-len(sweeps) // across)
    figure = _figure(1.2 + 4.4 * across, 4.2 * down)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for panel in panels[len(sweeps) :]:
        panel.remove()
    for sweep, panel in zip(sweeps, panels, strict=False):
        curves: dict[str, list[Swept]] = {}
        for score in sweep.scores:
            if score.values:
                rest = {key: value for key, value in score.values.items() if key not in (along, "kind")}
                name = ", ".join([score.values["kind"], *(f"{key} {value}" for key, value in rest.items())])
                curves.setdefault(name, []).append(score)
            else:
                panel.axhline(score.mean, color="0.4", linewidth=1, linestyle="--", label="full tokens")
                if score.ci95 is not None:
                    panel.axhspan(
                        score.mean - score.ci95, score.mean + score.ci95, color="0.5", alpha=0.15, linewidth=0
                    )
        places = [str(value) for value in dict.fromkeys(s.values[along] for s in sweep.scores if along in s.values)]
        for number, (name, scores) in enumerate(curves.items()):
            # Beside each other, so that intervals do not hide one another.
            shift = (number - (len(curves) - 1) / 2) * min(0.08, 0.5 / len(curves))
            at = [places.index(str(score.values[along])) + shift for score in scores]
            errors = [math.nan if score.ci95 is None else score.ci95 for score in scores]
            panel.errorbar(at, [score.mean for score in scores], yerr=errors, marker="o", capsize=3, label=name)
        panel.set_xticks(range(len(places)), places)
        panel.set_xlabel(f"{along.replace('_', ' ')} at test time")
        panel.set_title(sweep.row, fontsize=10)
        panel.grid(alpha=0.25)
    for first in range(0, len(sweeps), across):
        panels[first].set_ylabel(sweeps[0].metric)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8, frameon=False)
    figure.suptitle(f"{sweeps[0].evaluation}: {sweeps[0].metric} by what the model is tested under", fontsize=11)
    _save(figure, path, 150)
    return True


def training_figure(record: CellRecord, path: Path) -> bool:
    """Draw a cell's loss and its schedule (visual tokens as the mean over decoder layers) over optimizer steps.

    Returns:
        False, with nothing written, where the cell has no history.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for name, value, step, _ in record.history:
        series.setdefault(name, []).append((step, value))
    names = [name for name in ("train/loss", "train/visual_tokens") if series.get(name)]
    if not names:
        return False
    figure = _figure(7, 5)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)
    for name, panel in zip(names, panels[:, 0], strict=True):
        steps, values = zip(*sorted(series[name]), strict=True)
        panel.plot(steps, values, linewidth=1, drawstyle="steps-post" if name == "train/visual_tokens" else "default")
        panel.set_ylabel(name.removeprefix("train/").replace("_", " "))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
    panels[-1][0].set_xlabel("optimizer step")
    figure.suptitle(record.cell_name, fontsize=11)
    _save(figure, path, 110)
    return True


def bench_figure(document: dict[str, Any], path: Path) -> None:
    """Draw measured and predicted speed-up of every variant as PNG."""
    rows = document["variants"]
    figure = _figure(7, 0.45 * len(rows) + 1.8)
    panel = figure.subplots()
    places = range(len(rows))
    panel.barh(places, [row["speedup_measured"] for row in rows], height=0.6, color="tab:blue", label="measured")
    predicted = [row["speedup_predicted"] for row in rows]
    panel.scatter(predicted, places, marker="|", s=300, color="black", label="by formula", zorder=3)
    panel.set_yticks(places, [row["name"] for row in rows])
    panel.invert_yaxis()
    panel.axvline(1, color="0.7", linewidth=1, zorder=0)
    panel.set_xlabel("speed-up of forward and backward against full tokens")
    panel.legend(fontsize=8, frameon=False)
    panel.set_title(f"{document['experiment']} on {document['device']}", fontsize=10)
    _save(figure, path, 130)
