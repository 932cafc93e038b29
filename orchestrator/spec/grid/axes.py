"""The axes of a grid: `matrix`, `zip`, `exclude` and `include` read from the tree and turned into assignments."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from orchestrator.errors import ErrorDetail
from orchestrator.spec.yaml.file_paths import absolute_paths
from orchestrator.spec.yaml.key_paths import find_path
from orchestrator.spec.yaml.merge import drop_nulls
from orchestrator.spec.yaml.node import Node, Path, dotted
from orchestrator.spec.yaml.validation_errors import check_path, error_at, locate, unknown_name

MAX_CELLS = 100_000
NOT_A_PATH = "not a key path"
SECTIONS = ("seed", "model", "data", "compressors", "schedules", "phases", "evaluate")


@dataclass(frozen=True)
class Setting:
    """One axis at one of its values.

    Attributes:
        axis: The axis' dotted path, canonical.
        path: The same as a path.
        node: The value; a null takes the key out, which puts it back to its default.
        key: The value as canonical JSON, to compare values.
        written_at: Where the value stands in the tree, e.g. `("matrix", "seed", 0)`.
    """

    axis: str
    path: Path
    node: Node
    key: str
    written_at: Path


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
    included: list[tuple[Path, Assignment]] = field(default_factory=list)
    values: dict[str, list[Setting]] = field(default_factory=dict)

    @property
    def grid_axes(self) -> tuple[str, ...]:
        """Axes of `matrix` and `zip`."""
        return tuple(dict.fromkeys(s.axis for factor in self.factors for s in factor[0]))


class AxisReader:
    """Reads the axes of a merged tree; collects errors."""

    def __init__(self, root: Node, errors: list[ErrorDetail]) -> None:
        self.root = root
        self.errors = errors
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
        for factor in axes.factors:
            for assignment in factor:
                for setting in assignment:
                    axes.values.setdefault(setting.axis, []).append(setting)
        for index, group in enumerate(self.root.items("include")):
            if assignment := self._single(group, ("include", index)):
                axes.included.append((("include", index), assignment))
                for setting in assignment:
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
        node = absolute_paths(self.root, drop_nulls(node, path), path, self.errors)
        return Setting(dotted(path), path, node, value_key(node), where)

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
        path = check_path(root, name, ("report", "baseline", name), errors, NOT_A_PATH)
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
            check_path(root, node.value, ("report", "mean_over", index), errors, NOT_A_PATH)
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


def assignments(axes: Axes, errors: list[ErrorDetail], notices: list[str], root: Node) -> Iterator[Assignment]:
    """Return the grid's cells: matrix x each zip group - exclude + include, parents before children.

    A file that only includes has just those cells: with no factor there is no product to add them to.
    """
    hits = dict.fromkeys((where for where, _ in axes.excluded), 0)
    kept = 0
    if axes.factors or not axes.included:
        for parts in itertools.product(*axes.factors):
            cell = _ordered(itertools.chain.from_iterable(parts))
            keys = {setting.axis: setting.key for setting in cell}
            where = next((w for w, filters in axes.excluded if all(keys[f.axis] == f.key for f in filters)), None)
            if where is None:
                kept += 1
                yield cell
            else:
                hits[where] += 1
    for _, cell in axes.included:
        kept += 1
        yield _ordered(cell)
    if kept == 0:
        mark, _ = locate(root, ("exclude",))
        errors.append(ErrorDetail("exclude takes out every cell of the grid", *mark, path="exclude"))
    for where, count in hits.items():
        if count == 0:
            mark, _ = locate(root, where)
            place = f"{mark.file}:{mark.line}" if mark.line is not None else "--set"
            notices.append(f"{place}: {dotted(where)} takes out no cell")


def _ordered(settings: Iterable[Setting]) -> Assignment:
    return tuple(sorted(settings, key=lambda setting: len(setting.path)))
