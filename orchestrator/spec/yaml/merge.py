"""One tree from a file, the files it `extends` and `--set`; every value keeps the place where it was written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath

from orchestrator import registry
from orchestrator.errors import ErrorDetail, SpecError, UsageError
from orchestrator.spec.yaml.file_paths import NamedPath
from orchestrator.spec.yaml.node import Mark, Node, Path, dotted
from orchestrator.spec.yaml.parser import MAX_BYTES, MAX_NODES, read_tree, read_value
from orchestrator.spec.yaml.schema import AXIS_KEYS, ROOT, Shape, UnknownPathError, find_path, kind_at
from orchestrator.spec.yaml.validation_errors import unknown_path


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
    errors, found = [], []
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            errors.append(ErrorDetail("not of the form path=value", value=text, allowed="e.g. --set seed=1"))
            continue
        node, wrong = read_value(value, None)
        errors += [replace(error, line=None, column=None, path=path.strip(), value=value) for error in wrong]
        found.append(Override(path.strip(), _without_lines(node)))
    if errors:
        raise SpecError(errors)
    return found


def _without_lines(node: Node) -> Node:
    """Return the same value with `--set` as its place: a line of the command line helps nobody."""
    mark = Mark(None)
    return replace(node.map(lambda _, child: _without_lines(child)), mark=mark, keys=dict.fromkeys(node.keys, mark))


def apply_overrides(root: Node, overrides: Sequence[Override], errors: list[ErrorDetail], notices: list[str]) -> Node:
    """Return the tree with the overrides in place, in their order; unknown paths and grid axes are errors."""
    for override in overrides:
        if override.text == "extends":
            errors.append(ErrorDetail("extends is read before --set; edit the file", path=override.text))
            continue
        try:
            path = find_path(root, override.text)
        except UnknownPathError as error:
            message, allowed, hint = unknown_path(error)
            value = override.node.written()
            errors.append(ErrorDetail(message, path=override.text, value=value, allowed=allowed, hint=hint))
            continue
        name = dotted(path)
        if name != override.text:
            notices.append(f"--set: {override.text} is read as {name}")
        axis = next((a for a in _axes(root) if name == a or name.startswith(a + ".")), None)
        if axis is not None and path[0] not in AXIS_KEYS:
            hint = f"narrow the axis instead: --set 'matrix.{axis}=[...]'"
            message = f"{axis} is an axis of the grid, whose values would replace this one"
            errors.append(ErrorDetail(message, path=name, value=override.node.written(), hint=hint))
        else:
            root = root.set_at(path, override.node)
    return root


def _axes(root: Node) -> list[str]:
    groups = [root.entries("matrix"), *(group.entries() for group in root.items("zip"))]
    return [axis for group in groups for axis, values in group.items() if values.value is not None]


def _rename_aliases(root: Node, below: Node | None, found: Inheritance) -> Node:
    """Return a tree with canonical names.

    Args:
        root: One file's tree, not merged yet.
        below: What it extends, already canonical; says the `kind` where this file does not write it.
        found: Takes the errors and notices.
    """
    root = _rename(root, ROOT, below, (), found)
    names = root if below is None else merge_nodes(below, root)
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


def _rename(node: Node, shape: Shape | None, below: Node | None, path: Path, found: Inheritance) -> Node:
    if shape is None or not (node.is_mapping or node.is_list):
        return node
    if node.is_list:
        return node.map(lambda index, child: _rename(child, shape.child(index, node), None, (*path, index), found))
    if path and path[0] in AXIS_KEYS:
        return node
    typed = node if kind_at(node) is not None or below is None else below
    cls = shape.class_of(typed)
    if cls is not None and cls.aliases:
        node = _with_names(node, {key: cls.aliases.get(key, key) for key in node.value}, path, path, found)

    def inner(key: str, child: Node) -> Node:
        return _rename(child, shape.child(key, typed), below and below.get(key), (*path, key), found)

    return node.map(inner)


def _with_names(node: Node, names: Mapping[str, str], path: Path, shown: Path, found: Inheritance) -> Node:
    """Return a mapping with each key under its canonical name; `shown` is the path that notices show before it."""
    entries: dict[str, Node] = {}
    keys: dict[str, Mark] = {}
    for key, child in node.value.items():
        name, mark = names[key], node.keys[key]
        if name in entries:
            other = next(k for k in node.value if names[k] == name and k != key)
            message, hint = f"`{key}` and `{other}` are two names for the same key", f"write `{name}` alone"
            found.errors.append(ErrorDetail(message, *mark, dotted((*path, key)), hint=hint))
            continue
        if name != key:
            where = f"{mark.file}:{mark.line}: " if mark.line is not None else ""
            found.notices.append(f"{where}{dotted((*shown, key))} is read as {dotted((*shown, name))}")
        entries[name], keys[name] = child, mark
    return Node(entries, node.mark, keys=keys, size=node.size)


def _rename_axes(group: Node, names: Node, path: Path, found: Inheritance) -> Node:
    canonical = {}
    for key in group.value:
        try:
            canonical[key] = dotted(find_path(names, key))
        except UnknownPathError:
            canonical[key] = key  # reported once the files are merged, when every name is known
    return _with_names(group, canonical, path, (), found)


MAX_CHAIN = 32
_KEEPS_NULL = ("deepspeed",)


@dataclass
class Inheritance:
    """Reads an experiment file with all it extends; files are read and merged once however often they are named.

    Args:
        given: Trees that stand for files of these names.

    Attributes:
        errors: What is wrong with what was read so far.
        notices: What one should know of it.
        named: The files that `extends` names.
    """

    given: Mapping[str, Node] = field(default_factory=dict)
    errors: list[ErrorDetail] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    named: list[NamedPath] = field(default_factory=list)
    _files: dict[str, Node | None] = field(default_factory=dict)
    _merged: dict[str, Node | None] = field(default_factory=dict)
    _below: dict[str, list[str]] = field(default_factory=dict)
    _held: dict[str, Node | None] = field(default_factory=dict)

    def read(self, name: str, asked: Node | None = None, chain: tuple[str, ...] = ()) -> Node | None:
        """Read a file and all it extends.

        Args:
            name: The file.
            asked: The entry of `extends` that names it.
            chain: The files that wait for it.

        Returns:
            Its own tree; None where it cannot be read.
        """
        if name in chain:
            ring = " -> ".join([*chain[chain.index(name) :], name])
            assert asked is not None
            self.errors.append(asked.error(f"extends forms a cycle: {ring}", ("extends",)))
            return None
        if name in self._files:
            return self._files[name]
        if len(chain) >= MAX_CHAIN:
            assert asked is not None
            self.errors.append(asked.error(f"extends goes deeper than {MAX_CHAIN} files", ("extends",)))
            return None
        self._files[name] = self.given.get(name) or self._read_file(name, asked)
        self._below[name] = []
        for below, node in self._extends(name):
            self.read(below, node, (*chain, name))
            if below in self._files and below not in (*chain, name):
                self._below[name].append(below)
        return self._files[name]

    def _read_file(self, name: str, asked: Node | None) -> Node | None:
        try:
            if os.path.isdir(name):
                raise IsADirectoryError(21, "it is a folder, not a file")
            if not os.path.isfile(name) and os.path.exists(name):
                raise OSError(22, "it is not an ordinary file")
            with open(name, "rb") as stream:
                return read_tree(stream.read(MAX_BYTES + 1), name)
        except SpecError as error:
            self.errors.extend(error.errors)
        except OSError as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
            message = f"{name} cannot be read: {reason}"
            if asked is None:
                self.errors.append(ErrorDetail(message, name))
            else:
                hint = "the path is relative to the file that writes it"
                self.errors.append(asked.error(message, ("extends",), hint=hint))
        return None

    def _extends(self, name: str) -> list[tuple[str, Node]]:
        tree = self._files[name]
        node = tree.get("extends") if tree is not None else None
        if node is None or node.value is None:
            return []
        items = node.value if node.is_list else [node]
        paths = []
        for item in items:
            if isinstance(item.value, str) and item.value:
                paths.append((_beside(name, item.value), item))
                self.named.append(NamedPath("extends", item.value, item.mark, os.path.abspath(paths[-1][0])))
            else:
                allowed = "one path or a list of paths"
                self.errors.append(item.error("extends names files", ("extends",), allowed=allowed))
        return paths

    def plugins(self, name: str) -> Node | None:
        """Return the `plugins:` list that holds: the file's own, else that of the last file it extends."""
        if name not in self._held:
            tree = self._files[name]
            found = tree.get("plugins") if tree is not None else None
            for below in reversed(self._below[name]) if found is None else ():
                found = found or self.plugins(below)
            self._held[name] = found
        return self._held[name]

    def merge(self, name: str) -> Node | None:
        """Return the merged tree, names canonical, nulls still in it; None where the file cannot be read."""
        if name not in self._merged:
            own, below = self._files[name], None
            for other in self._below[name]:
                lower = self.merge(other)
                # What a file says of itself is not true of the one that extends it.
                lower = lower.with_entry("description", None) if lower is not None and lower.is_mapping else lower
                below = merge_nodes(below, lower) if below is not None and lower is not None else below or lower
            if own is not None:
                own = _rename_aliases(own.with_entry("extends", None), below, self)
                own = own if below is None else merge_nodes(below, own)
                if own.size > MAX_NODES:
                    self.errors.append(
                        ErrorDetail(f"{name} and what it extends hold more than {MAX_NODES} values", name)
                    )
            self._merged[name] = own
        return self._merged[name]


