"""Verbs on components: what there is of compressors, schedules, data kinds and evaluations, and whether one holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from orchestrator import registry
from orchestrator.errors import UsageError
from orchestrator.report.component_view import component_documents, print_components
from orchestrator.verbs.options import Json, print_json, terminal

_Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="FILE", help="A plug-in file or module to include; repeatable.")
]


def components(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="One kind (average_pool), or one sort (schedules); by default all."),
    ] = None,
    plugin: _Plugins = None,
    spec: Annotated[
        Path | None, typer.Option("--spec", metavar="SPEC", help="Include the plug-ins of an experiment file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List every compressor, schedule, data kind, evaluation and tracker with its fields, types and defaults."""
    for reference in plugin or ():
        registry.load_plugin(reference, Path.cwd())
    if spec is not None:
        from orchestrator.spec.loader import load_experiment  # loading an experiment takes seconds, this verb need not

        load_experiment(spec)
    documents = component_documents(kind)
    if as_json:
        print_json(documents)
    else:
        print_components(documents, terminal(), with_fields=kind is not None)


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="A plug-in file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KIND.FIELD=VALUE", help="A field's value, where the kit needs one."),
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option("--family", metavar="NAME", help="Check compressors on these model families only; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the contract kit on every component that a plug-in file defines; exit code 1 if one breaks its contract."""
    from orchestrator.testing.contract import check_file  # the kits import torch

    results = []
    for one in check_file(file, _values(set_ or ()), family):
        results.append(one)
        if as_json:
            continue
        print(f"{one.sort} {one.kind}: {'broken' if one.broken else 'holds'}")
        for line in (*one.broken, *one.report):
            print(f"  {line}")
    if as_json:
        print_json([{**vars(one), "holds": not one.broken} for one in results])
    if any(one.broken for one in results):
        raise typer.Exit(1)


def _values(settings: Any) -> dict[str, dict[str, Any]]:
    """Return values by kind and field of `KIND.FIELD=VALUE`, values as YAML."""
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        kind, dot, name = path.partition(".")
        if not (equals and dot and kind and name):
            raise UsageError(f"--set {setting}: write KIND.FIELD=VALUE, e.g. my_rows.data_path=rows.json")
        found.setdefault(kind, {})[name] = yaml.safe_load(value)
    return found
