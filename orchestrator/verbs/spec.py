"""Verbs on what an experiment says: validate, show, schema, compressors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import orchestrator as llv
from orchestrator.verbs.options import Json, Set, Spec, print_json, terminal


def validate(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    data: Annotated[
        bool, typer.Option("--data", help="Also reads every row and image and tries each with the model's processor.")
    ] = False,
) -> None:
    """Validate SPEC and report all errors, or `valid: N cells`."""
    experiment = llv.load(spec, set_ or ())
    notices = [*experiment.notices, *(experiment.check_data() if data else ())]
    number = len(experiment.loaded.cells)
    if as_json:
        print_json({"valid": True, "cells": number, "notices": notices, "faults": []})
        return
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    count = f"{number} cell{'s' if number != 1 else ''}"
    search = experiment.spec.search
    print(f"valid: {count}" if search is None else f"valid: a search of {search.num_trials} trials, {count} each")


def show(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="Defaults filled in, and where each came from.")] = False,
) -> None:
    """Show the experiment as it is understood: defaults filled in, names resolved."""
    experiment = llv.load(spec, set_ or ())
    if as_json:
        print_json({"spec": experiment.spec.model_dump(mode="json"), "sources": dict(experiment.loaded.sources)})
    else:
        print(experiment.to_yaml(sources=resolved), end="")


def schema(as_json: Json = True) -> None:
    """Print the JSON Schema of an experiment file, for an editor's completion; JSON with and without --json."""
    print_json(llv.experiment_schema())


def compressors(as_json: Json = False) -> None:
    """List the compressors, their parameters and where they can act."""
    from orchestrator.report.component_view import compressor_documents, print_compressors

    if as_json:
        print_json(compressor_documents())
    else:
        print_compressors(terminal())
