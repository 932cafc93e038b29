"""The shape of an experiment file, read from the Pydantic models: what stands at a path, and its JSON Schema."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import getdoc
from typing import Annotated, Any, Union, get_args, get_origin

from orchestrator import registry
from orchestrator.spec.base import Component, Spec
from orchestrator.spec.components import CompressorSpec, DataSpec, EvaluationSpec, ScheduleSpec
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.yaml.node import Node, Path

AXIS_KEYS = ("matrix", "zip", "include", "exclude")
NAMED: dict[str, type[Component]] = {
    "compressors": CompressorSpec,
    "schedules": ScheduleSpec,
    "data": DataSpec,
    "evaluate": EvaluationSpec,
}
"""Sections whose entries have names, and the family of components that each holds."""


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
                return component_class(choice, kind)
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


def component_class(family: type[Component], kind: Any) -> type[Component]:
    """Return the spec class of a kind; the family itself where there is none, or it cannot be imported."""
    try:
        return registry.spec_class(family.registry_group, kind)
    except (KeyError, ImportError, AttributeError):
        return family


def class_at(root: Node, path: Sequence[str | int]) -> type[Spec] | None:
    """Return the model of the mapping at a path of a tree, None where none is known there."""
    shape: Shape | None = ROOT
    node: Node | None = root
    for key in path:
        if shape is None:
            return None
        shape = shape.child(key, node)
        node = node.get(key) if node is not None else None
    return shape.class_of(node) if shape is not None else None


def names_at(root: Node, path: Sequence[str | int]) -> tuple[str, ...]:
    """Return the keys that are known at a path: a model's fields, or the names a mapping has."""
    cls = class_at(root, path)
    return tuple(cls.model_fields if cls is not None else root.entries(*path))


def description_at(root: Node, path: Sequence[str | int]) -> str | None:
    """Return `key: its description`, one sentence, for the deepest key on a path that is a field of a model."""
    for depth in reversed(range(len(path))):
        cls, key = class_at(root, path[:depth]), path[depth]
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


_FAMILIES = {cls.__name__: cls for cls in NAMED.values()}
_ANNOTATIONS = ("title", "description", "default", "examples", "deprecated")
# Keys that the loader reads itself, before the models see the tree.
_EXTENDS = {
    "description": "Files this one is laid over: deep merge, a list replaces, null puts a key back to its default.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def experiment_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of an experiment file that stands alone.

    A file that extends another may leave out what that one gives; `validate` looks at the merged result.
    """
    schema = ExperimentSpec.model_json_schema()
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    for name, family in _FAMILIES.items():
        choices, kinds = [], registry.kinds(family.registry_group)
        for kind in kinds:
            cls = registry.spec_class(family.registry_group, kind)
            inner = cls.model_json_schema(ref_template="#/$defs/{model}")
            definitions.update({key: part for key, part in inner.pop("$defs", {}).items() if key not in _FAMILIES})
            inner["properties"]["kind"] = {"const": kind, "description": (getdoc(cls) or "").partition("\n")[0]}
            inner["required"] = sorted({*inner.get("required", []), "kind"})
            definitions[cls.__name__] = inner
            choices.append({"$ref": f"#/$defs/{cls.__name__}"})
        definitions[name] = {
            "description": f"One of the known kinds: {', '.join(kinds)}.",
            **({"anyOf": choices} if choices else {"not": {}}),
        }
    schema["properties"]["extends"] = copy.deepcopy(_EXTENDS)
    _accept_short_forms(schema)
    _name_aliases(schema)
    _nullable(schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "LLaVolta experiment"
    return schema


def _accept_short_forms(schema: dict[str, Any]) -> None:
    """Accept a variant's only point without a list, an `under` of one name or sweep, and a null stage."""
    point = {"$ref": "#/$defs/CompressorSpec"}
    variants = schema["properties"]["compressors"]["patternProperties"]
    for name in variants:
        variants[name] = {"anyOf": [point, {"type": "array", "items": point, "minItems": 1}]}
    for part in schema["$defs"].values():
        under = part.get("properties", {}).get("under")
        if under is not None and under.get("type") == "array":
            notes = {key: under.pop(key) for key in _ANNOTATIONS if key in under}
            part["properties"]["under"] = {"anyOf": [*under["items"]["anyOf"], under], **notes}
        stages = part.get("properties", {}).get("stages")
        if stages is not None:
            stages["items"] = {"anyOf": [stages["items"], {"type": "null"}]}


def _name_aliases(schema: dict[str, Any]) -> None:
    """Add every alias as a key of its own that points to the canonical one."""
    for cls in spec_classes().values():
        part = schema["$defs"].get(cls.__name__)
        for alias, name in cls.aliases.items() if part is not None else ():
            properties = part["properties"]
            inner = copy.deepcopy(properties[name])
            properties[alias] = {**inner, "description": f"Another name of `{name}`.", "deprecated": True}
            required = part.get("required", [])
            if name in required:
                required.remove(name)
                names = [name, *(alias for alias, canonical in cls.aliases.items() if canonical == name)]
                part.setdefault("allOf", []).append({"anyOf": [{"required": [each]} for each in names]})


def spec_classes(root: type[Spec] = ExperimentSpec) -> dict[str, type[Spec]]:
    """Return every model that an experiment file is made of, components of all kinds included, by its name."""
    found: dict[str, type[Spec]] = {}
    waiting = [root]
    while waiting:
        cls = waiting.pop(0)
        if cls.__name__ in found:
            continue
        found[cls.__name__] = cls
        shapes = [shape_of(field.annotation) for field in cls.model_fields.values()]
        while shapes:
            shape = shapes.pop(0)
            shapes += [inner for inner in (shape.value_shape(), shape.item_shape()) if inner is not None]
            waiting += [choice for choice in shape.choices if isinstance(choice, type) and issubclass(choice, Spec)]
        if cls.__name__ in _FAMILIES and issubclass(cls, Component):
            waiting += [registry.spec_class(cls.registry_group, kind) for kind in registry.kinds(cls.registry_group)]
    return found


def _nullable(schema: dict[str, Any]) -> None:
    """Accept null everywhere: it puts a key back to its default and takes a named entry out."""
    for part in (schema, *schema["$defs"].values()):
        required = part.get("required", [])
        for name, inner in part.get("properties", {}).items():
            if name not in required and name != "kind" and {"type": "null"} not in inner.get("anyOf", []):
                notes = {key: inner.pop(key) for key in _ANNOTATIONS if key in inner}
                part["properties"][name] = {"anyOf": [inner, {"type": "null"}], **notes}
            for pattern, named in inner.get("patternProperties", {}).items():
                inner["patternProperties"][pattern] = {"anyOf": [named, {"type": "null"}]}
                inner["additionalProperties"] = False
