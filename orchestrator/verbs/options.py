"""What verbs have in common: their arguments, and how they print."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="Experiment file.")]
Specs = Annotated[list[Path], typer.Argument(metavar="SPEC...", help="Experiment files; several make one table.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Overrides a value of the file.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and nothing else.")]
CellName = Annotated[str, typer.Option("--cell", metavar="CELL", help="A name, an id's beginning, or axis=value.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write (default: standard output).")
]

_document_stream: TextIO | None = None


def keep_output_for_json() -> None:
    """Keep standard output for the JSON document alone: whatever else is printed goes to standard error.

    Frameworks print from C++, child processes and at exit, so the file descriptor is moved, for good.
    """
    global _document_stream
    if _document_stream is not None:
        return
    sys.stdout.flush()
    _document_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def print_json(document: Any) -> None:
    """Print one JSON document to standard output, on one line; what JSON has no number for (NaN, infinity) is null.

    Indented, 10,000 cells take Python's own encoder, and with it twice as long to plan.
    """
    try:
        text = json.dumps(document, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(document), default=str)
    print_document(text)


def print_document(text: str) -> None:
    """Write a document to standard output, past whatever prints there."""
    print(text, file=_document_stream or sys.stdout, flush=True)


def write_document(text: str, file: Path | None) -> None:
    """Write a document, which ends in a line end, to a file or to standard output."""
    if file is None:
        print(text, end="", flush=True)
    else:
        file.write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def terminal(*, error: bool = False) -> Console:
    """Return standard output for people; where it is no terminal, as wide as $COLUMNS says, else 200.

    Args:
        error: Return standard error instead, where standard output is kept for a JSON document.
    """
    from rich.console import Console

    if error:
        return Console(stderr=True)
    has_width = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(soft_wrap=not has_width, width=None if has_width else 200)


def warn_unsent(cells: Sequence[str], problem: str | None, notes: Sequence[str] = ()) -> None:
    """Say on standard error which cells MLflow has not recorded, and why; nothing where there is no problem."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if problem:
        print(
            f"MLflow has not recorded {', '.join(cells)}: {problem}\n"
            "nothing is lost: run the same command when the server is up",
            file=sys.stderr,
        )
