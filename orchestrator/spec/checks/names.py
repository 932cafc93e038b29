"""Names that an experiment refers to: data sets, variants, schedules, axes, metrics; `report:` and `search:`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from orchestrator import registry
from orchestrator.errors import ErrorDetail
from orchestrator.spec.components import FINAL, FULL
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.grid.axes import SECTIONS, Assignment, Axes, Setting, value_key
from orchestrator.spec.phase import PHASES
from orchestrator.spec.search import SearchSpec, StagedSpaceSpec
from orchestrator.spec.search_space import before_last, draw, inner_boundaries, variant_layer_tokens
from orchestrator.spec.yaml.key_paths import NAMED, find_path, names_at
from orchestrator.spec.yaml.node import Node, Path, dotted, node_of
from orchestrator.spec.yaml.validation_errors import check_path, error_at, locate, stray_keys, unknown_name

_PATH = "not a key path"
COSTS = (
    "train_tflops", "visual_layer_tokens", "compression_ratio", "train_seconds", "samples_per_second",
    "peak_memory_gib", *(f"{phase}/train_seconds" for phase in PHASES),
)  # fmt: skip


class References:
    """Checks the names of cells' trees; definitions that trees share are checked once."""

    def __init__(self) -> None:
        self._checked: dict[tuple[int, ...], tuple[Node | None, ...]] = {}

    def check(self, root: Node) -> list[ErrorDetail]:
        """Return all names of a tree that do not exist, are reserved, or mean two things."""
        shared = (root.get("compressors"), root.get("schedules"))
        key = tuple(map(id, shared))
        new = self._checked.setdefault(key, shared) is shared  # kept, so that an id stays theirs
        return _TreeCheck(root).check(definitions=new)


class _TreeCheck:
    """Checks the names of one cell's tree."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self.errors: list[ErrorDetail] = []
        # Where a section cannot be read, the names it holds are unknown: that is the error, and it is reported there.
        self._unsure = {section for section in NAMED if self._is_unsure(section)}
        self.data = self._names("data")
        self.variants = self._names("compressors")
        self.schedules = self._names("schedules")

    def check(self, definitions: bool) -> list[ErrorDetail]:
        """Return all errors; those of variants and schedules themselves only with `definitions`."""
        if definitions:
            self._check_definitions()
            for name, node in self.root.entries("schedules").items():
                self._check_schedule(("schedules", name), node)
        for name in PHASES:
            phase = self.root.at(("phases", name))
            if phase is not None and phase.is_mapping:
                self._check_phase(("phases", name), phase)
        for name, node in self.root.entries("evaluate").items():
            self._check_evaluation(("evaluate", name), node)
        self._check_search()
        return self.errors

    def _check_definitions(self) -> None:
        for section in ("compressors", "schedules"):
            for name in self._names(section):
                if name in (FULL, FINAL):
                    meaning = "no compressor" if name == FULL else "the last stage's variant"
                    message = f"`{name}` is a reserved name ({meaning}); choose another"
                    self._error((section, name), message, key=True)
        for name in self.schedules:
            if name in self.variants:
                line = locate(self.root, ("compressors", name), key=True)[0].line
                message = f"`{name}` is both a schedule and a variant (line {line}); a phase could mean either"
                self._error(("schedules", name), message, hint="rename one of them", key=True)

    def _check_schedule(self, path: Path, node: Node) -> None:
        for name in _variants_of(node):
            if name != FULL and name not in self.variants and "compressors" not in self._unsure:
                where = next((p for p, leaf in node.leaves(path) if leaf.value == name and p[-1] != "kind"), path)
                self._error(where, f"there is no variant `{name}`", *unknown_name(name, [*self.variants, FULL]))

    def _check_phase(self, path: Path, phase: Node) -> None:
        self._check_names(phase, (*path, "data"), "there is no data set `{}`", self.data, "data", keys=True)
        schedule = phase.get("schedule")
        known = [*self.schedules, *self.variants, FULL]
        if schedule is not None and schedule.is_mapping:
            self._check_schedule((*path, "schedule"), schedule)
        for key in ("schedule", "match_train_tflops"):
            message = "there is no schedule or variant `{}`"
            self._check_names(phase, (*path, key), message, known, "schedules", "compressors")

    def _check_evaluation(self, path: Path, node: Node) -> None:
        self._check_names(node, (*path, "data"), "there is no data set `{}`", self.data, "data")
        known = [FINAL, FULL, *self.variants]
        self._check_names(node, (*path, "under"), "there is no variant `{}` to test under", known, "compressors")

    def _check_search(self) -> None:
        known = [*self.variants, FULL]
        for key, node in self.root.entries("search", "space").items():
            path: Path = ("search", "space", key)
            for field in ("variants", "last"):
                self._check_names(node, (*path, field), "there is no variant `{}`", known, "compressors")

    def _is_unsure(self, section: str) -> bool:
        node = self.root.get(section)
        if node is None:
            unknown = [key for key in self.root.value if key not in names_at(self.root, ())]
            return any(registry.nearest(key, (section,)) for key in unknown)
        return not (node.is_mapping or node.value is None) or bool(stray_keys(self.root, section))

    def _names(self, section: str) -> tuple[str, ...]:
        return tuple(self.root.entries(section))

    def _check_names(
        self, block: Node, path: Path, message: str, known: Sequence[str], *sections: str, keys: bool = False
    ) -> None:
        """Report names under a block's last key of `path` that are not known, unless a section of names is unsure."""
        for where, name in _texts(block.get(path[-1]), path, keys) if self._unsure.isdisjoint(sections) else ():
            if name not in known:
                self._error(where, message.format(name), *unknown_name(name, known), key=keys and where != path)

    def _error(
        self, path: Path, message: str, allowed: str | None = None, hint: str | None = None, key: bool = False
    ) -> None:
        error = error_at(self.root, path, message, allowed, hint, key)
        self.errors.append(replace(error, value=str(path[-1])) if key else error)


