"""How a run ends on the screen: the table, where things are, and the line that opens MLflow."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table as RichTable

from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.redaction import redacted
from orchestrator.report.figure import grid_figure
from orchestrator.report.table import Table, text_cells
from orchestrator.report.tree_view import reason_lines
from orchestrator.report.units import counted_noun, legend


def nothing_done(failed: Mapping[str, str], waiting: Mapping[str, str]) -> str:
    """Return why a run did nothing."""
    if failed:
        return f"nothing was run: {counted_noun(len(failed), 'cell')} failed before; --retry-failed takes them up again"
    if waiting:
        return f"nothing was run: {counted_noun(len(waiting), 'cell')} could not be finished now"
    return "nothing to do: everything is done"


def print_table(table: Table, console: Console) -> None:
    """Return the ablation table on the screen."""
    head, body = text_cells(table)
    grid = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for number, name in enumerate(head):
        grid.add_column(name, justify="left" if number in (0, len(head) - 1) else "right", overflow="fold")
    for line in body:
        grid.add_row(*line)
    console.print(grid)
    if (told := legend(head)) is not None:
        console.print(told, style="dim", highlight=False, markup=False)
    for warning in table.warnings:
        console.print(f"note: {warning}", style="yellow", highlight=False, markup=False)


def print_ending(
    walk: ExperimentPlan, table: Table, failed: Mapping[str, str], waiting: Mapping[str, str], console: Console
) -> None:
    """Return the table, every failure with its reason, the figure and the MLflow line."""
    console.print()
    print_table(table, console)
    console.print()
    spec = walk.loaded.path
    for name, reason in failed.items():
        first, *more = reason_lines(reason)
        console.print(f"failed: {name}: {first}", style="red", highlight=False, markup=False)
        for line in more:
            console.print(f"        {line}", highlight=False, markup=False)
        console.print(
            f"        llavolta logs {shlex.quote(str(spec))} --cell {shlex.quote(name)}", highlight=False, markup=False
        )
    if failed:
        console.print("again:  add --retry-failed to the same command", highlight=False)
    for name, reason in waiting.items():
        line = f"not finished: {name}{': ' if reason else ''}{reason}"
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if waiting:
        console.print("again:  the same command goes on where this one stopped", highlight=False)
    figure = walk.ledger.storage / "cells" / walk.loaded.spec.name / "grid.png"
    if grid_figure(table, walk.loaded.spec.name, figure):
        console.print(f"figure: {figure}", highlight=False, markup=False, soft_wrap=True)
    uri = walk.tracking_uri
    if uri.startswith("http"):
        line = f"MLflow: {redacted(uri)}, experiment {walk.experiment_name}"
    else:
        # A database's password comes in the environment only, so that the variable stands for it.
        store = shlex.quote(uri) if redacted(uri) == uri else '"$MLFLOW_TRACKING_URI"'
        line = f"MLflow: mlflow server --backend-store-uri {store} --port 5000   then open http://127.0.0.1:5000"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
