"""Paths of an experiment file, made absolute from the folder of the file that writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from orchestrator import registry
from orchestrator.errors import ErrorDetail
from orchestrator.spec.base import Component
from orchestrator.spec.yaml.key_hints import hint_for_value
from orchestrator.spec.yaml.node import Mark, Node, Path, dotted
from orchestrator.spec.yaml.schema import NAMED, UnknownPathError, class_at, find_path

DEEPSPEED_PRESETS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
_LONGEST_NAME = 255
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class NamedPath:
    """A file or folder that an experiment names.

    Attributes:
        key: Dotted path of the key it stands under.
        written: As written: relative to the file that writes it, or absolute.
        mark: Where it is written.
        path: Absolute.
    """

    key: str
    written: str
    mark: Mark
    path: str


Rule = Callable[[Node, Path], tuple[str, ErrorDetail | None]]


def absolute_paths(root: Node, node: Node, path: Path, errors: list[ErrorDetail], named: list[NamedPath]) -> Node:
    """Return the node at `path` with its paths absolute; every missing folder or file is an error.

    Args:
        root: The merged tree, which says the `kind` of a named entry.
        node: The value at `path`, or an axis' value for it.
        path: Where the value stands or would stand.
        errors: Takes the errors.
        named: Takes what is named.
    """
    if node.is_mapping or node.is_list:
        return node.map(lambda key, child: absolute_paths(root, child, (*path, key), errors, named))
    rule = _rule(root, path) if isinstance(node.value, str) and node.value else None
    if rule is None:
        return node
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in node.value.split("/")):
        errors.append(node.error("no file can be named so", path, allowed=f"names of at most {_LONGEST_NAME} bytes"))
        return Node(node.value[: _LONGEST_NAME // 4], node.mark)  # later checks may ask for it
    value, error = rule(node, path)
    if error is not None:
        errors.append(error)
    if os.path.isabs(value):
        named.append(NamedPath(dotted(path), node.value, node.mark, value))
    return Node(value, node.mark, text=node.text or node.value)


def _rule(root: Node, path: Path) -> Rule | None:
    if path == ("model", "model_name_or_path"):
        return _model
    if path[:2] == ("model", "weights") and len(path) == 3:
        return _weights
    if path[0] == "phases" and len(path) == 3 and path[2] in ("deepspeed", "start_from"):
        return _deepspeed if path[2] == "deepspeed" else _folder
    if path[0] == "phases" and path[2:] in (("start_from", "spec"), ("start_from", "path")):
        return _file if path[-1] == "spec" else _folder
    if path == ("cluster", "storage_path"):
        return _anywhere
    if path[0] == "plugins":
        return _plugin
    if path[0] == "evaluate" and path[2:3] == ("cells",) and len(path) > 3:
        with suppress(UnknownPathError):  # reported where the grid is checked
            return _rule(root, find_path(root, str(path[3])))
        return None
    if path[:3] == ("search", "promote", "set") and len(path) > 3:
        with suppress(UnknownPathError):  # reported where the search is checked
            return _rule(root, (*find_path(root, str(path[3])), *path[4:]))
        return None
    if path[:2] == ("search", "space") and path[3:4] == ("values",) and len(path) > 4:
        with suppress(UnknownPathError):
            return _rule(root, (*find_path(root, str(path[2])), *path[5:]))
        return None
    if path[0] in NAMED and len(path) >= 3:
        depth = 2 if not isinstance(path[2], int) else 3
        cls = class_at(root, path[:depth])
        if cls is not None and issubclass(cls, Component) and path[depth : depth + 1]:
            return _anywhere if path[depth] in cls.path_fields else None
    return None


def _base(node: Node) -> str:
    return os.path.dirname(os.path.abspath(node.mark.file)) if node.mark.file is not None else os.getcwd()


def _full(node: Node) -> str:
    return os.path.normpath(os.path.join(_base(node), os.path.expanduser(node.value)))


def _anywhere(node: Node, path: Path) -> tuple[str, ErrorDetail | None]:
    return (node.value if "://" in node.value else _full(node)), None


def _plugin(node: Node, path: Path) -> tuple[str, ErrorDetail | None]:
    return (_full(node) if node.value.endswith(".py") else node.value), None


def _existing(node: Node, path: Path, what: str, exists: Callable[[str], bool]) -> tuple[str, ErrorDetail | None]:
    full = _full(node)
    if exists(full):
        return full, None
    parent, name = os.path.split(full)
    near = registry.nearest(name, os.listdir(parent)) if os.path.isdir(parent) else None
    hint = (
        f"did you mean {os.path.join(parent, near)}?"
        if near
        else "a relative path is relative to the file that writes it"
    )
    return full, node.error(f"there is no {what} at {full}", path, hint=hint)


_folder = partial(_existing, what="folder", exists=os.path.isdir)
_file = partial(_existing, what="file", exists=os.path.isfile)


def _deepspeed(node: Node, path: Path) -> tuple[str, ErrorDetail | None]:
    if node.value in DEEPSPEED_PRESETS:
        return node.value, None
    if "/" in node.value or node.value.endswith(".json"):
        return _file(node, path)
    allowed = ", ".join(DEEPSPEED_PRESETS) + ", a path to a .json file, or a mapping"
    hint = hint_for_value("deepspeed", node.value, DEEPSPEED_PRESETS)
    return node.value, node.error("unknown DeepSpeed setting", path, allowed=allowed, hint=hint)


def _model(node: Node, path: Path) -> tuple[str, ErrorDetail | None]:
    if not os.path.isdir(_full(node)) and _is_hub_id(node):
        return node.value, None
    return _existing(node, path, "model folder", os.path.isdir)


def _weights(node: Node, path: Path) -> tuple[str, ErrorDetail | None]:
    is_file = node.value.endswith((".bin", ".safetensors", ".pt"))
    if node.value == "random" or (not os.path.exists(_full(node)) and _is_hub_id(node) and not is_file):
        return node.value, None
    return _existing(node, path, "folder or weight file", os.path.exists)


def _is_hub_id(node: Node) -> bool:
    """Return whether `org/name` is the hub's; if `org` is a folder beside the file, it is a path with a typo."""
    folder = os.path.join(_base(node), node.value.partition("/")[0])
    return _HUB_ID.fullmatch(node.value) is not None and not os.path.isdir(folder)
