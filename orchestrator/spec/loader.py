"""`load_experiment`: a YAML file or a mapping to a validated experiment and its cells, or all errors at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import ErrorDetail, SpecError
from orchestrator.redaction import environment_secrets, secret_in
from orchestrator.spec.checks.cell import Checks
from orchestrator.spec.checks.places import check_cluster, check_tracking
from orchestrator.spec.checks.start_from import Starts
from orchestrator.spec.controls import with_controls
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.grid import AxisReader, GridBuilder, Parts, apply, check_report, check_tested_cells
from orchestrator.spec.loaded import LoadedExperiment, Source
from orchestrator.spec.search_space import check_search, space_corners, tuned_on_test
from orchestrator.spec.yaml.environment import with_environment, without_references
from orchestrator.spec.yaml.file_paths import NamedPath, absolute_paths
from orchestrator.spec.yaml.merge import (
    Inheritance,
    Override,
    apply_overrides,
    drop_nulls,
    load_plugins,
    read_overrides,
)
from orchestrator.spec.yaml.node import Mark, Node, dotted
from orchestrator.spec.yaml.parser import control_character
from orchestrator.spec.yaml.schema import AXIS_KEYS
from orchestrator.spec.yaml.validation_errors import explain, is_unknown_kind

MAPPING = "<mapping>"
"""Stands for the file's name where a mapping is loaded; its folder is the current one."""
MAX_ERRORS = 200
_SECRETS = (
    "everything here is copied into the storage, MLflow and logs; take it out, and give it in the environment "
    "(HF_TOKEN, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...) or in the service's own file (~/.netrc, ~/.aws)"
)
_TRACKING_SECRETS = (
    "write ${env:NAME} in its place, or the address without it, and give MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) in the environment, or an entry in ~/.netrc; "
    "MLFLOW_TRACKING_URI may hold it too"
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
        errors: list[ErrorDetail] = []
        given = _given(source, (), errors)
        _stop_at(errors)
    return _load(Path(MAPPING if isinstance(source, Mapping) else source), starts, overrides, given)


def _given(value: Any, path: tuple[str | int, ...], errors: list[ErrorDetail]) -> Node:
    """Return a mapping as the tree of nodes that a file would give."""
    mark = Mark(MAPPING)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        errors += [ErrorDetail(f"the key {key!r} is no text", MAPPING, path=dotted(path)) for key in wrong]
        found = [(key, control_character(key)) for key in value if isinstance(key, str)]
        errors += [ErrorDetail(text, MAPPING, path=dotted(path), value=repr(key)) for key, text in found if text]
        entries = {key: _given(item, (*path, key), errors) for key, item in value.items() if isinstance(key, str)}
        return Node(entries, mark, keys=dict.fromkeys(entries, mark))
    if isinstance(value, list | tuple):
        return Node([_given(item, (*path, index), errors) for index, item in enumerate(value)], mark)
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and (problem := control_character(value)):
        errors.append(ErrorDetail(problem, MAPPING, path=dotted(path), value=repr(value)))
    if not isinstance(value, str | int | float | None):
        allowed = "text, numbers, true, false, None, lists and mappings of these, and paths"
        message = f"a value of type {type(value).__name__} cannot stand in an experiment"
        errors.append(ErrorDetail(message, MAPPING, path=dotted(path), value=repr(value), allowed=allowed))
    return Node(value, mark)


def _load(path: Path, around: Starts, overrides: Sequence[str] = (), given: Node | None = None) -> LoadedExperiment:
    starts = around.inside(path)
    root, errors, notices, named = _read(path, read_overrides(overrides), given)
    root, unset = with_environment(root)
    if unset:
        _stop_at([*errors, *unset])  # other errors would be of what stands there for now
    errors += _secrets(root)
    root = _with_absolute_paths(root, errors, named)
    before = len(errors)
    axes = AxisReader(root, errors, named).read()
    axes_are_valid = len(errors) == before  # an axis that is not there has no values to compare with either
    spec, base_errors = _base(root)
    parts = Parts(root)
    cluster = parts.get("cluster", ()).value
    builder = GridBuilder(root, axes, parts, Checks(cluster, notices, starts))
    found = builder.cells()
    if axes_are_valid:
        errors += [*check_report(root, axes, found), *check_tested_cells(root, axes, found)]
    errors += check_search(root)
    errors += [*check_cluster(root), *check_tracking(root)]
    everywhere = set.intersection(*({s.axis for s in cell} for cell in found)) if found else set()
    errors += [error for error in base_errors if not _is_given(error.path, everywhere)]
    errors += builder.errors
    if spec is None and not errors:
        spec, base_errors = _base(apply(root, found[0]))
        errors += base_errors
    # What is drawn depends on these; other errors do not hide its own.
    if spec is not None and not any(
        error.path.startswith(("search.space", "search.promote.set", "compressors", "model")) for error in errors
    ):
        builder.errors.clear()
        for corner in space_corners(root, spec, builder.errors):
            builder.examine(corner)
        errors += builder.errors
    _stop_at(errors)
    assert spec is not None
    cells = with_controls(builder.resolve(spec, found), root, builder.errors)
    _stop_at(builder.errors)
    all_notices = tuple(dict.fromkeys([*notices, *builder.notices, *tuned_on_test(spec)]))
    sources, others = _sources(root, spec), starts.experiments
    return LoadedExperiment(
        path, spec, root.plain(), sources, all_notices, cells, others, tuple(overrides), tuple(dict.fromkeys(named))
    )


def _read(
    path: Path, overrides: Sequence[Override], given: Node | None
) -> tuple[Node, list[ErrorDetail], list[str], list[NamedPath]]:
    files = Inheritance({} if given is None else {str(path): given})
    files.read(str(path))
    _stop_at(files.errors)  # all else would only say that what stands in that file is missing
    plugins = next((o.node for o in reversed(overrides) if o.text == "plugins"), None) or files.plugins(str(path))
    errors = load_plugins(plugins)
    root = files.merge(str(path))
    assert root is not None
    errors += files.errors
    root = apply_overrides(root, overrides, errors, files.notices)
    return drop_nulls(root), errors, files.notices, files.named


def _secrets(root: Node) -> list[ErrorDetail]:
    """Return the passwords and tokens in values and names, which would be copied into the storage, MLflow and logs."""
    errors, known = [], environment_secrets()
    for path, node in root.leaves():
        names = [key for key in path if isinstance(key, str)]
        text = without_references(node.value) if isinstance(node.value, str) else None
        found = None if text is None else secret_in(text, names[-1] if names else "", known)
        if what := found or next(filter(None, (secret_in(name, "", known) for name in names)), None):
            hint = _TRACKING_SECRETS if path[0] == "tracking" else _SECRETS
            errors.append(node.error(f"{what} must not stand in an experiment", path, hint=hint))
    return errors


def _with_absolute_paths(root: Node, errors: list[ErrorDetail], named: list[NamedPath]) -> Node:
    """Return the tree with every path absolute; an axis' values become absolute where they are read."""

    def absolute(key: str, child: Node) -> Node:
        return child if key in AXIS_KEYS else absolute_paths(root, child, (key,), errors, named)

    return root.map(absolute)


def _base(root: Node) -> tuple[ExperimentSpec | None, list[ErrorDetail]]:
    try:
        return ExperimentSpec.model_validate(root.plain()), []
    except ValidationError as error:
        return None, explain(error.errors(), root)


def _is_given(path: str, axes: set[str]) -> bool:
    """Return True where every cell replaces what is wrong or missing in the base."""
    return any(path == axis or path.startswith(axis + ".") for axis in axes)


def _unique(errors: Sequence[ErrorDetail]) -> list[ErrorDetail]:
    """Return each error once, in the order of the file; what only follows from another is left out."""
    once = list(dict.fromkeys(errors))
    if any(error.path.startswith("plugins.") for error in once):
        once = [error for error in once if not is_unknown_kind(error)]  # the plug-in would have defined it
    once.sort(key=lambda error: (error.file or "", error.line or 0, error.column or 0))
    shown, others = once[:MAX_ERRORS], once[MAX_ERRORS:]
    return [*shown, ErrorDetail(f"and {len(others)} more errors", others[0].file)] if others else shown


def _stop_at(errors: Sequence[ErrorDetail]) -> None:
    if errors:
        raise SpecError(_unique(errors))


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
