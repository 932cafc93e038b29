"""The JSON Schema: valid itself, accepts the design's example, refuses mistyped keys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.spec.schema import experiment_schema

EXAMPLE = yaml.safe_load(Path(__file__).with_name("design_example.yaml").read_text())


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
