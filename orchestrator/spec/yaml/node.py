"""Node: a value of an experiment file together with the place where it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orchestrator.errors import ErrorDetail, shorten
from orchestrator.redaction import redacted, without_secrets

Path = tuple[str | int, ...]


class Mark(NamedTuple):
    """Where something was written: `file` is None for a value of `--set`; line and column count from 1."""

    file: str | None
    line: int | None = None
    column: int | None = None


@dataclass(slots=True)
class Node:
    """A scalar, a list of nodes or a mapping of text to nodes. Never changed in place: anchors share nodes.

    Attributes:
        value: The scalar, `list[Node]` or `dict[str, Node]`.
        mark: Where the value begins.
        text: A scalar as written (`1e-3`), where it differs from Python's own way to write it.
        keys: Where each key of a mapping begins.
        size: Nodes in the tree below, itself included, anchors counted as often as they are used.
    """

    value: Any
    mark: Mark
    text: str | None = None
    keys: dict[str, Mark] = field(default_factory=dict)
    size: int = 1

    @property
    def is_mapping(self) -> bool:
        """True for a mapping."""
        return isinstance(self.value, dict)

    @property
    def is_list(self) -> bool:
        """True for a list."""
        return isinstance(self.value, list)

    def get(self, key: str | int) -> Node | None:
        """Return the entry under a key or an index, None where there is none."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def at(self, path: Sequence[str | int]) -> Node | None:
        """Return the node at a path, None where there is none."""
        node: Node | None = self
        for key in path:
            node = node.get(key) if node is not None else None
        return node

    def entries(self, *path: str | int) -> dict[str, Node]:
        """Return the entries of the mapping at a path; empty where there is none."""
        node = self.at(path)
        return node.value if node is not None and node.is_mapping else {}

    def items(self, *path: str | int) -> list[Node]:
        """Return the items of the list at a path; empty where there is none."""
        node = self.at(path)
        return node.value if node is not None and node.is_list else []

    def map(self, change: Callable[[Any, Node], Node]) -> Node:
        """Return a copy of a mapping or list with each child replaced by `change(key or index, child)`."""
        if isinstance(self.value, dict):
            children: Any = {key: change(key, child) for key, child in self.value.items()}
        elif isinstance(self.value, list):
            children = [change(index, child) for index, child in enumerate(self.value)]
        else:
            return self
        return Node(children, self.mark, keys=self.keys, size=self.size)

    def with_entry(self, key: str | int, child: Node | None, key_mark: Mark | None = None) -> Node:
        """Return a copy with one entry set, or taken out where `child` is None."""
        if isinstance(self.value, list):
            assert isinstance(key, int) and child is not None
            return Node([*self.value[:key], child, *self.value[key + 1 :]], self.mark, size=self.size)
        assert isinstance(self.value, dict) and isinstance(key, str)
        entries, keys = dict(self.value), dict(self.keys)
        if child is None:
            entries.pop(key, None)
            keys.pop(key, None)
        else:
            entries[key] = child
            keys[key] = key_mark or keys.get(key) or child.mark
        return Node(entries, self.mark, keys=keys, size=self.size)

    def set_at(self, path: Sequence[str | int], child: Node | None) -> Node:
        """Return a copy with the node at a path set or taken out; missing mappings on the way are made."""
        key, rest = path[0], path[1:]
        if not rest:
            return self.with_entry(key, child)
        inner = self.get(key)
        if inner is None or not (inner.is_mapping or inner.is_list):
            if child is None:
                return self
            inner = Node({}, child.mark)
        return self.with_entry(key, inner.set_at(rest, child))

    def plain(self) -> Any:
        """Return the value as plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def leaves(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """Return every scalar, empty mapping and empty list with its path."""
        if self.value and isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.leaves((*path, key))
        elif self.value and isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.leaves((*path, index))
        else:
            yield path, self

    def written(self) -> str:
        """Return the value as the user wrote it, shortened to one line, without the secrets in it."""
        return shorten(redacted(self.text if self.text is not None else as_yaml(without_secrets(self.plain()))))

    def error(self, message: str, path: Path = (), allowed: str | None = None, hint: str | None = None) -> ErrorDetail:
        """Return an error at this node."""
        return ErrorDetail(message, *self.mark, dotted(path), self.written(), allowed, hint)


def dotted(path: Sequence[str | int]) -> str:
    """Return `("stages", 0, "share")` as `stages.0.share`."""
    return ".".join(str(key) for key in path)


def as_yaml(value: Any) -> str:
    """Return a plain value in YAML's flow style, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_yaml(item) for item in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def node_of(value: Any, mark: Mark) -> Node:
    """Return a node from a plain value, every part at the same mark."""
    if isinstance(value, dict):
        entries = {str(key): node_of(item, mark) for key, item in value.items()}
        return Node(entries, mark, keys=dict.fromkeys(entries, mark))
    if isinstance(value, list | tuple):
        return Node([node_of(item, mark) for item in value], mark)
    return Node(value, mark)
