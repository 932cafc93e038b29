"""`load_experiment`: a YAML file to a validated experiment and its cells, or all its faults at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import Fault, SpecError
from orchestrator.redaction import environment_secrets, secret_in
from orchestrator.spec.checks.cell import Checks
from orchestrator.spec.checks.places import check_cluster, check_tracking
from orchestrator.spec.checks.references import References
from orchestrator.spec.checks.sections import check_report, check_search, space_corners
from orchestrator.spec.checks.start_from import Starts
from orchestrator.spec.controls import with_controls
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.grid.axes import AxisReader
from orchestrator.spec.grid.cells import GridBuilder, Parts, apply
from orchestrator.spec.loaded import LoadedExperiment, Source
from orchestrator.spec.yaml.file_paths import absolute_paths
from orchestrator.spec.yaml.merge import (
    Inheritance,
    Override,
    apply_overrides,
    drop_nulls,
    load_plugins,
    read_overrides,
)
from orchestrator.spec.yaml.node import Mark, Node, dotted
from orchestrator.spec.yaml.validation_errors import explain, is_unknown_kind

MAPPING = "<mapping>"
"""Stands for the file's name where a mapping is loaded; its folder is the current one."""
MAX_FAULTS = 200
_SECRETS = (
    "everything here is copied into the storage, MLflow and logs; take it out, and give it in the environment "
    "(HF_TOKEN, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...) or in the service's own file (~/.netrc, ~/.aws)"
)
_TRACKING_SECRETS = (
    "write the address without it, and give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
    "MLFLOW_TRACKING_TOKEN) in the environment, or an entry in ~/.netrc; MLFLOW_TRACKING_URI may hold it too"
)


def load_experiment(source: Source, overrides: Sequence[str] = ()) -> LoadedExperiment:
    """Read, merge and validate an experiment and expand its grid.

    Args:
        source: The YAML file; or a mapping of the same form, whose relative paths start in the current folder; or an
            experiment that is loaded already, which is returned as it is.
        overrides: `a.b=c` settings of `--set`, values in YAML.

    Raises:
        SpecError: all errors of the file, of those it extends, of those it starts from, and of the overrides.
    """
    if isinstance(source, LoadedExperiment):
        assert not overrides, "overrides are applied when an experiment is loaded"
        return source
    starts, given = Starts(lambda file, inside: _load(file, inside)), None
    if isinstance(source, Mapping):
        faults: list[Fault] = []
        given = _given(source, (), faults)
        _stop_at(faults)
    return _load(Path(MAPPING if isinstance(source, Mapping) else source), starts, overrides, given)


def _given(value: Any, path: tuple[str | int, ...], faults: list[Fault]) -> Node:
    """Return a mapping as the tree of nodes that a file would give."""
    mark = Mark(MAPPING)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        faults += [Fault(f"the key {key!r} is no text", MAPPING, path=dotted(path)) for key in wrong]
        entries = {key: _given(item, (*path, key), faults) for key, item in value.items() if isinstance(key, str)}
        return Node(entries, mark, keys=dict.fromkeys(entries, mark))
    if isinstance(value, list | tuple):
        return Node([_given(item, (*path, index), faults) for index, item in enumerate(value)], mark)
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str | int | float | None):
        allowed = "text, numbers, true, false, None, lists and mappings of these, and paths"
        faults.append(
            Fault(f"a value of type {type(value).__name__} cannot stand in an experiment", MAPPING, path=dotted(path),
                  value=repr(value), allowed=allowed)
        )  # fmt: skip
    return Node(value, mark)


def _load(path: Path, around: Starts, overrides: Sequence[str] = (), given: Node | None = None) -> LoadedExperiment:
    starts = around.inside(path)
    root, faults, notices = _read(path, read_overrides(overrides), given)
    faults += _secrets(root)
    faults += [fault for key in root.value for fault in _absolute(root, key)]
    root = _absolute_tree(root)
    before = len(faults)
    axes = AxisReader(root, faults).read()
    whole = len(faults) == before  # an axis that is not there has no values to compare with either
    spec, errors = _base(root)
    parts = Parts(root)
    cluster = parts.get("cluster", ()).value
    builder = GridBuilder(root, axes, parts, Checks(cluster, notices, starts), References().check)
    found = builder.cells()
    faults += [*(check_report(root, axes, found) if whole else []), *check_search(root)]
    faults += [*check_cluster(root), *check_tracking(root)]
    everywhere = set.intersection(*({s.axis for s in cell} for cell in found)) if found else set()
    faults += [fault for fault in errors if not _is_given(fault.path, everywhere)]
    faults += builder.faults
    if spec is None and not faults:
        spec, errors = _base(apply(root, found[0]))
        faults += errors
    _stop_at(faults)
    assert spec is not None
    builder.faults.clear()
    cells = with_controls(builder.resolve(spec, found), root, builder.faults)
    for corner in space_corners(root, spec, builder.faults):
        builder.examine(corner)
    _stop_at(builder.faults)
    told = tuple(dict.fromkeys([*notices, *builder.notices]))
    sources, others = _sources(root, spec), starts.experiments
    return LoadedExperiment(path, spec, root.plain(), sources, told, cells, others, tuple(overrides))


