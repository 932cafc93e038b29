"""`plan` on the screen: cells with what they cost and why they run, the stage tree, and the sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from orchestrator.report.tree_view import (
    hours_text,
    number,
    print_cells,
    print_reasons,
    stage_tree,
    state_text,
    whose,
)
from orchestrator.report.units import Operations, counted_noun, legend

_KEPT = {"full": "", "weights": "keeps weights", "none": "keeps nothing"}
# What the state says already.
_SEEN = ("new", "done")


def print_plan(document: dict[str, Any], console: Console) -> None:
    """Print a plan document (docs/reference/json.md)."""
    cells = document["cells"]
    console.print(Text(document["experiment"], style="bold"))
    unit = Operations.of(cell["cost"].get("train_tflops") for cell in cells)
    columns = {
        f"train {unit.name}": lambda cell: unit.text(cell["cost"].get("train_tflops")),
        "visual layer-tokens": lambda cell: number(cell["cost"].get("visual_layer_tokens"), 1),
        "CR": lambda cell: number(cell["cost"].get("compression_ratio"), 3),
    }
    if cells:
        print_cells(cells, columns, console, right=tuple(columns))
        console.print(Text(legend(columns) or "", style="dim"))
        print_reasons(cells, _why, console)
    else:
        console.print("no cells yet: `llavolta search` proposes them", markup=False)
    if document["variants"]:
        console.print(_variants(document["variants"]))
    if cells:
        names = {cell["id"]: cell["name"] for cell in cells}
        cells_of = {run["id"]: run["cells"] for run in document["stage_runs"]}
        tree = stage_tree(
            document["stage_runs"],
            lambda run: _label(run, names, unit, cells_of.get(run["parent"])),
            crop=console.is_terminal,
        )
        console.print(tree)
    for line in _totals(document["totals"]) if cells else ():
        console.print(line, highlight=False, markup=False)
    for notice in document.get("notices", ()):
        console.print(f"note: {notice}", highlight=False, markup=False)


def _why(cell: Mapping[str, Any]) -> str:
    """Return why a cell runs, but for what its state says; equal for cells that differ alike from their finished
    namesakes.
    """
    namesake = f"differs from finished cell {cell['name']}: "
    told = [reason for reason in cell.get("reasons", ()) if reason not in _SEEN]
    return "; ".join(reason.replace(namesake, "differs from the finished cell of its name: ", 1) for reason in told)


def _label(run: Mapping[str, Any], names: Mapping[str, str], unit: Operations, above: list[str] | None) -> Text:
    # Whose it is need not be said again along a way that is one cell's alone.
    cells = [] if run["cells"] == above else [names[identity] for identity in run["cells"]]
    of = f" of {run['of']}" if run["of"] else ""
    parts = [
        Text(f"{run['phase']} {run['first_step']}-{run['last_step']}{of}"),
        Text(run["variant"], style="bold"),
        state_text(run["state"]),
        Text(f"{unit.text(run['cost'].get('train_tflops'))} {unit.name}"),
        Text(whose(cells)),
        Text(_KEPT[run["keep"]], style="dim"),
    ]
    return Text("  ").join(part for part in parts if part)


def _totals(totals: Mapping[str, Any]) -> list[str]:
    """Return what sharing saves, what is done, and what it takes."""
    alone, shared, ratio = (totals.get(f"train_{name}") for name in ("tflops_alone", "tflops_shared", "ratio"))
    unit = Operations.of([alone, shared])
    saved = "" if ratio is None else f" (ratio {ratio:.3f}: sharing saves {1 - ratio:.0%})"
    runs, tests = (
        counted_noun(totals[key], noun) for key, noun in (("stage_runs", "stage run"), ("evaluations", "evaluation"))
    )
    lines = [
        f"{counted_noun(totals['cells'], 'cell')}: {runs} for {totals['stage_runs_alone']:,} alone, "
        f"{totals['stage_runs_done']:,} done; {tests} for {totals['evaluations_alone']:,} alone, "
        f"{totals['evaluations_done']:,} done",
        f"train {unit.name} {unit.text(shared)} shared, {unit.text(alone)} alone{saved}; "
        f"disk at most {number(totals.get('disk_peak_gib'))} GiB",
    ]
    return [*lines, hours] if (hours := hours_text(totals)) else lines


def _variants(variants: list[dict[str, Any]]) -> RichTable:
    """Return what each variant keeps of an image."""
    grid = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("variant", "methods and layers", "kept tokens", "layer average", "CR"):
        grid.add_column(name, justify="left" if name in ("variant", "methods and layers") else "right", overflow="fold")
    for variant in variants:
        points = variant["points"]
        grid.add_row(
            Text(variant["name"] + (f" (control {variant['control']})" if variant["control"] else "")),
            ", ".join(f"{point['kind']} at {point['layer']}" for point in points),
            ", ".join(number(point["kept_tokens"], 0) for point in points),
            number(variant["layer_average_tokens"], 1),
            number(variant["compression_ratio"], 3),
        )
    return grid
