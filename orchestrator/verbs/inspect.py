"""Verbs that read what is stored: plan, status, table, logs, path."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

import orchestrator as llv
from orchestrator.verbs.options import CellName, Json, Set, Spec, Specs, print_document, print_json, terminal


def plan(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    text_tokens: Annotated[
        int | None, typer.Option("--text-tokens", min=0, metavar="N", help="Text tokens a sample (default: measured).")
    ] = None,
) -> None:
    """Show the cells, the stage tree, what is done already, and the cost, alone and shared."""
    document = llv.load(spec, set_ or ()).plan(text_tokens=text_tokens)
    if as_json:
        print_json(document)
    else:
        document.print(terminal())


def status(specs: Specs, set_: Set = None, as_json: Json = False) -> None:
    """Show what runs where, what is done, waiting or failed and why, and the time left; works beside a live run."""
    documents = [experiment.status() for experiment in [llv.load(spec, set_ or ()) for spec in specs]]
    if as_json:
        print_json(documents[0] if len(documents) == 1 else documents)
        return
    for document in documents:
        document.print(terminal())


def table(
    specs: Specs,
    set_: Set = None,
    as_json: Json = False,
    form: Annotated[
        Literal["md", "csv", "latex", "json"] | None, typer.Option("--format", help="For a paper or a script.")
    ] = None,
    all_metrics: Annotated[bool, typer.Option("--all", help="Every metric, not the headline ones.")] = False,
) -> None:
    """Print the ablation table of one or several experiments."""
    found = llv.table([llv.load(spec, set_ or ()) for spec in specs], all_metrics=all_metrics)
    if form or as_json:
        print_document(found.render("json" if as_json else form or "md"))
    else:
        found.print(terminal())


def logs(spec: Spec, cell: CellName, set_: Set = None, as_json: Json = False) -> None:
    """Print the logs of a cell's stage runs and evaluations, in order."""
    found = llv.load(spec, set_ or ()).cell(cell)
    if as_json:
        print_json({str(path): path.read_text(errors="replace") for path in found.log_files})
    else:
        print(found.logs())


def path(spec: Spec, cell: CellName, set_: Set = None, as_json: Json = False) -> None:
    """Print the folder of a cell's weights, model.safetensors alone; `export` writes what transformers loads."""
    found = llv.load(spec, set_ or ()).cell(cell)
    weights = found.weights_path
    if as_json:
        print_json({"cell": found.name, "id": found.id, "weights": str(weights), "exists": weights.exists()})
    elif not weights.exists():
        raise llv.UsageError(
            f"cell {found.name} has no weights yet: {weights} does not exist; run the experiment first"
        )
    else:
        print(weights)
