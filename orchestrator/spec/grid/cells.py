"""Cells of a grid: each distinct part is validated once, a cell is a cheap copy of the base with its parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.errors import ErrorDetail
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.grid.axes import SECTIONS, Assignment, Axes, Setting, assignments
from orchestrator.spec.grid.cell_names import CellNames
from orchestrator.spec.yaml.merge import drop_nulls
from orchestrator.spec.yaml.node import Node
from orchestrator.spec.yaml.validation_errors import error_at, explain

MAX_INVALID_CELLS = 20


@dataclass(frozen=True)
class ResolvedCell:
    """One cell of the grid.

    Attributes:
        name: Unique in the experiment, safe as a folder's name.
        axes: Dotted path of each axis to its value as written.
        spec: The experiment with the axes' values in their places.
    """

    name: str
    axes: dict[str, Any]
    spec: ExperimentSpec


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


# Takes a cell's parts (None where a part has errors) and a function that gives the cell's tree.
Check = Callable[[dict[str, Any], Callable[[], Node]], Sequence[ErrorDetail]]


class GridBuilder:
    """Builds the cells of one experiment.

    Args:
        root: The resolved tree.
        axes: Its axes.
        parts: Validates parts; shared with the caller.
        check: Finds errors across the parts of a cell.
        check_names: Finds names in a cell's tree that do not exist.
    """

    def __init__(
        self, root: Node, axes: Axes, parts: Parts, check: Check, check_names: Callable[[Node], Sequence[ErrorDetail]]
    ) -> None:
        self.root, self.axes, self.parts = root, axes, parts
        self.check, self.check_names = check, check_names
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
            self.errors.extend(self.check_names(apply(self.root, cell)))
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
        found.extend(self.check(values, lambda: apply(self.root, cell)))
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
