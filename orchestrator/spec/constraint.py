"""Constraint: a condition of a search on a metric, written `>= 0.7` or `>= full - 0.005`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_NUMBER = r"[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]{1,3})?"
_FORM = re.compile(
    rf"(?P<way>[<>]=)\s*(?:(?P<alone>[-+]?{_NUMBER})"
    rf"|(?P<name>[A-Za-z][A-Za-z0-9._-]*)(?:\s+(?P<sign>[-+])\s*(?P<offset>{_NUMBER}))?)"
)
_HELP = "a constraint is written `>= 0.7`, `<= full` or `>= full - 0.005`, with blanks around + and -"


@dataclass(frozen=True)
class Constraint:
    """A condition on a metric.

    Attributes:
        text: As it was written.
        is_least: Whether the limit is the least value allowed, else the most.
        reference: Schedule or variant whose value the limit is relative to; None for a plain number.
        offset: The limit, or what is added to the reference's value.
    """

    text: str
    is_least: bool
    reference: str | None
    offset: float

    def excess(self, value: float, references: float) -> float:
        """Return by how much a value is beyond the limit; at most 0 where it meets it.

        Args:
            value: The trial's.
            references: The reference's; 0 where there is none.
        """
        limit = references + self.offset
        return limit - value if self.is_least else value - limit


def _parsed(value: Any) -> Any:
    if isinstance(value, Constraint):
        return value
    form = _FORM.fullmatch(value.strip()) if isinstance(value, str) else None
    if form is None:
        raise ValueError(_HELP)
    offset = float(form["alone"] or (form["sign"] or "") + (form["offset"] or "0"))
    if not math.isfinite(offset):
        raise ValueError(_HELP)
    return Constraint(value.strip(), form["way"] == ">=", form["name"], offset)


ConstraintText = Annotated[
    Constraint,
    BeforeValidator(_parsed),
    PlainSerializer(lambda constraint: constraint.text, return_type=str),
    WithJsonSchema({"type": "string", "pattern": "^[<>]= *"}),
]
