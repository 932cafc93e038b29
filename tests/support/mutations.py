"""Experiments with something wrong in them: small changes of values, keys and text, each told by its number alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import yaml

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), "", " ",
    "full", "0", "-1", "1/3", "1/0", "100%", "-5%", "1e400", "nan", "a b", "../..", "/", "/dev/null", "/proc/self/mem",
    "~", "${env:HOME}", "\u202e", "\x00", "é" * 300, "x" * 100_000, "[", "{", "!!python/object:os.system", "2026-01-01",
    [], [[]], [None], [0] * 1000, {}, {"kind": "full"}, {"": ""}, {"kind": None}, {"a": {"b": {"c": []}}},
)  # fmt: skip
TEXTS = (
    "\t",
    ":",
    "- ",
    "&a ",
    "*a",
    "<<: *a\n",
    "\r",
    "\ufeff",
    "---\n",
    "...\n",
    "? ",
    "| ",
    "%YAML 9\n",
    "\x85",
    "{",
    "]",
)


def mutated(text: str, number: int) -> str:
    """Return an experiment's text with one to three changes; the same for the same number."""
    draw = random.Random(number)
    if draw.random() < 0.2:
        return _text_mutated(text, draw)
    tree = yaml.safe_load(text)
    places = list(_places(tree))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _change(draw.choice(places), draw, tree)
        places = list(_places(tree))
        if not places:
            break
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each entry of the tree as its container and its key there."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield node, key
        yield from _places(value)


def _change(place: tuple[Any, Any], draw: random.Random, tree: Any) -> None:
    container, key = place
    how = draw.choice(("value", "value", "value", "remove", "rename", "move", "wrap", "near"))
    if how == "value":
        container[key] = copy.deepcopy(draw.choice(VALUES))
    elif how == "remove":
        del container[key]
    elif how == "rename" and isinstance(container, dict):
        container[draw.choice(("", "kind", "x" * 50, "a.b", key.upper() if isinstance(key, str) else "k", 5, None))] = (
            container.pop(key)
        )
    elif how == "move":
        other, at = draw.choice(list(_places(tree)))
        container[key] = copy.deepcopy(other[at])
    elif how == "wrap":
        container[key] = draw.choice(([container[key]], {"kind": container[key]}, [container[key]] * 3))
    elif isinstance(value := container[key], (int, float)) and not isinstance(value, bool):
        container[key] = draw.choice((value + 1, value - 1, -value, value * 1000, value / 7, str(value), float(value)))
    elif isinstance(value, str) and value:
        at = draw.randrange(len(value))
        container[key] = value[:at] + draw.choice(("", value[at] * 2, "\n", "/", "%")) + value[at + 1 :]


def _text_mutated(text: str, draw: random.Random) -> str:
    for _ in range(draw.choice((1, 2, 5))):
        at = draw.randrange(len(text))
        how = draw.choice(("cut", "insert", "drop", "repeat", "byte"))
        if how == "cut":
            text = text[:at] or " "
        elif how == "insert":
            text = text[:at] + draw.choice(TEXTS) + text[at:]
        elif how == "drop":
            text = text[:at] + text[at + draw.choice((1, 2, 20)) :] or " "
        elif how == "repeat":
            text = text[:at] + text[max(0, at - 40) : at] + text[at:]
        else:
            text = text[:at] + chr(draw.randrange(256)) + text[at + 1 :]
    return text
