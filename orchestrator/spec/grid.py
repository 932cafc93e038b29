"""The grid: its axes read from the tree, and its cells, whose distinct parts are validated once each, with names."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.errors import ErrorDetail
from orchestrator.spec.checks.cell import Checks
from orchestrator.spec.components import EvaluationSpec
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.loaded import ResolvedCell
from orchestrator.spec.yaml.file_paths import NamedPath, absolute_paths
from orchestrator.spec.yaml.merge import drop_nulls
from orchestrator.spec.yaml.node import Node, Path, as_yaml, dotted
from orchestrator.spec.yaml.schema import NAMED, find_path
from orchestrator.spec.yaml.validation_errors import check_path, error_at, explain, locate, unknown_name

MAX_CELLS = 100_000
SECTIONS = ("seed", "model", "data", "compressors", "schedules", "phases", "evaluate")
MAX_INVALID_CELLS = 20
MAX_VALUE = 40
MAX_NAME = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+-]+")
_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Setting:
    """One axis at one of its values.

    Attributes:
        path: The axis' path, canonical.
        node: The value; a null takes the key out, which puts it back to its default.
        written_at: Where the value stands in the tree, e.g. `("matrix", "seed", 0)`.
    """

    path: Path
    node: Node
    written_at: Path

    @cached_property
    def axis(self) -> str:
        """The axis' dotted path."""
        return dotted(self.path)

    @cached_property
    def key(self) -> str:
        """The value as canonical JSON, to compare values."""
        return value_key(self.node)

    @cached_property
    def name(self) -> str:
        """A short name of the value."""
        value = self.node.plain()
        return safe(_words(value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else value))


Assignment = tuple[Setting, ...]


@dataclass
class Axes:
    """The grid before its cells are built.

    Attributes:
        factors: Each factor of the product: a matrix axis, or a zip group whose axes move together.
        excluded: `{axis: value}` filters.
        included: Cells that are added as they are.
        values: Every axis with its settings, those of `include` as well.
    """

    factors: list[list[Assignment]] = field(default_factory=list)
    excluded: list[tuple[Path, Assignment]] = field(default_factory=list)
    included: list[Assignment] = field(default_factory=list)
    values: dict[str, list[Setting]] = field(default_factory=dict)

    @property
    def grid_axes(self) -> tuple[str, ...]:
        """Axes of `matrix` and `zip`."""
        return tuple(dict.fromkeys(s.axis for factor in self.factors for s in factor[0]))


class AxisReader:
    """Reads the axes of a merged tree; collects errors, and the paths that values name."""

    def __init__(self, root: Node, errors: list[ErrorDetail], named: list[NamedPath]) -> None:
        self.root = root
        self.errors = errors
        self.named = named
        self.paths: dict[str, Path | None] = {}
        self.owner: dict[str, Path] = {}

    def read(self) -> Axes:
        """Return all axes; those with errors are left out."""
        axes = Axes()
        for name, node in self.root.entries("matrix").items():
            settings = self._settings(name, node, ("matrix", name))
            if settings:
                axes.factors.append([(setting,) for setting in settings])
        for index, group in enumerate(self.root.items("zip")):
            axes.factors.extend(self._zip(group, ("zip", index)))
        included = (self._single(group, ("include", index)) for index, group in enumerate(self.root.items("include")))
        axes.included = [assignment for assignment in included if assignment]
        for setting in itertools.chain.from_iterable(itertools.chain(*axes.factors, axes.included)):
            axes.values.setdefault(setting.axis, []).append(setting)
        for index, group in enumerate(self.root.items("exclude")):
            if assignment := self._exclude(group, ("exclude", index), axes):
                axes.excluded.append((("exclude", index), assignment))
        self._check_size(axes)
        return axes

    def _zip(self, group: Node, where: Path) -> list[list[Assignment]]:
        columns = {name: self._settings(name, node, (*where, name)) for name, node in group.entries().items()}
        columns = {name: settings for name, settings in columns.items() if settings}
        lengths = {name: len(settings) for name, settings in columns.items()}
        if not lengths:
            return []
        if len(set(lengths.values())) > 1:
            lengths_text = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            self._error(where, f"axes that move together need equally many values: {lengths_text}")
            return []
        return [list(zip(*columns.values(), strict=True))]

    def _settings(self, name: str, node: Node, where: Path) -> list[Setting]:
        if not node.is_list:
            return []  # reported by the models: a list belongs here
        path = self._path(name, where)
        if path is None:
            return []
        axis = dotted(path)
        if axis in self.owner:
            self._error(where, f"the axis {axis} is written twice, also under {dotted(self.owner[axis][:1])}", key=True)
            return []
        self.owner[axis] = where
        settings: dict[str, Setting] = {}
        for index, item in enumerate(node.value):
            setting = self._setting(path, item, (*where, index))
            if setting.key in settings:
                self._error((*where, index), f"the axis {axis} has this value twice")
            else:
                settings[setting.key] = setting
        return list(settings.values())

    def _single(self, group: Node, where: Path) -> Assignment:
        found = []
        for name, node in group.entries().items():
            path = self._path(name, (*where, name))
            if path is not None:
                found.append(self._setting(path, node, (*where, name)))
        return tuple(found)

    def _exclude(self, group: Node, where: Path, axes: Axes) -> Assignment:
        if group.is_mapping and not group.value:
            self._error(where, "an empty exclude would take out every cell")
        found = []
        for setting in self._single(group, where):
            values = axes.values.get(setting.axis, []) if setting.axis in axes.grid_axes else []
            if not values:
                allowed, hint = unknown_name(setting.axis, axes.grid_axes)
                self._error(setting.written_at, "exclude names an axis the grid does not have", allowed, hint, key=True)
            elif all(setting.key != value.key for value in values):
                allowed = ", ".join(value.node.written() for value in values)
                self._error(setting.written_at, f"the axis {setting.axis} never has this value", allowed)
            else:
                found.append(setting)
        return tuple(found)

    def _setting(self, path: Path, node: Node, where: Path) -> Setting:
        return Setting(path, absolute_paths(self.root, drop_nulls(node, path), path, self.errors, self.named), where)

    def _path(self, name: str, where: Path) -> Path | None:
        if name not in self.paths:
            self.paths[name] = self._find(name, where)
        return self.paths[name]

    def _find(self, name: str, where: Path) -> Path | None:
        path = check_path(self.root, name, where, self.errors, "an axis must be a key path")
        if path is None or (path and path[0] in SECTIONS):
            return path
        self._error(where, f"`{name}` cannot be an axis: it is no part of a cell", "paths under " + ", ".join(SECTIONS))
        return None

    def _check_size(self, axes: Axes) -> None:
        size = prod(len(factor) for factor in axes.factors)
        if size > MAX_CELLS:
            self._error(("matrix",), f"the grid has {size} cells, more than {MAX_CELLS}")
            axes.factors.clear()

    def _error(
        self, path: Path, message: str, allowed: str | None = None, hint: str | None = None, key: bool = False
    ) -> None:
        self.errors.append(error_at(self.root, path, message, allowed, hint, key))


