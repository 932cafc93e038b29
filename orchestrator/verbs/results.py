"""Verbs on what a cell came to: export, predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

import orchestrator as llv
from orchestrator.verbs.options import CellName, Json, Output, Set, Spec, print_json, write_document


def export(
    spec: Spec,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    cell: CellName,
    set_: Set = None,
    as_json: Json = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="LoRA as a peft adapter beside its base's name; else it is merged.")
    ] = False,
) -> None:
    """Write a cell as a Hugging Face folder that transformers loads, its compressor recorded in llavolta.json."""
    found = llv.load(spec, set_ or ()).cell(cell)
    written = found.export(folder, adapter=adapter)
    if as_json:
        print_json({"cell": found.name, "id": found.id, "folder": str(written), "adapter": adapter})
    else:
        print(written)


def predictions(
    spec: Spec,
    cell: CellName,
    set_: Set = None,
    as_json: Json = False,
    evaluation: Annotated[
        str | None, typer.Option("--evaluation", metavar="NAME", help="Entry under `evaluate` (default: the only one).")
    ] = None,
    under: Annotated[
        str | None, typer.Option("--under", metavar="VARIANT", help="What it was tested under (default: final).")
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only what was answered wrong.")] = False,
    form: Annotated[
        Literal["jsonl", "html"], typer.Option("--format", help="A line for each answer, or a page of pictures.")
    ] = "jsonl",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="The first N (default: all; in HTML 200).")
    ] = None,
    output: Output = None,
) -> None:
    """Print every answer of an evaluation beside the question, the paths of the pictures and the right answer."""
    document = llv.load(spec, set_ or ()).cell(cell).predictions(evaluation, under=under, wrong=wrong)
    if as_json:
        print_json({**document, "predictions": document["predictions"][:limit]})
    elif form == "html":
        write_document(document.to_html(**({} if limit is None else {"limit": limit})), output)
    else:
        lines = (json.dumps(each, ensure_ascii=False) for each in document["predictions"][:limit])
        write_document("".join(f"{line}\n" for line in lines), output)
