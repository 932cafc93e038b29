"""Names of cells: short, unique, stable and safe as names of folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import Fault
from orchestrator.spec.axes import Assignment, Setting
from orchestrator.spec.faults import fault_at, unknown_name
from orchestrator.spec.node import Node, as_yaml

MAX_VALUE = 40
MAX_NAME = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+-]+")
_FIELD = re.compile(r"\{([^{}]*)\}")


def short_axes(axes: Sequence[str]) -> dict[str, str]:
    """Return shortest end of each dotted path that no other axis shares: `phases.finetune.schedule` -> `schedule`."""
    parts = {axis: axis.split(".") for axis in axes}
    short = {}
    for axis, own in parts.items():
        length = 1
        while length < len(own) and any(o[-length:] == own[-length:] for a, o in parts.items() if a != axis):
            length += 1
        short[axis] = ".".join(own[-length:])
    return short


def safe(text: str, limit: int = MAX_VALUE) -> str:
    """Return the text as part of a folder's name; what is too long ends in six characters of its SHA-256."""
    clean = _UNSAFE.sub("-", text).strip("-").lstrip(".") or "none"
    if len(clean) <= limit:
        return clean
    return f"{clean[: limit - 7]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def value_name(setting: Setting) -> str:
    """Return a short name of an axis' value."""
    value = setting.node.plain()
    if isinstance(value, str) and "/" in value:
        value = value.rstrip("/").rpartition("/")[2]
    return safe(_words(value))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={_words(item)}" if key != "kind" else str(item) for key, item in value.items())
    if isinstance(value, list):
        return "+".join(_words(item) for item in value)
    return as_yaml(value)


class CellNames:
    """Names one experiment's cells, by its template or by the axes."""

    def __init__(self, root: Node, experiment: str, axes: Sequence[str], faults: list[Fault]) -> None:
        self.root, self.experiment, self.faults = root, experiment, faults
        self.short = short_axes(axes)
        self._values: dict[int, str] = {}
        self._fields: dict[str, str] = {}
        node = root.get("cell_name")
        self.template = node.value if node is not None and isinstance(node.value, str) else None
        if self.template is not None:
            self._check_template(self.template)

    def name(self, cell: Assignment) -> str:
        """Return the name of a cell; a single cell without axes is named after the experiment."""
        if self.template is not None:
            values = {setting.axis: self._value(setting) for setting in cell}
            return safe(_FIELD.sub(lambda match: self._field(match.group(1), values), self.template), MAX_NAME)
        if not cell:
            return self.experiment
        return safe(",".join(f"{self.short[s.axis]}={self._value(s)}" for s in self._in_order(cell)), MAX_NAME)

    def _in_order(self, cell: Assignment) -> list[Setting]:
        order = {axis: index for index, axis in enumerate(self.short)}
        return sorted(cell, key=lambda setting: order[setting.axis])

    def _value(self, setting: Setting) -> str:
        if id(setting) not in self._values:
            self._values[id(setting)] = value_name(setting)
        return self._values[id(setting)]

    def _field(self, name: str, values: dict[str, str]) -> str:
        axis = self._fields[name]
        if axis in values:
            return values[axis]
        node = self.root.at(tuple(axis.split(".")))
        return safe(node.written()) if node is not None else "default"

    def _check_template(self, template: str) -> None:
        known = {**{axis: axis for axis in self.short}, **{short: axis for axis, short in self.short.items()}}
        for name in _FIELD.findall(template):
            if name in known:
                self._fields[name] = known[name]
            else:
                allowed, hint = unknown_name(name, list(self.short.values()))
                message = f"cell_name uses {{{name}}}, which is no axis of the grid"
                self.faults.append(fault_at(self.root, ("cell_name",), message, allowed, hint))
        if re.search(r"[{}]", _FIELD.sub("", template)):
            self.faults.append(fault_at(self.root, ("cell_name",), "a bracket of cell_name is not closed"))
        if self.faults:
            self.template = None
