"""`interleaved`: exactly the share of full steps, evenly spread, the same for every rank."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orchestrator_plugins.schedules.interleaved import InterleavedSpec
from pydantic import ValidationError

from orchestrator.spec.components import Teaching


def spec(**fields: object) -> InterleavedSpec:
    return InterleavedSpec.model_validate({"kind": "interleaved", "compressor": "heavy", **fields})


@given(st.fractions(Fraction(1, 200), Fraction(199, 200)), st.integers(1, 3000))
def test_full_steps_are_as_many_as_asked_and_evenly_spread(share: Fraction, steps: int) -> None:
    share = share.limit_denominator(1000)
    wanted = int(share * steps + Fraction(1, 2))
    try:
        table = spec(full_share=str(share)).compile(steps, 128)
    except ValueError as error:
        assert wanted in (0, steps) and "leaves no step" in str(error)
        return
    assert table.actions[0][0] == 0 and table.actions[-1][1] == steps
    assert all(left[1] == right[0] and left[2] != right[2] for left, right in pairwise(table.actions))
    names = [name for first, last, name in table.actions for _ in range(first, last)]
    full = [step for step, name in enumerate(names) if name == "full"]
    assert len(full) == wanted and set(names) == {"heavy", "full"}
    # However a stretch of the phase is chosen, it holds its share of the full steps, to within one.
    for first in range(0, steps, max(1, steps // 7)):
        for last in range(first, steps + 1, max(1, steps // 5)):
            held = sum(first <= step < last for step in full)
            assert abs(held - Fraction(wanted * (last - first), steps)) <= 1
    assert (table.final, table.stage_ends, table.teachers) == ("full", (steps,), {})


def test_a_tenth_of_a_hundred_steps() -> None:
    table = spec(full_share="1/10").compile(100, 1)
    assert [first for first, _, name in table.actions if name == "full"] == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert all(last - first == 1 for first, last, name in table.actions if name == "full")


def test_the_fuller_variant_teaches_the_other() -> None:
    schedule = spec(full_share=0.25, other="light", final="heavy", distill={"weight": 0.5, "temperature": 2.0})
    table = schedule.compile(8, 1)
    assert table.teachers == {"heavy": Teaching("light", 0.5, 2.0)}
    assert table.final == "heavy"
    assert schedule.variants() == ("heavy", "light")
    other = spec(full_share=0.25, other="light", distill={"teacher": "full"})
    assert other.compile(8, 1).teachers == dict.fromkeys(("heavy", "light"), Teaching("full", 0.7, 1.0))
    assert other.variants() == ("heavy", "light", "full")


def test_dualspeeds_full_steps_learn_from_the_pruned_pass() -> None:
    """Its loss is CE + 1.0 KL(pruned || full) on full steps, and CE alone on pruned ones."""
    table = spec(full_share="1/10", distill={"teacher": "heavy", "weight": 1.0, "added": True}).compile(100, 1)
    assert table.teachers == {"full": Teaching("heavy", 1.0, 1.0, added=True)}
    assert (
        spec(full_share="1/10", distill={"weight": 2.5, "added": True}).compile(100, 1).teachers["heavy"].weight == 2.5
    )
    plain = spec(full_share="1/10", distill={"weight": 0.5})
    assert plain.model_dump()["distill"] == {"weight": 0.5, "temperature": 1.0, "teacher": None}, "as it always was"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"full_share": 1}, "nothing to interleave"),
        ({"full_share": 0}, "more than 0"),
        ({"full_share": "3/2"}, "at most 1"),
        ({}, "Field required"),
        ({"full_share": 0.1, "other": "heavy"}, "are both heavy"),
        ({"full_share": 0.1, "distill": {"weight": 0}}, "greater than 0"),
        ({"full_share": 0.1, "distill": {"weight": 1.1}}, "is at most 1; with `added: true`"),
        ({"full_share": 0.1, "distill": {"temperature": 0}}, "greater than 0"),
        ({"full_share": 0.1, "distill": {"wieght": 1}}, "Extra inputs"),
    ],
)
def test_what_cannot_be_interleaved_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    assert message in str(caught.value)


def test_a_phase_too_short_for_the_share_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no step of 4 for full"):
        spec(full_share="1/10").compile(4, 1)
    with pytest.raises(ValueError, match="leaves no step of 4 for heavy"):
        spec(full_share="9/10").compile(4, 1)
