"""Where costs are only bounds, since a method's tokens depend on the image, what would compare them refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.loader import load_experiment

Write = Callable[..., Path]
DIVT = "{kind: divt, layer: projector, stride: 8, heads: 2}"
SEARCH = """
search:
  objectives: {eval/vqa/accuracy: max, %s: min}
  space:
    phases.finetune.schedule: {kind: staged_space, num_stages: [2], variants: [heavy, full], heavy_to_light: %s,
                               boundaries: 1/4}
"""


@pytest.fixture
def adaptive(small: str) -> str:
    """The small experiment with `heavy` adaptive and trained."""
    text = small.replace("{kind: average_pool, layer: 2, stride: 8}", DIVT)
    return text.replace("max_steps: 100", "max_steps: 100\n    train: [projector, language_model, compressor]")


def error_of(path: Path) -> tuple[str, str]:
    with pytest.raises(SpecError) as caught:
        load_experiment(path)
    (error,) = caught.value.errors
    return error.path, error.message


@pytest.mark.parametrize(("schedule", "matched"), [("wide", "two"), ("two", "wide"), ("heavy", "full")])
def test_equal_costs(adaptive: str, write: Write, schedule: str, matched: str) -> None:
    text = adaptive.replace("schedule: two", "schedule: {}\n    match_train_tflops: {}")
    where, message = error_of(write(with_lengths(text, schedule, matched)))
    assert where == "phases.finetune.match_train_tflops"
    assert "what `heavy` costs is known only as the most" in message
    assert load_experiment(write(with_lengths(text, "wide", "full"))).cells


def with_lengths(text: str, schedule: str, matched: str) -> str:
    return text.replace("schedule: {}", f"schedule: {schedule}").replace("tflops: {}", f"tflops: {matched}")


def test_a_cost_that_is_not_exceeded_is_no_comparison(adaptive: str, write: Write) -> None:
    assert load_experiment(write(adaptive.replace("max_steps: 100", "max_train_tflops: 2"))).cells


def test_controls(adaptive: str, write: Write) -> None:
    where, message = error_of(write(adaptive + "controls: [stride]\n"))
    assert where == "controls.0" and "cannot be the control of heavy: how many tokens it leaves depends" in message
    plain = adaptive.replace(DIVT, "{kind: average_pool, layer: 2, stride: 8}")
    where, message = error_of(write(plain + "controls: [divt]\n"))
    assert "divt cannot be the control of heavy: how many tokens divt leaves depends on the image" in message


@pytest.mark.parametrize(
    ("objective", "ordered", "where", "told"),
    [
        ("cost/train_tflops", "false", "search.objectives.cost/train_tflops", "known only as a bound"),
        ("cost/compression_ratio", "false", "search.objectives.cost/compression_ratio", "known only as a bound"),
        ("cost/train_seconds", "true", "search.space", "how many tokens heavy leaves depends on the image"),
    ],
)
def test_searches(adaptive: str, write: Write, objective: str, ordered: str, where: str, told: str) -> None:
    found, message = error_of(write(adaptive + SEARCH % (objective, ordered)))
    assert found == where and told in message
    load_experiment(write(adaptive + SEARCH % ("cost/train_seconds", "false")))


@pytest.mark.parametrize(
    ("points", "key", "told"),
    [
        (f"[{DIVT}, {{kind: stride, layer: 2, keep_tokens: 2}}]", "1.keep_tokens", "give keep_ratio or stride"),
        ("{kind: divt, layer: 2, layer_average_tokens: 20}", "", "give the most it leaves of one, keep_tokens"),
    ],
)
def test_amounts(adaptive: str, write: Write, points: str, key: str, told: str) -> None:
    where, message = error_of(write(adaptive.replace(DIVT, points)))
    assert where.startswith("compressors.heavy") and where.endswith(key) and told in message
    allowed = f"[{DIVT}, {{kind: stride, layer: 2, stride: 2}}, {{kind: divt, layer: 3, keep_tokens: 2, heads: 2}}]"
    assert load_experiment(write(adaptive.replace(DIVT, allowed))).cells
