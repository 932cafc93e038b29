"""`compressors`: the methods there are, what they take, and where they can act."""

from __future__ import annotations

from inspect import getdoc
from typing import Any

from rich.console import Console

from orchestrator import registry
from orchestrator.spec.components import AMOUNTS

_COMMON = ("kind", "layer", *AMOUNTS)


def compressor_documents() -> list[dict[str, Any]]:
    """Return one mapping a compressor: name, what it does, where it acts, its own parameters, its version."""
    found = []
    for kind in registry.kinds(registry.COMPRESSORS):
        cls = registry.spec_class(registry.COMPRESSORS, kind)
        properties = cls.model_json_schema()["properties"]
        parameters = {
            name: {key: value[key] for key in ("enum", "type", "default", "anyOf") if key in value}
            for name, value in properties.items()
            if name not in _COMMON
        }
        found.append(
            {
                "kind": kind,
                "does": (getdoc(cls) or "").split("\n")[0],
                "points": list(cls.points),
                "needs": list(cls.needs),
                "parameters": parameters,
                "version": cls.version,
                "module": cls.__module__,
            }
        )
    return found


def print_compressors(console: Console) -> None:
    """Return the compressors, a block each."""
    for document in compressor_documents():
        console.print(f"[bold]{document['kind']}[/bold]  ({', '.join(_places(document))})")
        console.print(f"    {document['does']}", highlight=False, markup=False)
        for name, value in document["parameters"].items():
            default = "null" if value.get("default") is None else value["default"]
            console.print(f"    {name}: {_allowed(value)} (default {default})", highlight=False, markup=False)
    console.print(
        "Every one takes `layer` and exactly one of stride, keep_tokens, keep_ratio, layer_average_tokens.",
        highlight=False,
    )


def _places(document: dict[str, Any]) -> list[str]:
    return [*document["points"], *(f"needs {need}" for need in document["needs"])]


def _allowed(value: dict[str, Any]) -> str:
    """Return what a JSON schema allows, in few words."""
    if "anyOf" in value:
        return " | ".join(dict.fromkeys(_allowed(one) for one in value["anyOf"]))
    return " | ".join(map(str, value["enum"])) if "enum" in value else str(value.get("type", "any"))
