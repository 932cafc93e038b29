"""The stage tree on the screen: a line a stage run, the interesting ones first where there are too many."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from rich.tree import Tree

from orchestrator.errors import shorten
from orchestrator.report.units import clock

TREE_LINES = 40
TABLE_ROWS = 60
_REASON_LINES = 8
_REASON_WIDTH = 400
REASONS = 20
_NAMES_WIDTH = 44
_STYLES = {
    "done": "green",
    "finished": "green",
    "running": "bold cyan",
    "failed": "red",
    "interrupted": "yellow",
    "trained": "yellow",
}
# What people look for when not all can be shown.
_FIRST = ("failed", "running", "interrupted", "waiting", "trained")


def state_text(state: str) -> Text:
    """Return a state in its colour."""
    return Text(state, style=_STYLES.get(state, ""))


def whose(names: Sequence[str]) -> str:
    """Return a few names, or how many there are."""
    if not names:
        return ""
    text = ", ".join(names)
    return text if len(names) == 1 or (len(names) < 4 and len(text) <= _NAMES_WIDTH) else f"{len(names)} cells"


def stage_tree(
    runs: Sequence[Mapping[str, Any]],
    label: Callable[[Mapping[str, Any]], Text],
    notes: Mapping[str | None, Sequence[Text]] | None = None,
    limit: int = TREE_LINES,
    crop: bool = False,
) -> Tree:
    """Return the tree of stage runs as a plan or a status document lists them (parents first).

    Args:
        runs: Each with `id`, `parent` and `state`.
        label: Text of a stage run's line.
        notes: Further lines below a stage run, by its id; None for those below the root.
        limit: Lines shown; running and failed stage runs and the way to them come first.
        crop: One line each, whatever is cut off on the right; for terminals.
    """
    notes = notes or {}
    shown = _chosen(runs, limit)
    root = Tree("stage tree", highlight=False)
    branches: dict[str | None, Tree] = {None: root}

    def line(text: Text) -> Text:
        text.no_wrap, text.overflow = (True, "ellipsis") if crop else (None, None)
        return text

    for note in notes.get(None, ()):
        root.add(line(note))
    for run in runs:
        if run["id"] in shown:
            branch = branches.get(run["parent"], root).add(line(label(run)))
            branches[run["id"]] = branch
            for note in notes.get(run["id"], ()):
                branch.add(line(note))
    hidden = [run["state"] for run in runs if run["id"] not in shown]
    if hidden:
        root.add(Text(f"… {len(hidden):,} more stage runs: {counted(hidden)}", style="dim"))
    return root


def _chosen(runs: Sequence[Mapping[str, Any]], limit: int) -> set[str]:
    parents = {run["id"]: run["parent"] for run in runs}
    ranked = sorted(runs, key=lambda run: _FIRST.index(run["state"]) if run["state"] in _FIRST else len(_FIRST))
    chosen: set[str] = set()
    for run in ranked:
        way, at = [], run["id"]
        while at is not None and at not in chosen:
            way.append(at)
            at = parents.get(at)
        if len(chosen) + len(way) <= limit:
            chosen.update(way)
    return chosen


def counted(states: Iterable[str]) -> str:
    """Return `3 done, 2 new`."""
    return ", ".join(f"{number:,} {state}" for state, number in Counter(states).items())


def print_cells(
    cells: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]],
    console: Console,
    right: Sequence[str] = (),
) -> None:
    """Return a table of cells: name, state and further columns; on a terminal a long one shows the interesting rows.

    Args:
        cells: Each with `name` and `state`.
        columns: Head to the text of a cell.
        right: Columns of numbers.
    """
    shown = list(cells)
    if console.is_terminal and len(cells) > TABLE_ROWS:
        rank = {id(cell): _FIRST.index(cell["state"]) if cell["state"] in _FIRST else len(_FIRST) for cell in cells}
        best = {id(cell) for cell in sorted(cells, key=lambda cell: rank[id(cell)])[:TREE_LINES]}
        shown = [cell for cell in cells if id(cell) in best]
    grid = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("cell", "state", *columns):
        grid.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for cell in shown:
        texts = [Text(text(cell)) for text in columns.values()]
        grid.add_row(Text(cell["name"]), state_text(cell["state"]), *texts)
    console.print(grid)
    if len(shown) < len(cells):
        chosen = {id(cell) for cell in shown}
        rest = counted(cell["state"] for cell in cells if id(cell) not in chosen)
        console.print(Text(f"… {len(cells) - len(shown):,} more cells: {rest} (all of them: --json)", style="dim"))


def print_reasons(
    cells: Sequence[Mapping[str, Any]], reasons: Callable[[Mapping[str, Any]], str], console: Console
) -> None:
    """Return why cells have work to do, each reason once with the cells it is true of; nothing where the state says
    it all.
    """
    groups: dict[str, list[str]] = {}
    for cell in cells:
        if text := reasons(cell):
            groups.setdefault(text, []).append(cell["name"])
    ranked = sorted(groups.items(), key=lambda entry: not entry[0].startswith("failed"))
    for text, names in ranked[:REASONS]:
        console.print(Text(f"{whose(names)}: {text}"))
    if len(ranked) > REASONS:
        console.print(Text(f"… {len(ranked) - REASONS:,} more reasons (all of them: --json)", style="dim"))


def reason_lines(error: str) -> list[str]:
    """Return why a job failed: what happened, and the first of the rows or images that a line each below names."""
    first, *rest = error.strip().splitlines() or ["no reason given"]
    rows = itertools.takewhile(lambda line: line.startswith("    "), rest)
    lines = [shorten(line.rstrip(), _REASON_WIDTH) for line in (first, *rows)]
    more = len(lines) - _REASON_LINES
    return lines if more <= 0 else [*lines[:_REASON_LINES], f"… {more:,} more lines in the log"]


def number(value: float | None, digits: int = 2) -> str:
    """Return a number for a table; `–` where there is none."""
    if value is None:
        return "–"
    # What would round to nothing shows its first digits instead.
    return f"{value:.{digits}g}" if 0 < abs(value) < 0.1 else f"{value:,.{digits}f}"


def hours_text(totals: Mapping[str, Any]) -> str | None:
    """Return `0.50 GPU-hours of training done, 1.20 left; about 1:12:00 to the end`; None where no speed is known."""
    for unit, name in (("gpu", "GPU"), ("worker", "worker")):
        done, left = totals.get(f"{unit}_hours_done"), totals.get(f"{unit}_hours_left")
        if done is not None:
            text = f"{number(done)} {name}-hours of training done"
            # Where nothing is left there is nothing to forecast.
            if not left:
                return text
            given = totals.get("device_tflops")
            how = f" at {given:g} TFLOPs a second a worker (cluster.device_tflops)" if given else ""
            to_come = f"{text}, {number(left)} left" if done else f"about {number(left)} {name}-hours of training"
            return f"{to_come}{how}; about {clock(totals['seconds_left'])} to the end"
    return None