def _read(path: Path, overrides: Sequence[Override], given: Node | None) -> tuple[Node, list[Fault], list[str]]:
    files = Inheritance({} if given is None else {str(path): given})
    raw = files.read(path)
    if raw is None:
        raise SpecError(_unique(files.faults))
    plugins = next((o.node for o in reversed(overrides) if o.text == "plugins"), None) or files.plugins(path)
    if files.faults:
        raise SpecError(_unique(files.faults))  # all else would only say that what stands in that file is missing
    faults = load_plugins(plugins)
    root = files.merge(path)
    faults += [*files.faults, *files.renaming.faults]
    notices = list(files.renaming.notices)
    root = apply_overrides(root, overrides, faults, notices)
    return drop_nulls(root), faults, notices


def _secrets(root: Node) -> list[Fault]:
    """Return the passwords and tokens among the values and names, which would be copied into the storage, MLflow and
    logs.
    """
    faults, known = [], environment_secrets()
    for path, node in root.leaves():
        names = [key for key in path if isinstance(key, str)]
        found = secret_in(node.value, names[-1] if names else "", known) if isinstance(node.value, str) else None
        if what := found or next(filter(None, (secret_in(name, "", known) for name in names)), None):
            hint = _TRACKING_SECRETS if path[0] == "tracking" else _SECRETS
            faults.append(node.fault(f"{what} must not stand in an experiment", path, hint=hint))
    return faults


def _absolute(root: Node, key: str) -> list[Fault]:
    faults: list[Fault] = []
    if key not in ("matrix", "zip", "include", "exclude"):
        absolute_paths(root, root.value[key], (key,), faults)
    return faults


def _absolute_tree(root: Node) -> Node:
    """Return every path absolute; an axis' values become absolute where they are read."""
    for key, child in root.value.items():
        if key not in ("matrix", "zip", "include", "exclude"):
            root = root.with_entry(key, absolute_paths(root, child, (key,), []), root.keys[key])
    return root


def _base(root: Node) -> tuple[ExperimentSpec | None, list[Fault]]:
    try:
        return ExperimentSpec.model_validate(root.plain()), []
    except ValidationError as error:
        return None, explain(error.errors(), root)


def _is_given(path: str, axes: set[str]) -> bool:
    """Return True where every cell replaces what is wrong or missing in the base."""
    return any(path == axis or path.startswith(axis + ".") for axis in axes)


def _unique(faults: Sequence[Fault]) -> list[Fault]:
    """Return each fault once, in the order of the file; what only follows from another is left out."""
    once = list(dict.fromkeys(faults))
    if any(fault.path.startswith("plugins.") for fault in once):
        once = [fault for fault in once if not is_unknown_kind(fault)]  # the plug-in would have brought it
    return sorted(once, key=lambda fault: (fault.file or "", fault.line or 0, fault.column or 0))[:MAX_FAULTS]


def _stop_at(faults: Sequence[Fault]) -> None:
    if faults:
        raise SpecError(_unique(faults))


def _sources(root: Node, spec: ExperimentSpec) -> dict[str, str]:
    sources = {}
    for path, node in root.leaves():
        file, line, _ = node.mark
        sources[dotted(path)] = "--set" if file is None else file if line is None else f"{file}:{line}"
    for name in _default_paths(spec.model_dump(mode="json"), root, ()):
        sources.setdefault(name, "default")
    return sources


def _default_paths(value: Any, node: Node | None, path: tuple[str | int, ...]) -> list[str]:
    if isinstance(value, dict) and value:
        return [
            found
            for key, item in value.items()
            for found in _default_paths(item, node.get(key) if node is not None else None, (*path, key))
        ]
    return [dotted(path)] if node is None else []