def _variants_of(node: Node) -> tuple[str, ...]:
    """Return the variants a schedule uses; where it has other errors, what stands under `compressor` in it."""
    value: Any = node.plain()
    try:
        schedule = registry.spec_class(registry.SCHEDULES, value["kind"]).model_validate(value)
        return tuple(schedule.variants())
    except (ValidationError, KeyError, TypeError, ImportError, AttributeError):
        found = (leaf.value for path, leaf in node.leaves() if path[-1:] == ("compressor",))
        return tuple(dict.fromkeys(name for name in found if isinstance(name, str)))


def _texts(node: Node | None, path: Path, keys: bool = False) -> Iterator[tuple[Path, str]]:
    """Return the texts at a path: one, a list's, or with `keys` a mapping's keys."""
    if node is None:
        return
    if isinstance(node.value, str):
        yield path, node.value
    elif node.is_list:
        for index, item in enumerate(node.value):
            if isinstance(item.value, str):
                yield (*path, index), item.value
    elif node.is_mapping and keys:
        for key in node.value:
            yield (*path, key), key


def check_report(root: Node, axes: Axes, cells: Sequence[Assignment]) -> list[ErrorDetail]:
    """Check that the baseline and `mean_over` name axes of the grid, and that some cell is the baseline."""
    errors: list[ErrorDetail] = []
    wanted: dict[str, str] = {}
    for name, node in root.entries("report", "baseline").items():
        path = check_path(root, name, ("report", "baseline", name), errors, _PATH)
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
            check_path(root, node.value, ("report", "mean_over", index), errors, _PATH)
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


def check_search(root: Node) -> list[ErrorDetail]:
    """Check that a search proposes values of known paths for measured objectives, beside a grid of seeds alone."""
    errors: list[ErrorDetail] = []
    search = root.get("search")
    if search is None or not search.is_mapping:
        return errors
    errors += _check_grid(root)
    for name in search.entries("space"):
        path = check_path(root, name, ("search", "space", name), errors, _PATH)
        if path is not None and path[0] not in SECTIONS:
            text = f"`{name}` cannot be searched: it is no part of a cell"
            errors.append(error_at(root, ("search", "space", name), text, "paths under " + ", ".join(SECTIONS)))
    objectives = search.entries("objectives")
    errors += [found for name in objectives if (found := _check_objective(root, name)) is not None]
    if search.get("scheduler") is not None and len(objectives) > 1:
        errors.append(error_at(root, ("search", "scheduler"), "early stopping needs a single objective"))
    return errors


