"""The JSON Schema: valid itself, accepts the design's example, refuses mistyped keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import pytest
import yaml
from pydantic import TypeAdapter

from orchestrator.spec.base import Spec
from orchestrator.spec.yaml.schema import experiment_schema, spec_classes

EXAMPLE = yaml.safe_load((Path(__file__).parents[1] / "design_example.yaml").read_text())


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = experiment_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_accepts_the_example(validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(EXAMPLE)


def change(path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(EXAMPLE)
    *parents, last = path.split("/")
    inner = changed
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("nam", "x"),
        ("compressors/heavy/strid", 8),
        ("compressors/heavy/kind", "averag_pool"),
        ("phases/finetune/learning_rat", 1),
        ("phases/finetune/max_steps", "ten"),
        ("phases/finetune/train", ["projectr"]),
        ("data/train/kind", "easy"),
        ("evaluate/vqa/under", 3),
        ("cluster/lanes", 0),
        ("matrix/seed", []),
        ("model", {"weights": "random"}),
    ],
)
def test_refuses_what_is_wrong(path: str, value: Any, validator: jsonschema.Draft202012Validator) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(change(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("phases/finetune/lr", 1e-3),
        ("model", {"base_model": "org/name"}),
        ("compressors/heavy", [{"kind": "average_pool", "layer": 0, "keep_ratio": "1/4"}]),
        ("compressors/heavy", None),
        ("extends", ["a.yaml", "b.yaml"]),
        ("phases/finetune/deepspeed", {"zero_optimization": {"stage": 1}}),
        ("phases/finetune/schedule", {"kind": "constant", "compressor": "heavy"}),
        ("evaluate/vqa/under", "final"),
    ],
)
def test_accepts_other_ways_to_write_it(path: str, value: Any, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(change(path, value))


def properties(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every property of a schema, however deeply it is nested."""
    if isinstance(schema, dict):
        for name, inner in schema["properties"].items() if isinstance(schema.get("properties"), dict) else ():
            yield name, inner
        for key, inner in schema.items():
            yield from properties(list(inner.values()) if key in ("properties", "$defs") else inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from properties(inner)


def test_nearly_every_property_is_described(validator: jsonschema.Draft202012Validator) -> None:
    found = list(properties(validator.schema))
    without = [name for name, inner in found if not inner.get("description")]
    assert len(found) > 250
    assert len(without) <= 0.05 * len(found), without


@pytest.mark.parametrize("cls", spec_classes().values())
def test_every_field_has_a_docstring_and_valid_examples(cls: type[Spec]) -> None:
    for name, field in cls.model_fields.items():
        assert field.description or name == "kind", name
        for example in field.examples or ():
            adapter = TypeAdapter(Annotated[(field.annotation, field)])  # type: ignore[misc]
            adapter.validate_python(example)
