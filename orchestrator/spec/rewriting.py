"""How a value of the wrong type is to be written: numbers in quotes, `2,000`, `3%`, `yes`, `None`, a bare name."""

from __future__ import annotations

import re
from typing import Any

from orchestrator.errors import shorten
from orchestrator.spec.node import Node, as_yaml
from orchestrator.spec.yaml_tree import read_value

_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
_SPACED = re.compile(r"[-+]?[0-9]{1,3}( [0-9]{3})+")
_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]+,[0-9]{1,2}")
_PERCENT = re.compile(r"([-+]?[0-9]*\.?[0-9]+) ?%")
_FRACTION = re.compile(r"([0-9]+) ?/ ?([0-9]+)")
_POWER = re.compile(r"([0-9.]+) ?(?:\*|x|×) ?10 ?(?:\^|\*\*) ?([-+]?[0-9]+)")
_SUFFIX = {"k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6, "b": 10**9, "B": 10**9}
_NULLS = ("none", "null", "nil", "~", "", "n/a", "undefined")
_TRUE = ("yes", "y", "on", "true", "t", "1", "enable", "enabled")
_FALSE = ("no", "n", "off", "false", "f", "0", "disable", "disabled")


def rewriting(node: Node, allowed: str, path: str) -> str | None:
    """How to write a value so that it is of the type that belongs there; None where that is not plain.

    Args:
        node: The value as it stands in the file.
        allowed: What may stand there, in the words of the messages: `a number or a mapping of keys`.
        path: Its dotted path, for an axis.
    """
    value = node.value
    if isinstance(value, str):
        return _of_text(value.strip(), "quotes" if node.text is None else "", allowed)
    if node.is_list and node.value and "list" not in allowed and not path.startswith(("matrix", "zip", "report")):
        if any(item.is_mapping or item.is_list for item in node.value):
            return None
        return f"several values are an axis of the grid: matrix: {{{path}: {node.written()}}}"
    if isinstance(value, bool):
        return _quoted(node, allowed)
    if isinstance(value, int | float):
        if "true or false" in allowed and value in (0, 1):
            return f"write {'true' if value else 'false'}"
        if isinstance(value, float) and value.is_integer() and "whole number" in allowed:
            return f"write {int(value)}"
        return _listed(node, allowed) or _quoted(node, allowed)
    return None


def _of_text(text: str, quotes: str, allowed: str) -> str | None:
    low = text.lower()
    if "number" in allowed and (found := _number(text)) is not None:
        value, how = found
        if "a number" not in allowed:
            if not float(value).is_integer():
                return None  # a share or a rate where a count belongs: another key is meant
            value = int(value)
        written = text if not how else f"{value:.12g}" if isinstance(value, float) else str(value)
        return f"write {written} without quotes" if not how else f"write {written}, {how}"
    if "true or false" in allowed and low in (*_TRUE, *_FALSE):
        return f"write {'true' if low in _TRUE else 'false'}" + (
            " without quotes" if quotes and low in ("true", "false") else ""
        )
    if low in _NULLS and allowed:
        return "write null, or leave the key out: both take the default"
    if "a list" in allowed and text:
        return f"write [{shorten(text.strip('[]'))}]"
    return None


def _number(text: str) -> tuple[float | int, str] | None:
    """The number a text means, and what has to change in how it is written (nothing but the quotes: an empty text)."""
    text = text.replace("\N{MINUS SIGN}", "-")
    node, faults = read_value(text, None) if text and len(text) < 60 else (None, [None])
    value: Any = node.value if node is not None and not faults else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value, ""
    if _THOUSANDS.fullmatch(text) or _SPACED.fullmatch(text):
        plain = text.replace(",", "").replace(" ", "")
        return (float(plain) if "." in plain else int(plain)), "without separators"
    if _DECIMAL_COMMA.fullmatch(text):
        return float(text.replace(",", ".")), "with a decimal point"
    if match := _PERCENT.fullmatch(text):
        return float(f"{float(match[1]) / 100:.12g}"), "as a decimal"
    if (match := _FRACTION.fullmatch(text)) and int(match[2]):
        return int(match[1]) / int(match[2]), "as a decimal"
    if match := _POWER.fullmatch(text):
        return float(f"{match[1]}e{match[2]}"), "as a decimal"
    if text[-1:] in _SUFFIX and re.fullmatch(r"[0-9]+(\.[0-9]+)?", text[:-1]):
        found = float(text[:-1]) * _SUFFIX[text[-1]]
        return (int(found) if found.is_integer() else found), "in full"
    return None


def _quoted(node: Node, allowed: str) -> str | None:
    return f'put it in quotes: "{node.written()}"' if "text" in allowed else None


def _listed(node: Node, allowed: str) -> str | None:
    return f"write [{as_yaml(node.plain())}]" if "a list" in allowed else None