def _beside(file: str, reference: str) -> str:
    """Return a reference relative to the folder of the file that writes it."""
    return os.path.normpath(os.path.join(os.path.dirname(file), os.path.expanduser(reference)))


def load_plugins(node: Node | None) -> list[ErrorDetail]:
    """Import the plug-ins of a `plugins:` list; errors where one cannot be."""
    errors = []
    for index, item in enumerate(node.items() if node is not None else ()):  # no list: reported by the models
        if not isinstance(item.value, str):
            continue
        base = FilePath(item.mark.file).parent if item.mark.file is not None else FilePath.cwd()
        try:
            registry.load_plugin(item.value, base)
        except UsageError as error:
            message = str(error).removeprefix("plugins: ")
            errors.append(item.error(message, ("plugins", index)))
    return errors


def merge_nodes(below: Node, above: Node) -> Node:
    """Deep merge: `above` wins; a list replaces; an entry whose `kind` changes is replaced entirely."""
    if not (below.is_mapping and above.is_mapping):
        return above
    kinds = [node.get("kind") for node in (below, above)]
    if kinds[0] is not None and kinds[1] is not None and kinds[0].value != kinds[1].value:
        return above
    entries, keys = dict(below.value), dict(below.keys)
    for key, child in above.value.items():
        entries[key] = merge_nodes(entries[key], child) if key in entries else child
        keys[key] = above.keys[key]
    return Node(entries, above.mark, keys=keys, size=1 + sum(child.size for child in entries.values()))


def drop_nulls(node: Node, path: Path = ()) -> Node:
    """Take out entries that are null, which puts a key back to its default; an axis' null is a value and stays."""
    if node.is_mapping and path and path[-1] in _KEEPS_NULL:
        return node
    if node.is_mapping and not _picks_cells(path):
        entries = {key: child for key, child in node.value.items() if child.value is not None}
        node = Node(entries, node.mark, keys={key: node.keys[key] for key in entries}, size=node.size)
    return node.map(lambda key, child: drop_nulls(child, (*path, key)))


def _picks_cells(path: Path) -> bool:
    """Whether the mapping at this path is one of axes and their values."""
    if len(path) == 2:
        return path[0] in ("zip", "include", "exclude") or path == ("report", "baseline")
    return len(path) == 3 and (path[0], path[2]) == ("evaluate", "cells")
