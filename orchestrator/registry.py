"""Finds components (compressors, schedules, data kinds, evaluations) by the `kind` of their spec, and trackers.

A component is a spec class that imports no torch and names its implementation as `module:Class`. Built-in ones
and an outsider's are found the same way: through an entry point, or through a file or module named in `plugins:`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrator.errors import UsageError

COMPRESSORS = "orchestrator.compressors"
SCHEDULES = "orchestrator.schedules"
DATA = "orchestrator.data"
EVALUATIONS = "orchestrator.evaluations"
TRACKERS = "orchestrator.trackers"
SORTS = {"compressors": COMPRESSORS, "schedules": SCHEDULES, "data": DATA, "evaluations": EVALUATIONS}
"""Every sort of component by its plain name, and its entry-point group."""

_from_plugins: dict[tuple[str, str], type[Any]] = {}


@cache
def _entry_points(group: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in entry_points(group=group):
        if entry.name in found and found[entry.name].value != entry.value:
            raise UsageError(
                f"{group}: the name {entry.name!r} is offered twice, by {found[entry.name].value} and {entry.value}; "
                "uninstall one of the two packages"
            )
        found[entry.name] = entry
    return found


def kinds(group: str) -> tuple[str, ...]:
    """Return the names of all known components of a group, sorted."""
    return tuple(sorted({*_entry_points(group), *(kind for g, kind in _from_plugins if g == group)}))


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is likely to be meant, or None: a wrong suggestion is worse than none.

    It is near where a letter in four at most is wrong (insertions, deletions, changes and swaps of neighbours), or
    where `name` is the beginning of that one name alone; capitals, `-` and `_` do not count. Names that differ in a
    number (`k2_s4`, `k2_s8`) are different things, not different spellings.
    """
    from rapidfuzz.distance import OSA

    plain = _plain(name)
    allowed = max(1, len(plain) // 4)
    near = [
        (distance, other)
        for other in known
        if (distance := OSA.distance(plain, _plain(other))) <= allowed and _digits(plain) == _digits(other)
    ]
    if near and len(plain) > 1:
        return min(near, key=lambda entry: entry[0])[1]
    longer = [other for other in known if len(plain) > 3 and _plain(other).startswith(plain + "_")]
    return longer[0] if len(longer) == 1 else None


def did_you_mean(name: str, known: Sequence[str]) -> str | None:
    """Return the hint that names the known name that is likely to be meant, None where there is none."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else None


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _digits(name: str) -> list[str]:
    return re.findall(r"[0-9]+", name)


def spec_class(group: str, kind: str) -> type[Any]:
    """Return the spec class of a component.

    Raises:
        KeyError: no component of that kind is known.
    """
    if (group, kind) in _from_plugins:
        return _from_plugins[group, kind]
    return _load(group, kind)


@cache
def _load(group: str, kind: str) -> type[Any]:
    return _entry_points(group)[kind].load()


def is_plugin(group: str, kind: str) -> bool:
    """Return whether a component is of a file or module that `plugins` names, not of an installed package."""
    return (group, kind) in _from_plugins


def load_object(reference: str) -> Any:
    """Return the object named `module:Name`."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def load_plugin(reference: str, base_folder: Path) -> tuple[type[Any], ...]:
    """Import a plug-in, a `.py` file relative to `base_folder` or an installed module, and register its specs.

    Returns:
        The spec classes it defines, in their order.

    Raises:
        UsageError: it does not exist, defines no component, or takes a name that is in use.
    """
    module = _import_plugin(reference, base_folder)
    found: list[Any] = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and getattr(value, "registry_group", None) and value.__module__ == module.__name__
    ]
    if not found:
        raise UsageError(
            f"plugins: {reference} defines no component (a CompressorSpec, ScheduleSpec, ...) and no Tracker"
        )
    for cls in found:
        group, kind = cls.registry_group, cls.kind_name()
        known = _from_plugins.get((group, kind))
        if kind in _entry_points(group) or (known is not None and known.__module__ != cls.__module__):
            raise UsageError(f"plugins: {reference} defines {kind!r}, a name already in use in {group}; rename it")
        _from_plugins[group, kind] = cls
    return tuple(found)


def class_of(reference: Any, group: str, who: str) -> type[Any]:
    """Return the spec class that a class itself, a mapping with a `kind`, or the path of a plug-in file names.

    Args:
        reference: Any of these.
        group: The sort of component.
        who: Who asks, for messages.

    Raises:
        UsageError: there is no such kind, or the file does not define exactly one component of this sort.
    """
    if isinstance(reference, type):
        return reference
    if isinstance(reference, str | Path):
        classes = [cls for cls in load_plugin(str(reference), Path.cwd()) if cls.registry_group == group]
        if len(classes) != 1:
            names = f" ({', '.join(cls.kind_name() for cls in classes)})" if classes else ""
            raise UsageError(
                f"{reference} defines {len(classes)} components of {group}{names}, not one; name one by a mapping with "
                "its `kind`, or check all of them: llavolta check FILE"
            )
        return classes[0]
    if (kind := reference.get("kind")) not in kinds(group):
        raise UsageError(f"{who}: no kind {kind!r} is registered in {group}; known: {', '.join(kinds(group))}")
    return spec_class(group, kind)


def _import_plugin(reference: str, base_folder: Path) -> ModuleType:
    if not reference.endswith(".py"):
        try:
            return importlib.import_module(reference)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"plugins: no module {reference!r} is installed; name an installed module or a .py file"
            ) from error
    path = (base_folder / reference).resolve()
    if not path.is_file():
        raise UsageError(f"plugins: {path} is not a file; {reference} is relative to {base_folder.resolve()}")
    name = f"llavolta_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"plugins: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
