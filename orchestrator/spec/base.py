"""What every part of an experiment file is made of: frozen models that refuse unknown keys, and exact numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, WithJsonSchema

Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Integer = Annotated[int, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def parse_share(value: Any) -> Fraction:
    """Return an exact share from `1/4`, `25%`, `0.25` or a whole number; decimals are read as written, not as binary.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a share is written 1/4, 25% or 0.25")
    text = str(value).strip()
    if len(text) > 32 or not re.fullmatch(r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]{1,2})?(/[0-9]+)?%?", text):
        raise ValueError("a share is written 1/4, 25% or 0.25")
    try:
        share = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError("a share is written 1/4, 25% or 0.25") from None
    return share


def _share_in_unit(value: Any) -> Fraction:
    share = parse_share(value)
    if not 0 < share <= 1:
        raise ValueError("a share is more than 0 and at most 1")
    return share


Share = Annotated[
    Fraction,
    BeforeValidator(_share_in_unit),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "string"}]}),
]


class Spec(BaseModel):
    """A part of an experiment file: frozen, unknown keys refused, every field described by the docstring below it.

    `aliases` maps other frameworks' names to the canonical ones; the loader renames them and says so.
    `not_identity` names fields that never change what a cell is (docs/concepts/identity.md), `added_later` those that
    do not while they have their defaults, so that what was trained before there were such fields is still the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    aliases: ClassVar[dict[str, str]] = {}
    not_identity: ClassVar[frozenset[str]] = frozenset()
    added_later: ClassVar[frozenset[str]] = frozenset()

    def as_before(self) -> frozenset[str]:
        """Return the fields of `added_later` that have their defaults."""
        fields = type(self).model_fields
        return frozenset(name for name in self.added_later if getattr(self, name) == fields[name].default)


class Component(Spec):
    """A spec chosen by its `kind` and extended by entry points: a compressor, schedule, data kind or evaluation.

    A subclass declares `kind: Literal["name"] = "name"`. Its module imports no torch.

    Attributes:
        registry_group: Entry-point group of the family; set by the family's base class.
        implementation: `module:Class` that does the work; imported on the worker only.
        version: Raised when a change of the implementation moves numbers; part of a cell's identity.
        path_fields: Fields that hold paths; the loader makes them absolute from the file that writes them.
    """

    kind: str
    """Name of the component: a built-in one, or one of a plug-in. `llavolta components` lists them."""

    registry_group: ClassVar[str] = ""
    implementation: ClassVar[str] = ""
    version: ClassVar[int] = 1
    path_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def kind_name(cls) -> str:
        """Return the `kind` this class answers to."""
        return str(cls.model_fields["kind"].default)


def validation_text(error: ValidationError) -> str:
    """Return what pydantic found wrong on one line, errors inside a component unfolded; for values without a file."""
    return _text(error.errors())


def _text(errors: Sequence[Any]) -> str:
    parts = []
    for each in errors:
        context = each.get("ctx") or {}
        if inner := context.get("errors"):
            parts.append(_text(inner))
            continue
        text = ": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"])))
        known = context.get("known")
        parts.append(f"{text} (known: {', '.join(known)})" if known else text)
    return "; ".join(parts)
