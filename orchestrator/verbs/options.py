"""What verbs have in common: their arguments, and how they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="Experiment file.")]
Specs = Annotated[list[Path], typer.Argument(metavar="SPEC...", help="Experiment files; several make one table.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Overrides a value of the file.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and nothing else.")]
CellName = Annotated[str, typer.Option("--cell", metavar="CELL", help="A name, an id's beginning, or axis=value.")]

MaxHours = Annotated[
    float | None,
    typer.Option(
        "--max-hours", min=0, metavar="H", help="After H hours: checkpoint, stop, exit 75; run again goes on."
    ),
]


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, indent=2, default=str))


def terminal() -> Any:
    """Standard output for people: wide where it is no terminal."""
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)


def tell_unsent(cells: Sequence[str], problem: str | None, notes: Sequence[str] = ()) -> None:
    """Says on standard error which cells MLflow has not recorded, and why; nothing where there is no problem."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if problem:
        print(
            f"MLflow has not recorded {', '.join(cells)}: {problem}\n"
            "nothing is lost: run the same command when the server is up",
            file=sys.stderr,
        )
