"""The shape of an experiment file: which model, names and keys stand at a path. Read from the Pydantic models."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from orchestrator import registry
from orchestrator.spec.base import Component, Spec
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.yaml.node import Node, Path

AXIS_KEYS = ("matrix", "zip", "include", "exclude")
NAMED = ("data", "compressors", "schedules", "evaluate")


@dataclass(frozen=True)
class Shape:
    """What belongs at a path: the choices of its annotation, `Annotated` and unions taken apart."""

    choices: tuple[Any, ...]

    def spec_class(self, kind: Any = None) -> type[Spec] | None:
        """Return the model of a mapping here; a component's by its kind, or its family's base."""
        for choice in self.choices:
            if not (isinstance(choice, type) and issubclass(choice, Spec)):
                continue
            if issubclass(choice, Component):
                return _component_class(choice, kind)
            kinds = get_args(choice.model_fields["kind"].annotation) if "kind" in choice.model_fields else ()
            if not kinds or kind is None or kind in kinds:
                return choice
        return None

    def class_of(self, node: Node | None) -> type[Spec] | None:
        """Return the model of a node here; one point of a variant may stand without its list."""
        cls = self.spec_class(kind_at(node))
        if cls is None and node is not None and node.is_mapping and (item := self.item_shape()) is not None:
            return item.spec_class(kind_at(node))
        return cls

    def value_shape(self) -> Shape | None:
        """Return the shape of the values of a mapping with free keys, None where no such mapping belongs here."""
        for choice in self.choices:
            if get_origin(choice) is dict:
                return shape_of(get_args(choice)[1])
        return None

    def item_shape(self) -> Shape | None:
        """Return the shape of a list's items, None where no list belongs here."""
        for choice in self.choices:
            if get_origin(choice) in (tuple, list):
                return shape_of(get_args(choice)[0])
        return None

    def child(self, key: str | int, node: Node | None) -> Shape | None:
        """Return the shape under a key; `node` is the value here, whose `kind` decides among components."""
        if isinstance(key, int):
            return self.item_shape()
        cls = self.spec_class(kind_at(node))
        if cls is not None:
            field = cls.model_fields.get(key)
            return shape_of(field.annotation) if field is not None else None
        values = self.value_shape()
        if values is None and (item := self.item_shape()) is not None:
            return item.child(key, node)  # one point of a variant may stand without its list
        return values


def kind_at(node: Node | None) -> str | None:
    """Return the `kind` a mapping writes."""
    kind = node.get("kind") if node is not None and node.is_mapping else None
    return kind.value if kind is not None and isinstance(kind.value, str) else None


def shape_of(annotation: Any) -> Shape:
    """Return the shape of an annotation."""
    if get_origin(annotation) is Annotated:
        return shape_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return Shape(tuple(choice for part in get_args(annotation) for choice in shape_of(part).choices))
    return Shape((annotation,))


ROOT = Shape((ExperimentSpec,))


def _component_class(family: type[Component], kind: Any) -> type[Component]:
    try:
        return registry.spec_class(family.registry_group, kind)
    except (KeyError, ImportError, AttributeError):
        return family


def shape_at(root: Node, path: Sequence[str | int]) -> Shape | None:
    """Return the shape at a path of a tree, None where the path leaves what is known."""
    shape: Shape | None = ROOT
    node: Node | None = root
    for key in path:
        if shape is None:
            return None
        shape = shape.child(key, node)
        node = node.get(key) if node is not None else None
    return shape


def names_at(root: Node, path: Sequence[str | int]) -> tuple[str, ...]:
    """Return the keys that are known at a path: a model's fields, or the names a mapping has."""
    shape, node = shape_at(root, path), root.at(path)
    cls = shape.class_of(node) if shape is not None else None
    if cls is not None:
        return tuple(cls.model_fields)
    return tuple(node.entries()) if node is not None else ()


def description_at(root: Node, path: Sequence[str | int]) -> str | None:
    """Return `key: its description`, one sentence, for the deepest key on a path that is a field of a model."""
    for depth in range(len(path) - 1, -1, -1):
        key, shape = path[depth], shape_at(root, path[:depth])
        cls = shape.class_of(root.at(path[:depth])) if shape is not None else None
        if cls is not None and isinstance(key, str):
            text = cls.model_fields[key].description if key in cls.model_fields else None
            return f"{key}: {first_sentence(text)}" if text else None
    return None


def first_sentence(text: str) -> str:
    """Return the first sentence of a description, on one line."""
    line = " ".join(text.split())
    return re.split(r"(?<=\.) (?=[A-Z`])", line, maxsplit=1)[0]


class UnknownPathError(Exception):
    """A dotted path that leads nowhere.

    Attributes:
        key: The part that is unknown.
        known: What is known in its place.
        prefix: The path before it.
    """

    def __init__(self, key: str, known: tuple[str, ...], prefix: Path) -> None:
        self.key, self.known, self.prefix = key, known, prefix
        super().__init__(key)


def find_path(root: Node, text: str) -> Path:
    """Return the path a dotted text means; names that hold dots are recognised, aliases become canonical names.

    Args:
        root: The tree whose names count.
        text: E.g. `phases.finetune.schedule` or `schedules.four_stage.stages.0.share`.

    Raises:
        UnknownPathError: a part of it is not known.
    """
    path: list[str | int] = []
    shape: Shape | None = ROOT
    node: Node | None = root
    rest = text
    while rest:
        assert shape is not None
        key, rest = _next_key(shape, node, rest, tuple(path))
        shape = shape.child(key, node) or Shape((Any,))
        node = node.get(key) if node is not None else None
        path.append(key)
    return tuple(path)


def _next_key(shape: Shape, node: Node | None, text: str, prefix: Path) -> tuple[str | int, str]:
    first, _, after = text.partition(".")
    cls = shape.class_of(node)
    if node is not None and node.is_list:
        if first.isdigit() and int(first) < len(node.value):
            return int(first), after
        raise UnknownPathError(first, tuple(str(i) for i in range(min(len(node.value), 8))), prefix)
    if cls is not None:
        name = cls.aliases.get(first, first)
        unknown_kind = issubclass(cls, Component) and cls.model_fields["kind"].is_required()
        if name in cls.model_fields or unknown_kind:
            return name, after
        raise UnknownPathError(first, tuple(cls.model_fields), prefix)
    if shape.value_shape() is None and shape.item_shape() is None and Any not in shape.choices:
        raise UnknownPathError(first, (), prefix)
    if prefix and prefix[0] in AXIS_KEYS:
        return text, ""
    known = tuple(node.entries()) if node is not None else ()
    for name in sorted(known, key=len, reverse=True):
        if text == name or text.startswith(name + "."):
            return name, text[len(name) + 1 :]
    if after and prefix and prefix[0] in NAMED:
        raise UnknownPathError(first, known, prefix)
    return (text, "") if prefix and prefix[0] in NAMED else (first, after)
