"""What MLflow accepts: names, lengths, finite numbers, sizes of a request."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
TAGS_PER_REQUEST = 100
NAME_CHARACTERS = 250
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000


def accepted_name(name: str) -> str:
    """Return name with every character MLflow refuses replaced by `_`, and no part that reads as a parent folder."""
    clean = re.sub(r"[^A-Za-z0-9_.:/ -]", "_", name)[:NAME_CHARACTERS]
    parts = [part if part.strip(".") else part.replace(".", "_") for part in clean.split("/") if part]
    return "/".join(parts) or "_"


def accepted_value(value: float) -> float | None:
    """Return a plain finite float, or None: MLflow stores infinity as 1.8e308, and NaN breaks its charts."""
    number = float(value)
    return number if math.isfinite(number) else None


def shortened(text: str, most_characters: int) -> str:
    """Return the text, its end replaced by an ellipsis where it is too long."""
    return text if len(text) <= most_characters else text[: most_characters - 1] + "…"


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Return the stretches of at most `size` values."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
