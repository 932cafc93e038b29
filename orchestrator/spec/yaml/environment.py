"""`${env:NAME}` in a value: what the environment holds is put in its place when the file is read.

A tracking server's address alone is put together when it is used, so that a password in it is recorded nowhere.
"""

from __future__ import annotations

import os
import re

from orchestrator.errors import ErrorDetail, UsageError
from orchestrator.spec.yaml.node import Node, Path
from orchestrator.spec.yaml.parser import control_character, read_value

_REFERENCE = re.compile(r"\$\{env:([^}]*)\}")
_WHEN_USED: Path = ("tracking", "tracking_uri")


def with_environment(root: Node) -> tuple[Node, list[ErrorDetail]]:
    """Return the tree with every reference replaced, and an error for each value that refers to what is not set.

    A reference that is a whole value is read as YAML, as of `--set`.
    """
    errors: list[ErrorDetail] = []

    def replaced(node: Node, path: Path) -> Node:
        if node.is_mapping or node.is_list:
            return node.map(lambda key, child: replaced(child, (*path, key)))
        names = _REFERENCE.findall(node.value) if isinstance(node.value, str) and path != _WHEN_USED else []
        if missing := [name for name in names if name not in os.environ]:
            message = f"the environment has no {', '.join(missing)}"
            errors.append(node.error(message, path, hint=f"export {missing[0]}=..., or write the value itself"))
        if missing or not names:
            return node
        text = _filled(node.value)
        if problem := control_character(text):
            errors.append(node.error(f"{', '.join(names)} in the environment: {problem}", path))
        if problem or _REFERENCE.fullmatch(node.value) is None:
            return Node(text, node.mark)
        value, wrong = read_value(text, None)
        if wrong or value.is_mapping or value.is_list:
            errors.append(
                node.error(f"{names[0]} in the environment is not one value", path, allowed="a text or a number")
            )
        return Node(value.value, node.mark, value.text)

    return replaced(root, ()), errors


def without_references(text: str) -> str:
    """Return a text without its references, which are no secrets themselves."""
    return _REFERENCE.sub("", text)


def expanded(text: str, place: str) -> str:
    """Return a text with every reference replaced.

    Raises:
        UsageError: the environment lacks a variable.
    """
    for name in _REFERENCE.findall(text):
        if name not in os.environ:
            raise UsageError(f"{place}: the environment has no {name}, which the address refers to")
    return _filled(text)


def _filled(text: str) -> str:
    return _REFERENCE.sub(lambda found: os.environ[found[1]], text)
