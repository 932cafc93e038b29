"""Verbs on what a cell came to: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.verbs.options import CellName, Json, Set, Spec, print_json


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
    from orchestrator.models.export import export_cell
    from orchestrator.plan.experiment_plan import prepare

    walk = prepare(spec, set_ or ())
    found = walk.find(cell)
    written = export_cell(walk, found, folder, adapter=adapter)
    if as_json:
        print_json({"cell": found.name, "id": found.id, "folder": str(written), "adapter": adapter})
    else:
        print(written)
