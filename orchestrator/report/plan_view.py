"""`plan` on the screen: cells and their cost, the stage tree, and the sums."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.tree import Tree


def print_plan(document: dict[str, Any], console: Console) -> None:
    """Prints a plan document (DESIGN section 4)."""
    grid = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("cell", "state", "train TFLOPs", "visual layer-tokens", "CR", "why"):
        grid.add_column(name, justify="right" if name[0] in "tvC" else "left", overflow="fold")
    for cell in document["cells"]:
        cost = cell["cost"]
        grid.add_row(
            cell["name"],
            cell["state"],
            _number(cost.get("train_tflops")),
            _number(cost.get("visual_layer_tokens"), 1),
            _number(cost.get("compression_ratio"), 3),
            str(cell.get("reason", "")),
        )
    console.print(f"[bold]{document['experiment']}[/bold]")
    console.print(grid)
    if document["variants"]:
        console.print(_variants(document["variants"]))
    console.print(_tree(document))
    totals = document["totals"]
    alone, shared = totals.get("train_tflops_alone"), totals.get("train_tflops_shared")
    saved = f" ({1 - shared / alone:.0%} saved by sharing)" if alone and shared is not None else ""
    console.print(
        f"{totals['cells']} cells, {totals['stage_runs']} stage runs; train TFLOPs alone {_number(alone)}, "
        f"shared {_number(shared)}{saved}; disk at most {_number(totals.get('disk_peak_gib'))} GiB",
        highlight=False,
    )
    for notice in document.get("notices", ()):
        console.print(f"note: {notice}", highlight=False, markup=False)


def _variants(variants: list[dict[str, Any]]) -> RichTable:
    """What each variant keeps of an image."""
    grid = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("variant", "methods and layers", "kept tokens", "layer average", "CR"):
        grid.add_column(name, justify="left" if name in ("variant", "methods and layers") else "right", overflow="fold")
    for variant in variants:
        points = variant["points"]
        grid.add_row(
            variant["name"] + (f" (control {variant['control']})" if variant["control"] else ""),
            ", ".join(f"{point['kind']} at {point['layer']}" for point in points),
            ", ".join(_number(point["kept_tokens"], 0) for point in points),
            _number(variant["layer_average_tokens"], 1),
            _number(variant["compression_ratio"], 3),
        )
    return grid


def _tree(document: dict[str, Any]) -> Tree:
    runs = {run["id"]: run for run in document["stage_runs"]}
    names = {cell["id"]: cell["name"] for cell in document["cells"]}
    root = Tree("stage tree")
    branches: dict[str, Tree] = {}
    for run in document["stage_runs"]:
        parent = branches[run["parent"]] if run["parent"] in runs else root
        whose = [names[identity] for identity in run["cells"]]
        cells = whose[0] if len(whose) == 1 else f"{len(whose)} cells"
        branches[run["id"]] = parent.add(
            f"{run['phase']} {run['first_step']}-{run['last_step']}  {run['variant']}  "
            f"{_number(run['cost'].get('train_tflops'))} TFLOPs  [{run['state']}]  {cells}".replace("[", r"\[")
        )
    return root


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "–"
    # What would round to nothing shows its first digits instead.
    return f"{value:.{digits}g}" if 0 < abs(value) < 10**-digits else f"{value:,.{digits}f}"
