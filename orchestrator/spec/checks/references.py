"""Names an experiment refers to: data sets, schedules, variants. Checked on the tree, so also beside other errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from orchestrator import registry
from orchestrator.errors import ErrorDetail
from orchestrator.spec.components import FINAL, FULL
from orchestrator.spec.phase import PHASES
from orchestrator.spec.yaml.key_paths import NAMED, names_at
from orchestrator.spec.yaml.node import Node, Path, dotted
from orchestrator.spec.yaml.validation_errors import locate, stray_keys, unknown_name


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
        # Where a section's own entries cannot be told, what it holds is not known: that is the error, and told there.
        self._unsure = {section for section in NAMED if self._is_unsure(section)}
        self.data = self._names("data")
        self.variants = self._names("compressors")
        self.schedules = self._names("schedules")

    def check(self, definitions: bool) -> list[ErrorDetail]:
        """Return all errors; those of variants and schedules themselves only with `definitions`."""
        if definitions:
            self._check_definitions()
            for name, node in _entries(self.root.get("schedules")):
                self._check_schedule(("schedules", name), node)
        for name in PHASES:
            phase = self.root.at(("phases", name))
            if phase is not None and phase.is_mapping:
                self._check_phase(("phases", name), phase)
        for name, node in _entries(self.root.get("evaluate")):
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
                self._unknown(where, f"there is no variant `{name}`", name, [*self.variants, FULL])

    def _check_phase(self, path: Path, phase: Node) -> None:
        for where, name in _texts(phase.get("data"), (*path, "data"), keys=True):
            if name not in self.data and "data" not in self._unsure:
                self._unknown(where, f"there is no data set `{name}`", name, self.data, key=where[-1] != "data")
        schedule = phase.get("schedule")
        known = [*self.schedules, *self.variants, FULL]
        if schedule is not None and schedule.is_mapping:
            self._check_schedule((*path, "schedule"), schedule)
        for key in ("schedule", "match_train_tflops"):
            for where, name in _texts(phase.get(key), (*path, key)):
                if name not in known and self._unsure.isdisjoint(("schedules", "compressors")):
                    self._unknown(where, f"there is no schedule or variant `{name}`", name, known)

    def _check_evaluation(self, path: Path, node: Node) -> None:
        for where, name in _texts(node.get("data"), (*path, "data")):
            if name not in self.data and "data" not in self._unsure:
                self._unknown(where, f"there is no data set `{name}`", name, self.data)
        for where, name in _texts(node.get("under"), (*path, "under")):
            if name not in (*self.variants, FULL, FINAL) and "compressors" not in self._unsure:
                known = [FINAL, FULL, *self.variants]
                self._unknown(where, f"there is no variant `{name}` to test under", name, known)

    def _check_search(self) -> None:
        search = self.root.get("search")
        known = [*self.variants, FULL]
        for key, node in _entries(search.get("space") if search is not None and search.is_mapping else None):
            path: Path = ("search", "space", key)
            for field in ("variants", "last"):
                for where, name in _texts(node.get(field), (*path, field)):
                    if name not in known and "compressors" not in self._unsure:
                        self._unknown(where, f"there is no variant `{name}`", name, known)

    def _is_unsure(self, section: str) -> bool:
        node = self.root.get(section)
        if node is None:
            unknown = [key for key in self.root.value if key not in names_at(self.root, ())]
            return any(registry.nearest(key, (section,)) for key in unknown)
        return not (node.is_mapping or node.value is None) or bool(stray_keys(self.root, section))

    def _names(self, section: str) -> tuple[str, ...]:
        return tuple(name for name, _ in _entries(self.root.get(section)))

    def _unknown(self, path: Path, message: str, name: str, known: Sequence[str], key: bool = False) -> None:
        allowed, hint = unknown_name(name, known)
        self._error(path, message, allowed, hint, key)

    def _error(
        self, path: Path, message: str, allowed: str | None = None, hint: str | None = None, key: bool = False
    ) -> None:
        mark, value = locate(self.root, path, key=key)
        value = str(path[-1]) if key else value
        self.errors.append(ErrorDetail(message, *mark, path=dotted(path), value=value, allowed=allowed, hint=hint))


def _variants_of(node: Node) -> tuple[str, ...]:
    """Return the variants a schedule uses; where it has other errors, what stands under `compressor` in it."""
    value: Any = node.plain()
    try:
        schedule = registry.spec_class(registry.SCHEDULES, value["kind"]).model_validate(value)
        return tuple(schedule.variants())
    except (ValidationError, KeyError, TypeError, ImportError, AttributeError):
        found = (leaf.value for path, leaf in node.leaves() if path[-1:] == ("compressor",))
        return tuple(dict.fromkeys(name for name in found if isinstance(name, str)))


def _entries(node: Node | None) -> list[tuple[str, Node]]:
    return list(node.value.items()) if node is not None and node.is_mapping else []


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
