"""Cells of a grid and their names; each distinct part is validated once, a cell is a cheap copy with its parts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.errors import ErrorDetail
from orchestrator.spec.checks.cell import Checks
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.grid.axes import SECTIONS, Assignment, Axes, Setting, assignments
from orchestrator.spec.loaded import ResolvedCell
from orchestrator.spec.yaml.merge import drop_nulls
from orchestrator.spec.yaml.node import Node, as_yaml
from orchestrator.spec.yaml.validation_errors import error_at, explain, unknown_name

MAX_INVALID_CELLS = 20
MAX_VALUE = 40
MAX_NAME = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+-]+")
_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass
class Part:
    """One top-level key of a cell, validated.

    Attributes:
        value: The validated value, None where it has errors.
        errors: What is wrong with it.
        key: Canonical JSON of its tree; equal keys are equal parts.
    """

    value: Any
    errors: list[ErrorDetail]
    key: str


def apply(root: Node, cell: Assignment) -> Node:
    """Return the tree of a cell: its axes' values in their places, a null taken out."""
    for setting in cell:
        root = root.set_at(setting.path, setting.node if setting.node.value is not None else None)
    return root


@dataclass
class Parts:
    """Validates top-level keys, each distinct one once."""

    root: Node
    _known: dict[tuple[Any, ...], Part] = field(default_factory=dict)
    _base: dict[str, Part] = field(default_factory=dict)

    def of(self, cell: Assignment) -> dict[str, Part]:
        """Return the parts of a cell that axes can change."""
        own: dict[str, list[Setting]] = {}
        for setting in cell:
            own.setdefault(str(setting.path[0]), []).append(setting)
        if not self._base:
            self._base.update({name: self.get(name, ()) for name in SECTIONS})
        return {**self._base, **{name: self.get(name, settings) for name, settings in own.items()}}

    def get(self, name: str, settings: Sequence[Setting]) -> Part:
        """Return the part `name` of a cell with the settings below it, shared by all cells where these agree."""
        key = (name, *map(id, settings))
        part = self._known.get(key)
        if part is None:
            part = self._known[key] = self._validate(name, tuple(settings))
        return part

    def _validate(self, name: str, settings: Assignment) -> Part:
        tree = apply(self.root, settings)
        node = tree.get(name)
        info = ExperimentSpec.model_fields[name]
        if node is None or node.value is None:
            if info.is_required():
                return Part(None, explain([{"type": "missing", "loc": (name,), "msg": "", "ctx": {}}], tree), "")
            return Part(info.get_default(call_default_factory=True), [], "")
        plain = drop_nulls(node, (name,)).plain()
        key = json.dumps(plain, sort_keys=True, default=str)
        try:
            return Part(_adapter(name).validate_python(plain), [], key)
        except ValidationError as error:
            return Part(None, explain(error.errors(), tree, (name,)), key)


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    info = ExperimentSpec.model_fields[name]
    annotation: Any = info.annotation
    for more in info.metadata:
        annotation = Annotated[annotation, more]
    return TypeAdapter(annotation)


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


class GridBuilder:
    """Builds the cells of one experiment.

    Args:
        root: The resolved tree.
        axes: Its axes.
        parts: Validates parts; shared with the caller.
        checks: Finds errors across the parts of a cell.
    """

    def __init__(self, root: Node, axes: Axes, parts: Parts, checks: Checks) -> None:
        self.root, self.axes, self.parts, self.checks = root, axes, parts, checks
        self.errors: list[ErrorDetail] = []
        self.notices: list[str] = []

    def cells(self) -> list[Assignment]:
        """Return the assignments; when one has errors, the later ones are only looked at for new values."""
        found = list(assignments(self.axes, self.errors, self.notices, self.root))
        seen: set[int] = set()
        representatives = []
        for cell in found:
            new = {id(setting) for setting in cell} - seen
            if new or not seen:
                representatives.append(cell)
                seen |= new
        for cell in representatives:
            self.examine(cell)
            self.errors.extend(self.checks.names(apply(self.root, cell)))
        if not self.errors:
            invalid = 0
            for cell in found:
                invalid += self.examine(cell)
                if invalid > MAX_INVALID_CELLS:
                    break
        return found

    def resolve(self, base: ExperimentSpec, found: Sequence[Assignment]) -> tuple[ResolvedCell, ...]:
        """Return the cells in order; cells of equal values are merged with a notice."""
        names = CellNames(self.root, base.name, tuple(self.axes.values), self.errors)
        cells: list[ResolvedCell] = []
        by_value: dict[tuple[str, ...], str] = {}
        by_name: dict[str, Assignment] = {}
        for cell in found:
            parts = self.parts.of(cell)
            name = names.name(cell)
            key = tuple(part.key for part in parts.values())
            if key in by_value:
                self.notices.append(f"the cells {by_value[key]} and {name} are the same and become one")
                continue
            if name in by_name:
                name = self._clash(name, cell, by_name, names)
            by_value[key], by_name[name] = name, cell
            changed = {str(setting.path[0]) for setting in cell}
            spec = base.model_copy(update={section: parts[section].value for section in changed})
            cells.append(ResolvedCell(name, {s.axis: s.node.plain() for s in cell}, spec))
        return tuple(cells)

    def examine(self, cell: Assignment) -> bool:
        """Collect the errors of a cell; True where it has some."""
        parts = self.parts.of(cell)
        found = [error for part in parts.values() for error in part.errors]
        values = {name: part.value if not part.errors else None for name, part in parts.items()}
        found.extend(self.checks.parts(values, lambda: apply(self.root, cell)))
        self.errors.extend(found)
        return bool(found)

    def _clash(self, name: str, cell: Assignment, by_name: dict[str, Assignment], names: CellNames) -> str:
        if names.template is None:
            return next(each for number in count(2) if (each := f"{name}-{number}") not in by_name)
        differ = [s.axis for s in cell if all(s.key != o.key or s.axis != o.axis for o in by_name[name])]
        hint = "let the template use " + ", ".join(f"{{{names.short[axis]}}}" for axis in differ)
        message = f"two cells would be named {name}"
        if len(self.errors) < MAX_INVALID_CELLS:
            self.errors.append(error_at(self.root, ("cell_name",), message, hint=hint))
        return name
