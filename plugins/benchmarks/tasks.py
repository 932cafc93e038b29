"""The tasks that the installed lmms-eval defines, found without importing it (which takes 13 s and torch)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from orchestrator_plugins.benchmarks.templates import TEMPLATES

from orchestrator import plugin

PACKAGE = "lmms_eval"
VERSION = "0.7.2"
INSTALL = (
    "make benchmarks, or: pip install 'llavolta-orchestrator[benchmarks]' && "
    f"pip install --no-deps lmms-eval=={VERSION}"
)
FROM_SOURCE = f"pip install --no-deps git+https://github.com/EvolvingLMMs-Lab/lmms-eval@v{VERSION}"
_COMPANIONS = (
    "datasets",
    "evaluate",
    "jsonlines",
    "loguru",
    "openai",
    "pytablewriter",
    "pytz",
    "sacrebleu",
    "tenacity",
)
_KEY = re.compile(r"^(task|group|include):[ \t]*([^#\n]*?)[ \t]*(?:#.*)?$", re.MULTILINE)
_CACHES = ("__pycache__", ".ipynb_checkpoints")


@dataclass(frozen=True)
class Definition:
    """Where a task or a group of tasks is defined, and which files its YAML includes."""

    file: Path
    includes: tuple[str, ...]

    def missing(self) -> list[Path]:
        """Return the files that it includes, and those include, which are not there."""
        found: list[Path] = []
        for name in self.includes:
            path = Path(os.path.normpath(self.file.parent / name))
            found += _definition_of(path).missing() if path.is_file() else [path]
        return found


def installed() -> Path | None:
    """Return lmms-eval's folder of tasks; None where it or a package that it needs is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or not all(map(find_spec, _COMPANIONS)):
        return None
    return Path(spec.submodule_search_locations[0]) / "tasks"


def lacking() -> list[str]:
    """Return the names of packages that are not installed."""
    return [name for name in (PACKAGE, *_COMPANIONS) if find_spec(name) is None]


def toolkit() -> str:
    """Return the name and version of what is installed."""
    try:
        return f"lmms-eval {version('lmms-eval')}"
    except PackageNotFoundError:  # a folder on the path
        return "lmms-eval"


def definitions(include_path: str | None) -> dict[str, Definition]:
    """Return the tasks and groups by name; a user's own come before lmms-eval's of that name."""
    root = installed()
    found = {} if root is None else dict(_scan(str(root)))
    if include_path is not None:
        found |= _scan_now(include_path)
    return found


def unfilled(definition: Definition) -> list[Path]:
    """Return the files that a task includes and neither the package nor `templates` has."""
    root = installed()
    return [path for path in definition.missing() if root is None or _below(path, root) not in TEMPLATES]


def sources(names: Iterable[str], include_path: str | None, folder: Path) -> tuple[list[str], bool]:
    """Return folders for lmms-eval to look for tasks in: those of the tasks named, a user's own first.

    It reads every definition of a folder, and fails at the first that includes a file which is not there. So a folder
    with such ones is copied by links, without them, and what `templates` has is added.

    Args:
        names: Tasks and groups.
        include_path: The user's folder.
        folder: Takes the copies.

    Returns:
        The folders, and whether a file was added.
    """
    root, known = installed(), definitions(include_path)
    assert root is not None
    families = dict.fromkeys(
        _below(known[name].file, root).partition("/")[0]
        for name in _with_members(names, known)
        if root in known[name].file.parents
    )
    found, added = [] if include_path is None else [include_path], False
    for family in families:
        if any(one.missing() for one in map(_definition_of, _yaml_files(root / family))):
            folder.mkdir(parents=True, exist_ok=True)
            added |= _copy(root, family, folder)
            found.append(str(folder / family))
        else:
            found.append(str(root / family))
    return found, added


def _with_members(names: Iterable[str], known: Mapping[str, Definition]) -> Iterator[str]:
    """Yield tasks and groups, and the members of groups that have a name."""
    for name in names:
        if name not in known:
            continue
        yield name
        members = _load(known[name].file).get("task")
        if isinstance(members, list):
            some = (one.get("task") if isinstance(one, dict) else one for one in members)
            yield from _with_members((one for one in some if isinstance(one, str) and one != name), known)


def _copy(root: Path, family: str, folder: Path) -> bool:
    """Link a family's files and its neighbours, leave out what cannot be read, add what is missing."""
    for neighbour in root.iterdir():
        if neighbour.is_dir() and neighbour.name not in (*_CACHES, family) and not (folder / neighbour.name).exists():
            (folder / neighbour.name).symlink_to(neighbour)
    if (folder / family).is_symlink():
        (folder / family).unlink()
    for path in sorted((root / family).rglob("*")):
        target = folder / path.relative_to(root)
        if path.is_dir() or any(part in _CACHES for part in path.parts):
            continue
        if path.suffix == ".yaml" and unfilled(_definition_of(path)):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    added = [name for name in TEMPLATES if name.startswith(f"{family}/") and not (root / name).exists()]
    for name in added:
        (folder / name).write_text(TEMPLATES[name], encoding="utf-8")
    return bool(added)


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if root in path.parents else ""


@lru_cache(maxsize=8)
def _scan(folder: str) -> dict[str, Definition]:
    return _scan_now(folder)


def _scan_now(folder: str) -> dict[str, Definition]:
    found: dict[str, Definition] = {}
    for path in _yaml_files(Path(folder)):
        text = path.read_text(encoding="utf-8", errors="replace")
        keys = dict(_KEY.findall(text))
        name = _plain(keys.get("task", "")) or _plain(keys.get("group", ""))
        if name:
            found[name] = _definition_of(path)
    return found


def _yaml_files(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _CACHES)
        yield from (Path(place) / name for name in sorted(files) if name.endswith(".yaml"))


@lru_cache(maxsize=8192)
def _definition_at(file: str, changed_ns: int) -> Definition:
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    value = dict(_KEY.findall(text)).get("include")
    if value is None:
        return Definition(Path(file), ())
    if plain := _plain(value):
        return Definition(Path(file), (plain,))
    return Definition(Path(file), tuple(map(str, _load(Path(file)).get("include", ()))))


def _definition_of(file: Path) -> Definition:
    return _definition_at(str(file), file.stat().st_mtime_ns)


def _plain(value: str) -> str:
    text = value.strip().strip("\"'")
    return text if re.fullmatch(r"[\w.+\-/ ]+", text) else ""


class _Loader(yaml.SafeLoader):
    """Reads lmms-eval's YAML without importing the functions that it names."""


_Loader.add_constructor("!function", lambda _, node: str(node.value))


def _load(file: Path) -> dict[str, Any]:
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, yaml.YAMLError) as error:
        raise plugin.UsageError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return found if isinstance(found, dict) else {}
