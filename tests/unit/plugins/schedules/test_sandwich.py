"""`sandwich`: the full and the heaviest variant in every step, and as many drawn ones as asked for."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orchestrator_plugins.schedules.sandwich import SandwichSpec
from pydantic import ValidationError

from orchestrator.spec.components import StageTable, Students, derive


def spec(**fields: Any) -> SandwichSpec:
    given = {"kind": "sandwich", "heaviest": "heavy", "compressors": ["wide", "light", "first"]}
    return SandwichSpec.model_validate(given | fields)


def drawn(table: StageTable) -> list[tuple[str, ...]]:
    return [table.students[name].variants[1:] for first, last, name in table.actions for _ in range(first, last)]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 50), st.integers(1, 3))
def test_every_step_has_the_full_the_heaviest_and_drawn_ones(steps: int, more: int, seed: int, count: int) -> None:
    schedule = spec(seed=seed, num_random=count)
    short, longer = schedule.compile(steps, 8), schedule.compile(steps + more, 128)
    assert drawn(longer)[:steps] == drawn(short), "a step is drawn alike whatever the phase's length"
    for table, total in ((short, steps), (longer, steps + more)):
        assert table.actions[0][0] == 0 and table.actions[-1][1] == total == table.stage_ends[0]
        assert all(left[1] == right[0] and left[2] != right[2] for left, right in pairwise(table.actions))
        assert table.final == "full" and not table.teachers
        for name, students in table.students.items():
            assert table.derived[name] == ("full", {}) and derive((), {}) == ()
            assert students == Students(students.variants, 1.0, 1.0)
            assert students.variants[0] == "heavy"
            assert len(set(students.variants)) == len(students.variants) == 1 + count
            assert set(students.variants[1:]) <= {"wide", "light", "first"}


def test_all_sets_are_equally_likely() -> None:
    found = Counter(drawn(spec(num_random=2).compile(6000, 1)))
    assert set(found) == {("wide", "light"), ("wide", "first"), ("light", "first")}
    # Five standard deviations of a binomial of 6,000 draws at 1/3 are 183.
    assert all(abs(number - 2000) < 183 for number in found.values())


def test_draws_are_these_on_every_machine() -> None:
    """Another value means that stored states of this schedule are of another schedule."""
    assert "".join(one[0][0] for one in drawn(spec().compile(24, 1))) == "lllfwwlwfffwlflwflwwwlfl"


def test_another_seed_draws_otherwise() -> None:
    one, other = (drawn(spec(seed=seed).compile(300, 1)) for seed in (0, 1))
    assert 60 < sum(a == b for a, b in zip(one, other, strict=True)) < 140


def test_a_sandwich_without_anything_between() -> None:
    schedule = spec(compressors=[], num_random=0, other="light", weight=0.5, temperature=2.0, final="full")
    table = schedule.compile(7, 1)
    assert table.actions == ((0, 7, "light + heavy"),)
    assert table.students == {"light + heavy": Students(("heavy",), 0.5, 2.0)}
    assert (table.final, schedule.variants()) == ("full", ("light", "heavy", "full"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_random": 4}, "num_random is 4, but compressors names 3"),
        ({"num_random": 0}, "none of compressors would ever train"),
        ({"compressors": []}, "compressors names 0"),
        ({"compressors": ["wide", "heavy"]}, "named twice"),
        ({"other": "heavy"}, "named twice"),
        ({"compressors": ["full"]}, "named twice"),
        ({"weight": 0}, "greater than 0"),
        ({"temperature": 0}, "greater than 0"),
    ],
)
def test_what_is_no_sandwich_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    assert message in str(caught.value)
