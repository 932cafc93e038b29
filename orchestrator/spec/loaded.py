"""A loaded experiment with its cells, and its YAML with each value beside the place it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.yaml.file_paths import NamedPath

_WIDTH = 60


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


@dataclass(frozen=True)
class LoadedExperiment:
    """A valid experiment file.

    Attributes:
        path: The file; `<mapping>` where it was no file.
        spec: The base, axes not applied (the first cell's where the base is complete only with an axis).
        tree: The resolved tree: `extends` merged, aliases renamed, paths absolute, nulls taken out.
        sources: Dotted path of every value to `file:line`, `--set` or `default`.
        notices: What the user should know: renamed keys, merged cells, checks that are deferred.
        cells: The grid in order.
        starts: The experiments that phases of this one, or of these, start from; by the file named in `start_from`.
        overrides: The `--set` texts over the file.
        named: The files and folders that it names: what it extends, plug-ins, models, rows, and so on.
    """

    path: Path
    spec: ExperimentSpec
    tree: dict[str, Any]
    sources: dict[str, str]
    notices: tuple[str, ...]
    cells: tuple[ResolvedCell, ...]
    starts: dict[str, LoadedExperiment] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    named: tuple[NamedPath, ...] = ()

    def __repr__(self) -> str:
        return f"<LoadedExperiment {self.spec.name}: {len(self.cells)} cells, {self.path}>"


Source: TypeAlias = "str | Path | Mapping[str, Any] | LoadedExperiment"
"""What an experiment is loaded from: a file, a mapping of the same form, or one that is loaded already."""


def resolved_yaml(loaded: LoadedExperiment, with_sources: bool = True) -> str:
    """Return the complete experiment with defaults filled in, as YAML that loads again.

    Args:
        loaded: The experiment.
        with_sources: Adds a comment to every value: `file:line`, `--set` or `default`.
    """
    lines: list[str] = []
    sources = loaded.sources if with_sources else {}
    values = _written_points(loaded.spec.model_dump(mode="json"), loaded.tree)
    for key, value in values.items():
        _write(lines, key, value, key, 0, sources)
    return "\n".join(lines) + "\n"


def _written_points(values: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Show a variant with one point without a list where it was written so."""
    written = tree.get("compressors", {})
    for name, points in values["compressors"].items():
        if isinstance(written.get(name), dict):
            values["compressors"][name] = points[0]
    return values


def _write(lines: list[str], key: str, value: Any, path: str, depth: int, sources: dict[str, str]) -> None:
    indent = "  " * depth
    if not isinstance(value, dict | list) or not value:
        lines.append(_with_source(f"{indent}{_flow(key)}: {_flow(value)}", _source(sources, path)))
        return
    lines.append(f"{indent}{_flow(key)}:")
    if isinstance(value, dict):
        for name, item in value.items():
            _write(lines, name, item, f"{path}.{name}", depth + 1, sources)
    else:
        for index, item in enumerate(value):
            lines.append(_with_source(f"{indent}  - {_flow(item)}", _source(sources, f"{path}.{index}")))


def _source(sources: dict[str, str], path: str) -> str | None:
    if path in sources or not sources:
        return sources.get(path)
    inner = [source for name, source in sources.items() if name.startswith(path + ".") and source != "default"]
    return inner[0] if inner else "default"


def _with_source(text: str, source: str | None) -> str:
    return f"{text:<{_WIDTH}}  # {source}" if source else text


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
