"""JSON Schema of an experiment file, for editors; components are a choice by their `kind`."""

from __future__ import annotations

import copy
from inspect import getdoc
from typing import Any

from orchestrator import registry
from orchestrator.spec.base import Spec
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.yaml.key_paths import shape_of

_FAMILIES = {
    "CompressorSpec": registry.COMPRESSORS,
    "ScheduleSpec": registry.SCHEDULES,
    "DataSpec": registry.DATA,
    "EvaluationSpec": registry.EVALUATIONS,
}
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
    for family, group in _FAMILIES.items():
        kinds = []
        for kind in registry.kinds(group):
            cls = registry.spec_class(group, kind)
            inner = cls.model_json_schema(ref_template="#/$defs/{model}")
            definitions.update({name: part for name, part in inner.pop("$defs", {}).items() if name not in _FAMILIES})
            inner["properties"]["kind"] = {"const": kind, "description": (getdoc(cls) or "").partition("\n")[0]}
            inner["required"] = sorted({*inner.get("required", []), "kind"})
            definitions[cls.__name__] = inner
            kinds.append({"$ref": f"#/$defs/{cls.__name__}"})
        definitions[family] = {
            "description": f"One of the known kinds: {', '.join(registry.kinds(group))}.",
            **_any(kinds),
        }
    schema["properties"]["extends"] = copy.deepcopy(_EXTENDS)
    _accept_short_forms(schema)
    _name_aliases(schema)
    _nullable(schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "LLaVolta experiment"
    return schema


def _any(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"anyOf": choices} if choices else {"not": {}}


def _accept_short_forms(schema: dict[str, Any]) -> None:
    """Accept a variant's only point without a list, an `under` of one name, and a null stage."""
    point = {"$ref": "#/$defs/CompressorSpec"}
    variants = schema["properties"]["compressors"]["patternProperties"]
    for name in variants:
        variants[name] = {"anyOf": [point, {"type": "array", "items": point, "minItems": 1}]}
    for part in schema["$defs"].values():
        under = part.get("properties", {}).get("under")
        if under is not None and under.get("type") == "array":
            notes = {key: under.pop(key) for key in _ANNOTATIONS if key in under}
            part["properties"]["under"] = {"anyOf": [{"type": "string"}, under], **notes}
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
                part.setdefault("allOf", []).append({"anyOf": [{"required": [n]} for n in _names(cls, name)]})


def _names(cls: type[Any], name: str) -> list[str]:
    return [name, *(alias for alias, canonical in cls.aliases.items() if canonical == name)]


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
        group = _FAMILIES.get(cls.__name__)
        waiting += [registry.spec_class(group, kind) for kind in registry.kinds(group)] if group else []
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