def value_key(node: Node) -> str:
    """Return a value as canonical JSON."""
    return json.dumps(node.plain(), sort_keys=True, default=str)


def check_report(root: Node, axes: Axes, cells: Sequence[Assignment]) -> list[ErrorDetail]:
    """Check that the baseline and `mean_over` name axes of the grid, and that some cell is the baseline."""
    errors: list[ErrorDetail] = []
    wanted: dict[str, str] = {}
    for name, node in root.entries("report", "baseline").items():
        path = check_path(root, name, ("report", "baseline", name), errors)
        if path is not None:
            wanted[dotted(path)] = value_key(node)
    if wanted and not errors and cells and not any(_matches(root, cell, wanted) for cell in cells):
        allowed = "; ".join(
            f"{axis}: {', '.join(setting.node.written() for setting in settings)}"
            for axis, settings in axes.values.items()
        )
        message = "no cell of the grid is the baseline"
        errors.append(error_at(root, ("report", "baseline"), message, allowed or "the grid has no axes"))
    for index, node in enumerate(root.items("report", "mean_over")):
        if isinstance(node.value, str):
            check_path(root, node.value, ("report", "mean_over", index), errors)
    return errors


def check_tested_cells(root: Node, axes: Axes, cells: Sequence[Assignment]) -> list[ErrorDetail]:
    """Check that `cells` of an evaluation names axes of the grid and values that some cell has."""
    errors: list[ErrorDetail] = []
    for name in root.entries("evaluate"):
        path: Path = ("evaluate", name, "cells")
        wanted: dict[str, str] = {}
        before = len(errors)
        for key, node in root.entries(*path).items():
            axis = check_path(root, key, (*path, key), errors)
            values = axes.values.get(dotted(axis), []) if axis is not None else []
            if axis is not None and not values:
                allowed, hint = unknown_name(key, tuple(axes.values))
                errors.append(error_at(root, (*path, key), "the grid has no such axis", allowed, hint, key=True))
            elif axis is not None and all(value_key(node) != value.key for value in values):
                allowed = ", ".join(value.node.written() for value in values)
                errors.append(error_at(root, (*path, key), f"the axis {key} never has this value", allowed))
            elif axis is not None:
                wanted[dotted(axis)] = value_key(node)
        if wanted and len(errors) == before and not any(_matches(root, cell, wanted) for cell in cells):
            errors.append(error_at(root, path, "no cell of the grid has all of these values"))
    return errors


def _matches(root: Node, cell: Assignment, wanted: dict[str, str]) -> bool:
    own = {setting.axis: setting.key for setting in cell}
    for axis, key in wanted.items():
        if axis not in own:
            node = root.at(find_path(root, axis))
            own[axis] = value_key(node) if node is not None else "null"
        if own[axis] != key:
            return False
    return True


