"""JSON documents that show themselves to people, and those that list components: `components` and `compressors`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from inspect import getdoc
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator import registry
from orchestrator.errors import UsageError
from orchestrator.spec.components import AMOUNTS

_COMMON = ("kind", "layer", *AMOUNTS)


class Printed:
    """What also shows itself to people: by `print`, and in a notebook."""

    _printer: Callable[[Any, Console], None]

    def print(self, console: Console | None = None) -> None:
        """Print it for people; None prints to standard output."""
        self._printer(self, console or Console())

    def to_text(self) -> str:
        """Return what `print` prints, without colours and as wide as it is."""
        console = Console(file=(out := io.StringIO()), width=10_000, color_system=None)
        self.print(console)
        return out.getvalue()

    def __str__(self) -> str:
        return self.to_text().rstrip("\n")

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=140)
        self.print(console)
        return console.export_html(inline_styles=True, code_format='<pre style="line-height: 1.3">{code}</pre>')


class Document(Printed, dict[str, Any]):
    """A JSON document that also shows itself to people.

    Args:
        content: The document.
        printer: Prints it to a console.
        page: Makes an HTML page of it, which a notebook shows in the place of what is printed.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        printer: Callable[[dict[str, Any], Console], None],
        page: Callable[..., str] | None = None,
    ) -> None:
        super().__init__(content)
        self._printer, self._page = printer, page

    def __repr__(self) -> str:
        return f"<Document of {', '.join(self)}>"

    def to_html(self, **options: Any) -> str:
        """Return it as an HTML page of its own; `options` are those of the page."""
        assert self._page is not None, "only predictions and rows of data have a page"
        return self._page(self, **options)

    def _repr_html_(self) -> str:
        if self._page is None:
            return super()._repr_html_()
        # In a frame, so that its style stays in it.
        return f'<iframe srcdoc="{escape(self.to_html())}" width="100%" height="600"></iframe>'


class Documents(Printed, list[dict[str, Any]]):
    """A JSON list that also shows itself to people.

    Args:
        content: The list.
        printer: Prints it to a console.
    """

    def __init__(self, content: Iterable[dict[str, Any]], printer: Callable[[list[dict[str, Any]], Console], None]):
        super().__init__(content)
        self._printer = printer

    def __repr__(self) -> str:
        return f"<Documents: {len(self)}>"


def finite(value: Any) -> Any:
    """Return a document with null for what is no number, which JSON has not: a loss may have diverged."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compressors() -> Documents:
    """Return one mapping a compressor: name, what it does, where it acts, its own parameters, its version."""
    return Documents(map(_compressor, registry.kinds(registry.COMPRESSORS)), _print_compressors)


def _compressor(kind: str) -> dict[str, Any]:
    cls = registry.spec_class(registry.COMPRESSORS, kind)
    parameters = {
        name: {key: value[key] for key in ("enum", "type", "default", "anyOf") if key in value}
        for name, value in cls.model_json_schema()["properties"].items()
        if name not in _COMMON
    }
    about = {"kind": kind, "does": _first_line(cls), "points": list(cls.points), "needs": list(cls.needs)}
    return {**about, "parameters": parameters, "version": cls.version, "module": cls.__module__}


def _first_line(cls: type[Any]) -> str:
    return (getdoc(cls) or "").partition("\n")[0]


def _print_compressors(documents: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a block for each compressor."""
    for document in documents:
        places = [*document["points"], *(f"needs {need}" for need in document["needs"])]
        console.print(f"[bold]{document['kind']}[/bold]  ({', '.join(places)})")
        console.print(f"    {document['does']}", highlight=False, markup=False)
        for name, value in document["parameters"].items():
            default = "null" if value.get("default") is None else value["default"]
            console.print(f"    {name}: {_allowed(value)} (default {default})", highlight=False, markup=False)
    console.print(
        "Every one takes `layer` and exactly one of stride, keep_tokens, keep_ratio, layer_average_tokens.",
        highlight=False,
    )


def _allowed(value: dict[str, Any]) -> str:
    """Return what a JSON schema allows, in few words."""
    if "anyOf" in value:
        return " | ".join(dict.fromkeys(_allowed(one) for one in value["anyOf"]))
    if "const" in value or "enum" in value:
        return " | ".join(map(str, value.get("enum", [value.get("const")])))
    if value.get("type") == "array" and "items" in value:
        return f"list of {_allowed(value['items'])}"
    return str(value.get("$ref", value.get("type", "any"))).rpartition("/")[2]


def components(wanted: str | None = None, *, plugins: Sequence[str] = ()) -> Documents:
    """Return one mapping a component: sort, kind, what it does, its fields with types, defaults and descriptions.

    Args:
        wanted: One kind, or one sort (`schedules`); None for all.
        plugins: Plug-in files or modules to include.

    Raises:
        UsageError: there is no such kind or sort.
    """
    for reference in plugins:
        registry.load_plugin(reference, Path.cwd())
    found = [
        (sort, kind)
        for sort, group in registry.SORTS.items()
        for kind in registry.kinds(group)
        if wanted in (None, kind, sort)
    ]
    if not found:
        kinds = [kind for group in registry.SORTS.values() for kind in registry.kinds(group)]
        hint = registry.did_you_mean(str(wanted), [*registry.SORTS, *kinds]) or f"sorts are {', '.join(registry.SORTS)}"
        raise UsageError(f"components: no kind or sort {wanted!r}; {hint}")
    printer = partial(_print_components, with_fields=wanted is not None)
    return Documents((_component(sort, kind) for sort, kind in found), printer)


def _component(sort: str, kind: str) -> dict[str, Any]:
    cls = registry.spec_class(registry.SORTS[sort], kind)
    schema = cls.model_json_schema(mode="validation")
    fields = {}
    for name, value in schema["properties"].items():
        if name == "kind":
            continue
        required = name in schema.get("required", ())
        fields[name] = {
            "type": _allowed(value),
            "required": required,
            "default": None if required else value.get("default"),
            "description": " ".join(value.get("description", "").split()),
        }
    names = ("points", "needs", "learns") if sort == "compressors" else ()
    about = {"sort": sort, "kind": kind, "does": _first_line(cls), "version": cls.version, "module": cls.__module__}
    return {**about, **{name: getattr(cls, name) for name in names}, "fields": fields}


def _print_components(documents: Sequence[dict[str, Any]], console: Console, with_fields: bool) -> None:
    """Print components by sort: a line each, or with every field and its description."""
    for sort, members in groupby(documents, key=lambda document: document["sort"]):
        console.print(f"[bold]{sort}[/bold]")
        for document in members:
            console.print(f"  {document['kind']}: {document['does']}", highlight=False, markup=False)
            if not with_fields:
                continue
            for name, value in document["fields"].items():
                default = "required" if value["required"] else f"default {_shown(value['default'])}"
                about = f"  {value['description']}" if value["description"] else ""
                console.print(f"      {name}: {value['type']} ({default}){about}", highlight=False, markup=False)
    if not with_fields:
        console.print("`llavolta components KIND` shows its fields.", highlight=False)


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | None) else str(value)
