"""Verbs on what an experiment says: validate, show, schema, compressors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from orchestrator.verbs.options import Json, Set, Spec, print_json, terminal


def validate(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    data: Annotated[
        bool, typer.Option("--data", help="Also reads every row and image and tries it with the model's processor.")
    ] = False,
) -> None:
    """Validate SPEC and report all errors, or `valid: N cells`."""
    from orchestrator.spec.loader import load_experiment

    loaded = load_experiment(spec, set_ or ())
    notices = list(loaded.notices)
    if data:
        from orchestrator.data.check import check_uses, uses_of_cells
        from orchestrator.plan.cells.expand import expand_cells

        notices += check_uses(uses_of_cells(expand_cells(loaded))).remarks
    if as_json:
        print_json({"valid": True, "cells": len(loaded.cells), "notices": notices, "faults": []})
        return
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    count = f"{len(loaded.cells)} cell{'s' if len(loaded.cells) != 1 else ''}"
    search = loaded.spec.search
    print(f"valid: {count}" if search is None else f"valid: a search of {search.num_trials} trials, {count} each")


def show(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="Defaults filled in, and where each came from.")] = False,
) -> None:
    """Show the experiment as it is understood: defaults filled in, names resolved."""
    from orchestrator.spec.loaded import resolved_yaml
    from orchestrator.spec.loader import load_experiment

    loaded = load_experiment(spec, set_ or ())
    if as_json:
        print_json({"spec": loaded.spec.model_dump(mode="json"), "sources": dict(loaded.sources)})
    else:
        print(resolved_yaml(loaded, with_sources=resolved), end="")


def schema(as_json: Json = True) -> None:
    """Print the JSON Schema of an experiment file, for an editor's completion; JSON with and without --json."""
    from orchestrator.spec.schema import experiment_schema

    print_json(experiment_schema())


def compressors(as_json: Json = False) -> None:
    """List the compressors, their parameters and where they can act."""
    from orchestrator.report.component_view import compressor_documents, print_compressors

    if as_json:
        print_json(compressor_documents())
    else:
        print_compressors(terminal())