def _check_grid(root: Node) -> Iterator[ErrorDetail]:
    for name in root.entries("matrix"):
        if name != "seed":
            message = "beside a search the matrix may hold only `seed`; put this axis into search.space"
            mark, _ = locate(root, ("matrix", name), key=True)
            yield ErrorDetail(message, *mark, path=f"matrix.{name}", value=name, allowed="seed")
    for key in ("zip", "include", "exclude", "controls"):
        if (node := root.get(key)) is not None and node.value:
            message = f"beside a search there is no `{key}`: its trials are proposed one by one"
            yield error_at(root, (key,), message, hint="take it out, or run it as a grid in a file of its own")


def _check_objective(root: Node, name: str) -> ErrorDetail | None:
    mark, _ = locate(root, ("search", "objectives", name), key=True)
    known = [f"cost/{cost}" for cost in COSTS]
    for entry, node in root.entries("evaluate").items():
        for under in _under(node):
            place = f"eval/{entry}" if under == FINAL else f"eval/{entry}/under_{under}"
            if name.startswith(f"{place}/") and name.count("/") == place.count("/") + 1:
                return None
            known.append(f"{place}/accuracy")
    if name in known:
        return None
    allowed, hint = unknown_name(name, known)
    message = "no trial would have this metric"
    return ErrorDetail(message, *mark, path=f"search.objectives.{name}", value=name, allowed=allowed, hint=hint)


def _under(entry: Node) -> list[Any]:
    under = entry.get("under") if entry.is_mapping else None
    if under is None:
        return [FINAL]
    return [item.value for item in under.value] if under.is_list else [under.value]


def space_corners(root: Node, spec: ExperimentSpec, errors: list[ErrorDetail]) -> list[Assignment]:
    """Return the recipes at the ends of every range and with each choice, to be checked like cells of a grid.

    Args:
        root: The tree.
        spec: The base, without errors.
        errors: Takes what keeps anything from being drawn.
    """
    if spec.search is None:
        return []
    try:
        layer_tokens = variant_layer_tokens(spec)
    except ValueError as error:
        errors.append(error_at(root, ("search", "space"), str(error)))
        return []
    before = len(errors)
    for path, entry in spec.search.space.items():
        if isinstance(entry, StagedSpaceSpec):
            errors += [error_at(root, ("search", "space", path, key), text) for key, text in _room(entry, layer_tokens)]
        elif getattr(entry, "low", 0) > getattr(entry, "high", 0):
            errors.append(error_at(root, ("search", "space", path, "low"), "`low` is more than `high`"))
    if len(errors) > before:
        return []
    corners = {}
    for pick in range(_most_choices(spec.search)):
        for end in (0, 1):
            values = draw(_Corner(pick, end), spec.search, layer_tokens)
            corner = tuple(_setting(root, path, value) for path, value in values.items())
            corners[tuple(setting.key for setting in corner)] = corner
    return list(corners.values())


def _room(entry: StagedSpaceSpec, layer_tokens: Any) -> Iterator[tuple[str, str]]:
    most = inner_boundaries(entry) + 1
    for count in entry.num_stages:
        if count > most:
            yield "num_stages", f"{count} stages do not fit: with boundaries of {entry.boundaries} there are {most}"
    if not before_last(entry, layer_tokens) and (max(entry.num_stages) > 1 or entry.last is None):
        yield "variants", f"none of them compresses at least as much as the last stage, {entry.last}"


def _most_choices(search: SearchSpec) -> int:
    sizes = [
        len(entry.num_stages) if isinstance(entry, StagedSpaceSpec) else len(getattr(entry, "values", "1"))
        for entry in search.space.values()
    ]
    return max(sizes)


def _setting(root: Node, name: str, value: Any) -> Setting:
    where = ("search", "space", name)
    path = find_path(root, name)
    node = node_of(value, locate(root, where, key=True)[0])
    return Setting(dotted(path), path, node, value_key(node), where)


class _Corner:
    """Draws the lowest or the highest of every range, a given one of every choice, and variants in turn.

    In turn, because equal neighbours would be one stage, and that the shortest stage starts would not be seen.
    """

    def __init__(self, pick: int, end: int) -> None:
        self._pick, self._end, self._variants = pick, end, 0

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[self._pick % len(choices)]

    def suggest_int(self, name: str, low: int, high: int) -> int:
        if ".variant_" not in name:
            return (low, high)[self._end]
        self._variants += 1
        return low + (self._variants - 1) % (high - low + 1)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return (low, high)[self._end]
