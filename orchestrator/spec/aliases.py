"""Other frameworks' names become the canonical ones before files are merged; every renaming is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import Fault
from orchestrator.spec.node import Mark, Node, Path, dotted
from orchestrator.spec.shape import AXIS_KEYS, ROOT, Shape, UnknownPathError, find_path, kind_at


@dataclass
class Renaming:
    """What a file's renaming brought up."""

    faults: list[Fault] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def rename_aliases(root: Node, below: Node | None, found: Renaming) -> Node:
    """A tree with canonical names.

    Args:
        root: One file's tree, not merged yet.
        below: What it extends, already canonical; tells the `kind` where this file does not write it.
        found: Takes the faults and notices.
    """
    root = _rename(root, ROOT, below, (), found)
    names = _merged_names(root, below)
    for key in AXIS_KEYS:
        node = root.get(key)
        if node is None:
            continue
        groups = enumerate(node.value) if node.is_list else [(None, node)]
        for index, group in groups:
            if group.is_mapping:
                renamed = _rename_axes(group, names, (key,) if index is None else (key, index), found)
                root = root.set_at((key,) if index is None else (key, index), renamed)
    return root


def _merged_names(root: Node, below: Node | None) -> Node:
    """A tree good enough to look paths up in: this file's entries over what it extends."""
    if below is None or not (root.is_mapping and below.is_mapping):
        return root
    entries: dict[str, Any] = {**below.value, **root.value}
    for key, child in root.value.items():
        if key in below.value and child.is_mapping and below.value[key].is_mapping:
            entries[key] = _merged_names(child, below.value[key])
    return Node(entries, root.mark, keys={**below.keys, **root.keys})


def _rename(node: Node, shape: Shape | None, below: Node | None, path: Path, found: Renaming) -> Node:
    if shape is None or not (node.is_mapping or node.is_list):
        return node
    if node.is_list:
        children = [_rename(c, shape.child(i, node), None, (*path, i), found) for i, c in enumerate(node.value)]
        return Node(children, node.mark, size=node.size)
    if path and path[0] in AXIS_KEYS:
        return node
    typed = node if kind_at(node) is not None or below is None else below
    cls = shape.class_of(typed)
    if cls is not None and cls.aliases:
        node = _rename_keys(node, cls.aliases, path, found)
    entries = {}
    for key, child in node.value.items():
        inner = below.get(key) if below is not None and below.is_mapping else None
        entries[key] = _rename(child, shape.child(key, typed), inner, (*path, key), found)
    return Node(entries, node.mark, keys=node.keys, size=node.size)


def _rename_keys(node: Node, aliases: dict[str, str], path: Path, found: Renaming) -> Node:
    if not aliases.keys() & node.value.keys():
        return node
    entries: dict[str, Node] = {}
    keys: dict[str, Mark] = {}
    for key, child in node.value.items():
        name = aliases.get(key, key)
        if name in entries:
            other = next(k for k in node.value if aliases.get(k, k) == name and k != key)
            found.faults.append(_both(key, other, name, node.keys[key], (*path, key)))
            continue
        if name != key:
            found.notices.append(_notice(node.keys[key], (*path, key), (*path, name)))
        entries[name], keys[name] = child, node.keys[key]
    return Node(entries, node.mark, keys=keys, size=node.size)


def _both(key: str, other: str, name: str, mark: Mark, path: Path) -> Fault:
    message = f"`{key}` and `{other}` are two names for the same key"
    return Fault(message, mark.file, mark.line, mark.column, dotted(path), hint=f"write `{name}` alone")


def _notice(mark: Mark, old: Path, new: Path) -> str:
    where = f"{mark.file}:{mark.line}: " if mark.line is not None else ""
    return f"{where}{dotted(old)} is read as {dotted(new)}"


def _rename_axes(group: Node, names: Node, path: Path, found: Renaming) -> Node:
    entries: dict[str, Node] = {}
    keys: dict[str, Mark] = {}
    for key, child in group.value.items():
        try:
            name = dotted(find_path(names, key))
        except UnknownPathError:
            name = key  # told once the files are merged, when every name is known
        if name in entries:
            other = next(k for k in group.value if k != key and keys.get(name) == group.keys[k])
            found.faults.append(_both(key, other, name, group.keys[key], (*path, key)))
            continue
        if name != key:
            found.notices.append(_notice(group.keys[key], (key,), (name,)))
        entries[name], keys[name] = child, group.keys[key]
    return Node(entries, group.mark, keys=keys, size=group.size)
