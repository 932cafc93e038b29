"""`random_scale`: draws depend on seed and step alone and follow the weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orchestrator_plugins.schedules.random_scale import RandomScaleSpec
from pydantic import ValidationError

from orchestrator.spec.components import StageTable, Teaching


def spec(*compressors: str, **fields: Any) -> RandomScaleSpec:
    return RandomScaleSpec.model_validate({"kind": "random_scale", "compressors": list(compressors), **fields})


def drawn(table: StageTable) -> list[str]:
    return [name for first, last, name in table.actions for _ in range(first, last)]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 50))
def test_a_step_is_drawn_alike_whatever_the_phases_length(steps: int, more: int, seed: int) -> None:
    schedule = spec("heavy", "wide", "full", seed=seed)
    short, longer = schedule.compile(steps, 8), schedule.compile(steps + more, 128)
    assert drawn(longer)[:steps] == drawn(short)
    for table, total in ((short, steps), (longer, steps + more)):
        assert table.actions[0][0] == 0 and table.actions[-1][1] == total == table.stage_ends[0]
        assert all(left[1] == right[0] and left[2] != right[2] for left, right in pairwise(table.actions))


def test_draws_are_these_on_every_machine() -> None:
    """Another value means that stored states of this schedule are of another schedule."""
    assert (
        "".join(name[0] for name in drawn(spec("heavy", "wide", "full").compile(24, 1))) == "wwwhwffffhwhfffhwwhhwfhf"
    )


@pytest.mark.parametrize("weights", [None, [1, 1, 2], [0.1, 0.2, 0.7]])
def test_frequencies_follow_the_weights(weights: list[float] | None) -> None:
    names = drawn(spec("heavy", "wide", "full", weights=weights).compile(20_000, 1))
    total = sum(weights or [1, 1, 1])
    for name, weight in zip(("heavy", "wide", "full"), weights or [1, 1, 1], strict=True):
        # Five standard deviations of a binomial of 20,000 draws are at most 0.018.
        assert names.count(name) / 20_000 == pytest.approx(weight / total, abs=0.018)


def test_another_seed_draws_otherwise() -> None:
    tables = [drawn(spec("heavy", "full", seed=seed).compile(200, 1)) for seed in range(4)]
    agree = [sum(a == b for a, b in zip(tables[0], other, strict=True)) for other in tables[1:]]
    assert all(60 < count < 140 for count in agree)


def test_the_fuller_variant_is_final_and_teaches() -> None:
    table = spec("heavy", "full", "wide", distill={"weight": 0.5}).compile(50, 1)
    assert table.final == "full"
    assert table.teachers == dict.fromkeys(("heavy", "wide"), Teaching("full", 0.5, 1.0))
    table = spec("heavy", "wide", distill={}).compile(50, 1)
    assert (table.final, table.teachers) == ("wide", {"heavy": Teaching("wide", 0.7, 1.0)})
    schedule = spec("heavy", "wide", final="heavy", distill={"teacher": "full"})
    assert schedule.variants() == ("heavy", "wide", "full")
    assert schedule.compile(50, 1).final == "heavy"


@pytest.mark.parametrize(
    ("compressors", "fields", "message"),
    [
        (["heavy"], {}, "at least 2"),
        (["heavy", "heavy"], {}, "named twice"),
        (["heavy", "full"], {"weights": [1]}, "1 weights for 2 compressors"),
        (["heavy", "full"], {"weights": [1, 0]}, "greater than 0"),
        (["heavy", "full"], {"seed": 0.5}, "integer"),
    ],
)
def test_what_cannot_be_drawn_is_refused(compressors: list[str], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(*compressors, **fields)
    assert message in str(caught.value)
