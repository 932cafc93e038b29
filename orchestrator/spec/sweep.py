"""Sweeps: a mapping under `evaluate.NAME.under`, each combination of whose values is a variant that only tests."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from orchestrator import registry
from orchestrator.spec.base import Name

_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")
_NAME: TypeAdapter[str] = TypeAdapter(Name)


def _as_values(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Sweep = Annotated[
    dict[str, Annotated[tuple[Any, ...], BeforeValidator(_as_values)]],
    WithJsonSchema({"type": "object", "required": ["kind"], "additionalProperties": True}),
]
"""`kind` and parameters of compressors, each with one value or a list of values."""


@dataclass(frozen=True)
class Combination:
    """One combination of a sweep's values: a point that the model is tested under.

    Attributes:
        values: The point as a mapping, `kind` first.
        index: Key to the number of its value in the sweep's list.
    """

    values: Mapping[str, Any]
    index: Mapping[str, int]

    def point(self) -> Any:
        """Return the compressor's spec.

        Raises:
            ValidationError: the method does not take these values.
            KeyError: there is no method of this kind.
        """
        return registry.spec_class(registry.COMPRESSORS, self.values["kind"]).model_validate(self.values)

    def name(self, point: Any) -> str:
        """Return the variant's name, such as `average_pool_layer2_stride8`: its kind and all that the sweep gives."""
        texts = ((key, _text(getattr(point, key))) for key in self.values if key != "kind")
        return "_".join([point.kind, *(f"{key}{'' if text[0].isdigit() else '_'}{text}" for key, text in texts)])

    def place(self, key: str) -> tuple[str | int, ...]:
        """Return the path of a key's value below the sweep; the sweep itself for a key it does not give."""
        return (key, self.index[key]) if key in self.index else ()


def combinations(sweep: Mapping[str, Sequence[Any]]) -> list[Combination]:
    """Return every combination of a sweep's values, the last key's values changing fastest."""
    keys = ["kind", *(key for key in sweep if key != "kind")]
    choices = itertools.product(*(enumerate(sweep[key]) for key in keys))
    return [
        Combination(
            {key: value for key, (_, value) in zip(keys, chosen, strict=True)},
            {key: index for key, (index, _) in zip(keys, chosen, strict=True)},
        )
        for chosen in choices
    ]


def swept(sweep: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the points of a sweep without errors by the names of their variants."""
    points = ((each, each.point()) for each in combinations(sweep))
    return {each.name(point): point for each, point in points}


def given(sweep: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Return what a sweep without errors gives of each of its variants, by name: `kind` first, then its other keys."""
    found = {}
    for each in combinations(sweep):
        point = each.point()
        values = {key: getattr(point, key) for key in each.values}
        found[each.name(point)] = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in values.items()}
    return found


def swept_names(value: Any) -> list[str]:
    """Return the names of a sweep as it stands in a file; none where it has errors."""
    try:
        return list(swept(TypeAdapter(Sweep).validate_python(value)))
    except (ValidationError, KeyError, ImportError, AttributeError):
        return []


def check_sweeps(under: tuple[str | Sweep, ...]) -> tuple[str | Sweep, ...]:
    """Return what a model is tested under, each combination of its sweeps a valid point with a name of its own."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    names = {entry for entry in under if isinstance(entry, str)}
    for number, entry in enumerate(under):
        if isinstance(entry, str):
            continue
        for loc, kind, message, context in _problems(entry, names):
            error = {"loc": (number, *loc), "type": kind, "msg": message, "ctx": context}
            found.setdefault((number, *loc, message), error)
    if found:
        raise PydanticCustomError("component", "errors inside", {"errors": list(found.values())})
    return under


_Problem = tuple[tuple[str | int, ...], str, str, dict[str, Any]]


def _problems(sweep: Mapping[str, Sequence[Any]], names: set[str]) -> Iterator[_Problem]:
    empty = [key for key, values in sweep.items() if not values]
    if "kind" not in sweep or empty:
        for key in empty:
            yield (key,), "sweep", "at least one value is needed", {}
        if "kind" not in sweep:
            yield (), "sweep", "a sweep needs the key `kind`: a method, or a list of methods", {}
        return
    for each in combinations(sweep):
        kind, known = each.values["kind"], registry.kinds(registry.COMPRESSORS)
        if kind not in known:
            near = registry.did_you_mean(kind, known) if isinstance(kind, str) else None
            text = f"unknown kind `{kind}`; {near or 'there are ' + ', '.join(known)}"
            yield each.place("kind"), "sweep", text, {}
            continue
        try:
            point = each.point()
        except ValidationError as error:
            yield from _invalid(each, error)
            continue
        except (ImportError, AttributeError) as error:
            yield each.place("kind"), "sweep", f"the component {kind} cannot be imported: {error}", {}
            continue
        if point.learns:
            text = (
                f"{kind} learns: it has weights only where a phase trained it under its own variant; name that "
                "variant under `under` instead"
            )
            yield each.place("kind"), "sweep", text, {}
            continue
        name = each.name(point)
        if name in names:
            yield (), "sweep", f"`{name}` is tested twice; give each value once", {}
        names.add(name)
        try:
            _NAME.validate_python(name)
        except ValidationError:
            text = f"`{name}` is no name (letters, digits, `.`, `_` and `-`, at most 64); name it under `compressors`"
            yield (), "sweep", text, {}


def _invalid(each: Combination, error: ValidationError) -> Iterator[_Problem]:
    cls = registry.spec_class(registry.COMPRESSORS, each.values["kind"])
    for raw in error.errors():
        loc, kind = raw["loc"], raw["type"]
        key = str(loc[0]) if loc else ""
        if kind == "extra_forbidden":
            known = ", ".join(name for name in cls.model_fields if name != "kind")
            text = f"{each.values['kind']} has no parameter `{key}`; it has {known}"
            yield (key, 0), "sweep", text, {}
        elif kind == "missing":
            yield loc, kind, raw["msg"], {}
        else:
            where = (*each.place(key), *loc[1:])
            text = str(raw["ctx"]["error"]) if kind == "value_error" else raw["msg"]
            own = kind if where else "sweep"
            yield where, own, text if where else f"{each.values['kind']}: {text}", dict(raw.get("ctx", {}))


def _text(value: Any) -> str:
    """Return a value as a part of a name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Fraction):
        decimal = f"{float(value):.6g}"
        return decimal if Fraction(decimal) == value else f"{value.numerator}of{value.denominator}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return _UNSAFE.sub("-", text.replace("%", "pct")).strip("-") or "none"