def assignments(axes: Axes, errors: list[ErrorDetail], notices: list[str], root: Node) -> list[Assignment]:
    """Return the grid's cells: matrix x each zip group - exclude + include, parents before children.

    A file that only includes has just those cells: with no factor there is no product to add them to.
    """
    hits = dict.fromkeys((where for where, _ in axes.excluded), 0)
    kept = []
    if axes.factors or not axes.included:
        for parts in itertools.product(*axes.factors):
            cell = _ordered(itertools.chain.from_iterable(parts))
            keys = {setting.axis: setting.key for setting in cell}
            where = next((w for w, filters in axes.excluded if all(keys[f.axis] == f.key for f in filters)), None)
            if where is None:
                kept.append(cell)
            else:
                hits[where] += 1
    kept += map(_ordered, axes.included)
    if not kept:
        mark, _ = locate(root, ("exclude",))
        errors.append(ErrorDetail("exclude takes out every cell of the grid", *mark, path="exclude"))
    for where, count in hits.items():
        if count == 0:
            mark, _ = locate(root, where)
            place = f"{mark.file}:{mark.line}" if mark.line is not None else "--set"
            notices.append(f"{place}: {dotted(where)} takes out no cell")
    return kept


def _ordered(settings: Iterable[Setting]) -> Assignment:
    return tuple(sorted(settings, key=lambda setting: len(setting.path)))


@dataclass
class Part:
    """One top-level key of a cell, validated.

    Attributes:
        value: The validated value, None where it has errors.
        errors: What is wrong with it.
        sound: Of one that has errors, its entries that have none; so the errors of one do not hide those of another.
        key: Canonical JSON of its tree; equal keys are equal parts.
    """

    value: Any
    errors: list[ErrorDetail]
    key: str
    sound: Any = None


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

    def of(self, cell: Assignment) -> dict[str, Part]:
        """Return the parts of a cell that axes can change."""
        own: dict[str, list[Setting]] = {}
        for setting in cell:
            own.setdefault(str(setting.path[0]), []).append(setting)
        return {name: self.get(name, own.get(name, ())) for name in SECTIONS}

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
            return Part(None, explain(error.errors(), tree, (name,)), key, _sound(name, plain, error))


def _sound(name: str, plain: Any, error: ValidationError) -> Any:
    """Return the named entries of a part that have no errors; None where that is not known."""
    wrong = {found["loc"][0] for found in error.errors() if found["loc"]}
    if name not in (*NAMED, "phases") or not isinstance(plain, dict):
        return None
    try:
        return _adapter(name).validate_python({key: entry for key, entry in plain.items() if key not in wrong})
    except ValidationError:
        return None


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    info = ExperimentSpec.model_fields[name]
    annotation: Any = Annotated[info.annotation, info]
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
        self._fields: dict[str, str] = {}
        node = root.get("cell_name")
        self.template = node.value if node is not None and isinstance(node.value, str) else None
        if self.template is not None:
            self._check_template(self.template)

    def name(self, cell: Assignment) -> str:
        """Return the name of a cell; a single cell without axes is named after the experiment."""
        values = {setting.axis: setting.name for setting in cell}
        if self.template is not None:
            return safe(_FIELD.sub(lambda match: self._field(match.group(1), values), self.template), MAX_NAME)
        if not cell:
            return self.experiment
        parts = (f"{short}={values[axis]}" for axis, short in self.short.items() if axis in values)
        return safe(",".join(parts), MAX_NAME)

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
        found = assignments(self.axes, self.errors, self.notices, self.root)
        seen: set[int] = set()
        for cell in found:
            new = {id(setting) for setting in cell} - seen
            if new or not seen:
                self.examine(cell)
                self.errors.extend(self.checks.names(apply(self.root, cell)))
                seen |= new
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
            tests = {name: test for name, test in spec.evaluate.items() if self._is_tested(cell, test)}
            if len(tests) < len(spec.evaluate):
                spec = spec.model_copy(update={"evaluate": tests})
            cells.append(ResolvedCell(name, {s.axis: s.node.plain() for s in cell}, spec))
        return tuple(cells)

    def _is_tested(self, cell: Assignment, test: EvaluationSpec) -> bool:
        if test.cells is None:
            return True
        wanted = {
            dotted(find_path(self.root, axis)): json.dumps(value, sort_keys=True, default=str)
            for axis, value in test.cells.items()
        }
        return _matches(self.root, cell, wanted)

    def examine(self, cell: Assignment) -> bool:
        """Collect the errors of a cell; True where it has some."""
        parts = self.parts.of(cell)
        found = [error for part in parts.values() for error in part.errors]
        values = {name: part.sound if part.errors else part.value for name, part in parts.items()}
        complete = not found
        found.extend(self.checks.parts(values, lambda: apply(self.root, cell), complete))
        self.errors.extend(found)
        return bool(found)

    def _clash(self, name: str, cell: Assignment, by_name: dict[str, Assignment], names: CellNames) -> str:
        if names.template is None:
            return next(each for number in itertools.count(2) if (each := f"{name}-{number}") not in by_name)
        differ = [s.axis for s in cell if all(s.key != o.key or s.axis != o.axis for o in by_name[name])]
        hint = "let the template use " + ", ".join(f"{{{names.short[axis]}}}" for axis in differ)
        message = f"two cells would be named {name}"
        if len(self.errors) < MAX_INVALID_CELLS:
            self.errors.append(error_at(self.root, ("cell_name",), message, hint=hint))
        return name
