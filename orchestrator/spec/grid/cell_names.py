"""Names of cells: short, unique and safe as names of folders; and how a user refers to a cell by one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from orchestrator import registry
from orchestrator.errors import ErrorDetail, shorten
from orchestrator.spec.grid.axes import Assignment, Setting
from orchestrator.spec.yaml.node import Node, as_yaml
from orchestrator.spec.yaml.validation_errors import error_at, unknown_name

MAX_VALUE = 40
MAX_NAME = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+-]+")
_FIELD = re.compile(r"\{([^{}]*)\}")


def short_axes(axes: Sequence[str]) -> dict[str, str]:
    """Return the shortest end of each path that no other axis shares: `phases.finetune.schedule` -> `schedule`."""
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

    def __init__(self, root: Node, experiment: str, axes: Sequence[str], errors: list[ErrorDetail]) -> None:
        self.root, self.experiment, self.errors = root, experiment, errors
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
        values = {setting.axis: self._value(setting) for setting in cell}
        return safe(
            ",".join(f"{short}={values[axis]}" for axis, short in self.short.items() if axis in values), MAX_NAME
        )

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
                self.errors.append(error_at(self.root, ("cell_name",), message, allowed, hint))
        if re.search(r"[{}]", _FIELD.sub("", template)):
            self.errors.append(error_at(self.root, ("cell_name",), "a bracket of cell_name is not closed"))
        if self.errors:
            self.template = None


class Named(Protocol):
    """A cell of the grid, planned or not."""

    @property
    def name(self) -> str:
        """Unique in its experiment."""

    @property
    def axes(self) -> dict[str, Any]:
        """Dotted path of each axis to its value."""


Found = TypeVar("Found", bound=Named)
_NEAR = 4
_LISTED = 20
_ID_BEGINNING = re.compile(r"[0-9a-f]{4,64}")


def by_name(cells: Sequence[Found], wanted: str) -> list[Found]:
    """Return the cell of a name."""
    return [cell for cell in cells if cell.name == wanted]


def by_axis(cells: Sequence[Found], wanted: str) -> list[Found]:
    """Cells where an axis, named by its last part or in full, has a value: `axis=value`."""
    axis, _, value = wanted.partition("=")
    return [
        cell
        for cell in cells
        for name, given in cell.axes.items()
        if value and name.split(".")[-1] == axis.split(".")[-1] and str(given) == value
    ]


def may_be_id(wanted: str) -> bool:
    """Return True for a text that an identity may begin with."""
    return _ID_BEGINNING.fullmatch(wanted) is not None


def misfit(cells: Sequence[Named], fits: Sequence[Named], wanted: str) -> str:
    """Return why none or several cells fit, with names to choose from."""
    short = shorten(wanted)
    if fits:
        return f"{short} fits several cells: {_listed(fits)}"
    near = near_cells(cells, wanted)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"{short} fits no cell; {meant}there are {_listed(cells)}"
        if cells
        else f"{short} fits no cell: there is none yet"
    )


def near_cells(cells: Sequence[Named], wanted: str) -> list[str]:
    """Return the names of a few cells that hold the text, else of those with a part spelt like it."""
    low = wanted.strip().lower()
    found = [cell.name for cell in cells if low and low in cell.name.lower()]
    if not found:
        values = {part.partition("=")[2] or part: None for cell in cells for part in cell.name.split(",")}
        near = registry.nearest(wanted.partition("=")[2] or wanted, tuple(values))
        found = [cell.name for cell in cells if near is not None and near in re.split("[,=]", cell.name)]
    return found[:_NEAR]


def _listed(cells: Sequence[Named]) -> str:
    names = ", ".join(cell.name for cell in cells[:_LISTED])
    return names if len(cells) <= _LISTED else f"{names} and {len(cells) - _LISTED:,} more"
