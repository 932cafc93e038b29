"""Verbs that look: plan, status, table, logs, path."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Literal

import typer

from orchestrator.errors import UsageError
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
    from orchestrator.plan.documents.plan_document import plan_document
    from orchestrator.plan.experiment_plan import prepare

    walk = prepare(spec, set_ or ())
    with walk.ledger.snapshot():
        document = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger, text_tokens=text_tokens)
    if as_json:
        print_json(document)
        return
    from orchestrator.report.plan_view import print_plan

    print_plan(document, terminal())


def status(specs: Specs, set_: Set = None, as_json: Json = False) -> None:
    """Show what runs where, what is done, waiting or failed and why, and the time left; works beside a live run."""
    from orchestrator.plan.experiment_plan import prepare
    from orchestrator.report.status_view import print_status, status_document

    documents = []
    for walk in [prepare(spec, set_ or ()) for spec in specs]:
        with walk.ledger.snapshot():
            documents.append(status_document(walk))
    if as_json:
        print_json(documents[0] if len(documents) == 1 else documents)
    else:
        for document in documents:
            print_status(document, terminal())


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
    from orchestrator.plan.experiment_plan import prepare
    from orchestrator.report.ending import print_table
    from orchestrator.report.table import render, table_of

    walks = [prepare(spec, set_ or ()) for spec in specs]
    with ExitStack() as stack:
        for walk in walks:
            stack.enter_context(walk.ledger.snapshot())
        grid = table_of(walks, all_metrics=all_metrics)
    if form or as_json:
        print_document(render(grid, "json" if as_json else form or "md"))
    else:
        print_table(grid, terminal())


def logs(spec: Spec, cell: CellName, set_: Set = None, as_json: Json = False) -> None:
    """Print the logs of a cell's stage runs and evaluations, in order."""
    from orchestrator.plan.experiment_plan import prepare
    from orchestrator.report.cell_folders import log_files

    walk = prepare(spec, set_ or ())
    found = log_files(walk, walk.find(cell))
    if as_json:
        print_json({str(path): path.read_text(errors="replace") for path in found})
        return
    if not found:
        raise UsageError(f"cell {walk.find(cell).name} has no log yet: it has not run in {walk.ledger.url}")
    for path in found:
        print(f"==> {path} <==\n{path.read_text(errors='replace')}")


def path(spec: Spec, cell: CellName, set_: Set = None, as_json: Json = False) -> None:
    """Print the folder of a cell's weights; those in a bucket are downloaded first."""
    from orchestrator.plan.experiment_plan import prepare
    from orchestrator.report.cell_folders import weights_folder

    walk = prepare(spec, set_ or ())
    found = walk.find(cell)
    weights = weights_folder(walk, found)
    if as_json:
        print_json({"cell": found.name, "id": found.id, "weights": str(weights), "exists": weights.exists()})
        return
    if not weights.exists():
        raise UsageError(f"cell {found.name} has no weights yet: {weights} is not there; run the experiment first")
    print(weights)
