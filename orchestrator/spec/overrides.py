"""`--set a.b=c`: values from the command line, parsed as YAML and put over the merged tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.errors import Fault, SpecError
from orchestrator.spec.faults import unknown_key
from orchestrator.spec.node import SET, Mark, Node, dotted
from orchestrator.spec.shape import AXIS_KEYS, UnknownPathError, find_path
from orchestrator.spec.yaml_tree import read_value


@dataclass(frozen=True)
class Override:
    """One `--set`: the dotted path as written and its value."""

    text: str
    node: Node


def read_overrides(overrides: Sequence[str]) -> list[Override]:
    """Split and parse `a.b=c` settings.

    Raises:
        SpecError: one is not of the form `path=value`, or its value is not YAML.
    """
    faults, found = [], []
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            faults.append(Fault("not of the form path=value", value=text, allowed="e.g. --set seed=1"))
            continue
        node, wrong = read_value(value, None)
        faults += [replace(fault, line=None, column=None, path=path.strip(), value=value) for fault in wrong]
        found.append(Override(path.strip(), _without_lines(node)))
    if faults:
        raise SpecError(faults)
    return found


def _without_lines(node: Node) -> Node:
    """Return the same value with `--set` as its place: a line of the command line helps nobody."""
    mark = Mark(None)
    if node.is_mapping:
        entries = {key: _without_lines(child) for key, child in node.value.items()}
        return Node(entries, mark, keys=dict.fromkeys(entries, mark), size=node.size)
    if node.is_list:
        return Node([_without_lines(child) for child in node.value], mark, size=node.size)
    return Node(node.value, mark, text=node.text)


def apply_overrides(root: Node, overrides: Sequence[Override], faults: list[Fault], notices: list[str]) -> Node:
    """Return the tree with the overrides in place, in their order; unknown paths and grid axes are faults."""
    for override in overrides:
        if override.text == "extends":
            faults.append(Fault("extends is read before --set; edit the file", path=override.text))
            continue
        try:
            path = find_path(root, override.text)
        except UnknownPathError as error:
            allowed, hint = unknown_key(error.key, error.known, error.prefix)
            place = f" under {dotted(error.prefix)}" if error.prefix else ""
            message = f"`{error.key}` is not known{place}"
            faults.append(Fault(message, path=override.text, value=override.node.written(), allowed=allowed, hint=hint))
            continue
        name = dotted(path)
        if name != override.text:
            notices.append(f"{SET}: {override.text} is read as {name}")
        axis = next((a for a in _axes(root) if name == a or name.startswith(a + ".")), None)
        if axis is not None and path[0] not in AXIS_KEYS:
            hint = f"narrow the axis instead: --set 'matrix.{axis}=[...]'"
            message = f"{axis} is an axis of the grid, whose values would replace this one"
            faults.append(Fault(message, path=name, value=override.node.written(), hint=hint))
        else:
            root = root.set_at(path, override.node)
    return root


def _axes(root: Node) -> list[str]:
    found: list[str] = []
    matrix, groups = root.get("matrix"), root.get("zip")
    if matrix is not None and matrix.is_mapping:
        found += matrix.value
    for group in groups.value if groups is not None and groups.is_list else []:
        found += group.value if group.is_mapping else []
    return found
