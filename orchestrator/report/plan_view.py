"""`plan` on the screen: cells with what they cost and why they run, the stage tree, and the sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from orchestrator.report.tree_view import hours_text, number, print_cells, stage_tree, state_text, whose

_KEPT = {"full": "keeps checkpoint", "weights": "keeps weights", "none": "keeps nothing"}


def print_plan(document: dict[str, Any], console: Console) -> None:
    """Prints a plan document (DESIGN section 4)."""
    console.print(Text(document["experiment"], style="bold"))
    columns = {
        "train TFLOPs": lambda cell: number(cell["cost"].get("train_tflops")),
        "visual layer-tokens": lambda cell: number(cell["cost"].get("visual_layer_tokens"), 1),
        "CR": lambda cell: number(cell["cost"].get("compression_ratio"), 3),
        "why": lambda cell: str(cell.get("reason", "")),
    }
    print_cells(document["cells"], columns, console, right=("train TFLOPs", "visual layer-tokens", "CR"))
    if document["variants"]:
        console.print(_variants(document["variants"]))
    names = {cell["id"]: cell["name"] for cell in document["cells"]}
    console.print(stage_tree(document["stage_runs"], lambda run: _label(run, names), crop=console.is_terminal))
    for line in _totals(document["totals"]):
        console.print(line, highlight=False, markup=False)
    for notice in document.get("notices", ()):
        console.print(f"note: {notice}", highlight=False, markup=False)


def _label(run: Mapping[str, Any], names: Mapping[str, str]) -> Text:
    cost = number(run["cost"].get("train_tflops"))
    of = f" of {run['of']}" if run["of"] else ""
    return Text("  ").join(
        [
            Text(f"{run['phase']} {run['first_step']}-{run['last_step']}{of}"),
            Text(run["variant"], style="bold"),
            state_text(run["state"]),
            Text(f"{cost} TFLOPs"),
            Text(_KEPT[run["keep"]], style="dim"),
            Text(whose([names[identity] for identity in run["cells"]])),
        ]
    )


def _totals(totals: Mapping[str, Any]) -> list[str]:
    """What sharing saves, what is done, and what it takes."""
    alone, shared, ratio = (totals.get(f"train_{name}") for name in ("tflops_alone", "tflops_shared", "ratio"))
    saved = "" if ratio is None else f" (ratio {ratio:.3f}: sharing saves {1 - ratio:.0%})"
    lines = [
        f"{totals['cells']:,} cells: {totals['stage_runs']:,} stage runs for {totals['stage_runs_alone']:,} alone, "
        f"{totals['stage_runs_done']:,} done; {totals['evaluations']:,} evaluations for "
        f"{totals['evaluations_alone']:,} alone, {totals['evaluations_done']:,} done",
        f"train TFLOPs {number(shared)} shared, {number(alone)} alone{saved}; "
        f"disk at most {number(totals.get('disk_peak_gib'))} GiB",
    ]
    return [*lines, hours] if (hours := hours_text(totals)) else lines


def _variants(variants: list[dict[str, Any]]) -> RichTable:
    """What each variant keeps of an image."""
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
