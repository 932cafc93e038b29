"""JSON Schema of an experiment file, for editors; components are a choice by their `kind`."""

from __future__ import annotations

import copy
from typing import Any

from orchestrator import registry
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.yaml.key_paths import shape_of

_FAMILIES = {
    "CompressorSpec": registry.COMPRESSORS,
    "ScheduleSpec": registry.SCHEDULES,
    "DataSpec": registry.DATA,
    "EvaluationSpec": registry.EVALUATIONS,
}
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
            inner["properties"]["kind"] = {"const": kind}
            inner["required"] = sorted({*inner.get("required", []), "kind"})
            definitions[cls.__name__] = inner
            kinds.append({"$ref": f"#/$defs/{cls.__name__}"})
        definitions[family] = {
            "description": f"One of the known kinds: {', '.join(registry.kinds(group))}.",
            **_any(kinds),
        }
    schema["properties"]["extends"] = _EXTENDS
    _accept_short_forms(schema)
    _name_aliases(schema, ExperimentSpec, set())
    _nullable(schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "LLaVolta experiment"
    return schema


def _any(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"anyOf": choices} if choices else {"not": {}}


def _accept_short_forms(schema: dict[str, Any]) -> None:
    """Return a variant's only point without a list, an `under` of one name."""
    point = {"$ref": "#/$defs/CompressorSpec"}
    variants = schema["properties"]["compressors"]["patternProperties"]
    for name in variants:
        variants[name] = {"anyOf": [point, {"type": "array", "items": point, "minItems": 1}]}
    for part in schema["$defs"].values():
        under = part.get("properties", {}).get("under")
        if under is not None and under.get("type") == "array":
            part["properties"]["under"] = {"anyOf": [{"type": "string"}, under]}
        stages = part.get("properties", {}).get("stages")
        if stages is not None:
            stages["items"] = {"anyOf": [stages["items"], {"type": "null"}]}


def _name_aliases(schema: dict[str, Any], root: type[Any], seen: set[str]) -> None:
    """Add every alias as a key of its own that points to the canonical one."""
    for cls in _models(root, seen):
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


def _models(cls: type[Any], seen: set[str]) -> list[type[Any]]:
    if cls.__name__ in seen:
        return []
    seen.add(cls.__name__)
    found = [cls]
    for field in cls.model_fields.values():
        shapes = [shape_of(field.annotation)]
        while shapes:
            shape = shapes.pop()
            shapes += [inner for inner in (shape.value_shape(), shape.item_shape()) if inner is not None]
            for choice in shape.choices:
                if isinstance(choice, type) and hasattr(choice, "model_fields"):
                    found += _models(choice, seen)
    for family, group in _FAMILIES.items():
        if cls.__name__ == family:
            for kind in registry.kinds(group):
                found += _models(registry.spec_class(group, kind), seen)
    return found


def _nullable(schema: dict[str, Any]) -> None:
    """Null puts any key back to its default and takes a named entry out, so it is allowed everywhere."""
    for part in (schema, *schema["$defs"].values()):
        required = part.get("required", [])
        for name, inner in part.get("properties", {}).items():
            if name not in required and name != "kind" and {"type": "null"} not in inner.get("anyOf", []):
                part["properties"][name] = {"anyOf": [inner, {"type": "null"}]}
            for pattern, named in inner.get("patternProperties", {}).items():
                inner["patternProperties"][pattern] = {"anyOf": [named, {"type": "null"}]}
                inner["additionalProperties"] = False
