"""Verbs on data: check, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.verbs.options import Json, Output, Set, Spec, print_json, write_document

if TYPE_CHECKING:
    from orchestrator.plan.cells.cell import Cell

app = typer.Typer(
    help="What the data of an experiment holds, and what the model gets of it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("check")
def check(spec: Spec, set_: Set = None, as_json: Json = False) -> None:
    """Read every row and picture: all errors by row, and lengths as the model gets them; exit code 1 for errors."""
    from orchestrator.data.inspect import check_document
    from orchestrator.report.pages.data_rows import check_text

    document = check_document(_cells(spec, set_))
    if as_json:
        print_json(document)
    else:
        print(check_text(document), end="")
    raise typer.Exit(0 if document["valid"] else 1)


@app.command("show")
def show(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    row: Annotated[
        int | None, typer.Option("--row", min=0, metavar="N", help="Its index in its file (default: the first).")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--data", metavar="NAME", help="Entry under `data` (default: what is trained on).")
    ] = None,
    form: Annotated[Literal["text", "html"], typer.Option("--format", help="For a terminal, or a page.")] = "text",
    output: Output = None,
) -> None:
    """Show one row as the model gets it: prompt, what of it is learned, tokens, lengths, pictures."""
    from orchestrator.data.inspect import row_document
    from orchestrator.report.pages.data_rows import row_page, row_text

    document = row_document(_cells(spec, set_), name, row)
    if as_json:
        print_json(document)
    else:
        write_document(row_page(document) if form == "html" else row_text(document), output)


def _cells(spec: Path, overrides: list[str] | None) -> tuple[Cell, ...]:
    """Return the grid's cells; of a search those that it starts from."""
    from orchestrator.plan.cells.expand import expand_cells
    from orchestrator.plan.experiment_plan import prepare

    walk = prepare(spec, overrides or ())
    return walk.cells or expand_cells(walk.loaded)
