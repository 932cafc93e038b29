"""Schedules compile to exact tables: properties over all lengths, and the cases that are refused."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orchestrator_plugins.schedules.constant import ConstantSpec
from orchestrator_plugins.schedules.stages import StagesSpec
from pydantic import ValidationError


def stages(*entries: dict[str, object]) -> StagesSpec:
    return StagesSpec.model_validate({"kind": "stages", "stages": list(entries)})


@given(st.integers(1, 10**7), st.sampled_from(["full", "heavy"]))
def test_constant_is_one_action(steps: int, variant: str) -> None:
    table = ConstantSpec(compressor=variant).compile(steps, 128)
    assert table.actions == ((0, steps, variant),)
    assert table.final == variant


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 5000), st.booleans())
def test_tables_are_gapless_and_exact(weights: list[int], steps: int, rest: bool) -> None:
    total = sum(weights) + rest
    entries: list[dict[str, object]] = [
        {"share": f"{weight}/{total}", "compressor": f"v{number}"} for number, weight in enumerate(weights)
    ]
    spec = stages(*entries, *([{}] if rest else []))
    try:
        table = spec.compile(steps, 128)
    except ValueError as error:
        assert "never starts" in str(error)
        assert min([*weights, 1] if rest else weights) * steps < total, "a stage of a whole step or more always starts"
        return
    actions = table.actions
    assert actions[0][0] == 0
    assert actions[-1][1] == steps
    assert all(left[1] == right[0] for left, right in pairwise(actions))
    assert all(first < last for first, last, _ in actions)
    assert sum(last - first for first, last, _ in actions) == steps
    done = 0
    for (_, last, name), weight in zip(actions, weights, strict=False):
        done += weight
        assert name.startswith("v")
        assert abs(last - Fraction(done, total) * steps) <= Fraction(1, 2), "a boundary is the rounded cumulative share"


@given(st.integers(1, 6), st.integers(1, 500))
def test_order_of_equal_shares_does_not_move_boundaries(count: int, steps: int) -> None:
    tables = []
    for names in list(permutations([f"v{i}" for i in range(count)]))[:6]:
        spec = stages(*({"share": f"1/{count}", "compressor": name} for name in names))
        try:
            tables.append([last for _, last, _ in spec.compile(steps, 32).actions])
        except ValueError:
            tables.append([])
    assert all(table == tables[0] for table in tables)


@given(st.integers(1, 200), st.integers(1, 100_000), st.integers(1, 512), st.integers(1, 2000))
def test_steps_and_samples_are_lengths(steps: int, samples: int, batch: int, total: int) -> None:
    spec = stages({"steps": steps, "compressor": "a"}, {"samples": samples, "compressor": "b"}, {"compressor": "c"})
    try:
        table = spec.compile(total, batch)
    except ValueError:
        assert steps + Fraction(samples, batch) > total - 1 or samples < batch
        return
    assert table.actions[0] == (0, steps, "a")
    assert abs(table.actions[1][1] - (steps + Fraction(samples, batch))) <= Fraction(1, 2)
    assert table.final == "c"


@pytest.mark.parametrize("share", ["1/4", "25%", 0.25, "0.25"])
def test_shares_are_exact_however_written(share: object) -> None:
    table = stages({"share": share, "compressor": "a"}, {}).compile(400, 128)
    assert table.actions == ((0, 100, "a"), (100, 400, "full"))


def test_decimals_are_read_as_written() -> None:
    entries = [{"share": 0.1, "compressor": f"v{i}"} for i in range(10)]
    assert len(stages(*entries).compile(10, 1).actions) == 10


def test_paper_thirds_of_5198_steps() -> None:
    spec = stages(*({"share": "1/3", "compressor": name} for name in ("a", "b", "full")))
    assert spec.compile(5198, 128).actions == ((0, 1733, "a"), (1733, 3465, "b"), (3465, 5198, "full"))


def test_equal_neighbours_are_merged() -> None:
    spec = stages({"share": "1/4", "compressor": "a"}, {"share": "1/4", "compressor": "a"}, {})
    assert spec.compile(100, 1).actions == ((0, 50, "a"), (50, 100, "full"))
    assert spec.variants() == ("a", "full")


def test_rest_may_stand_in_the_middle() -> None:
    spec = stages({"steps": 10, "compressor": "a"}, {"compressor": "b"}, {"steps": 5})
    assert spec.compile(100, 1).actions == ((0, 10, "a"), (10, 95, "b"), (95, 100, "full"))


@pytest.mark.parametrize(
    ("entries", "total", "message"),
    [
        ([{"share": "1/100", "compressor": "a"}, {}], 10, "stage 1 (a) never starts"),
        ([{"steps": 10, "compressor": "a"}, {}], 10, "stage 2 (full) never starts"),
        ([{"steps": 300}, {"steps": 200}], 400, "add up to 500 steps, the phase has 400"),
        ([{"steps": 300}, {"steps": 200}, {}], 400, "add up to 500 steps, the phase has 400"),
        ([{"steps": 300}, {"steps": 50}], 400, "add up to 350 steps, the phase has 400"),
        ([{"samples": 60, "compressor": "a"}, {}], 10, "stage 1 (a) never starts"),
    ],
)
def test_lengths_that_do_not_fit_the_phase(entries: list[dict[str, object]], total: int, message: str) -> None:
    with pytest.raises(ValueError, match=r"steps|starts") as caught:
        stages(*entries).compile(total, 128)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{}, {}], "at most one stage"),
        ([{"share": "1/2"}, {"share": "1/4"}], "leaves a gap"),
        ([{"share": "3/4"}, {"share": "1/2"}], "add up to 5/4"),
        ([{"share": "1/2"}, {"share": "1/2"}, {}], "leaves nothing"),
        ([{"share": "1/2", "steps": 3}], "one of share, steps, samples"),
        ([{"share": 0}], "more than 0"),
        ([{"share": "3/2"}], "at most 1"),
        ([{"share": "1/0"}], "1/4, 25% or 0.25"),
        ([{"share": True}], "1/4, 25% or 0.25"),
        ([{"share": "9" * 40}], "1/4, 25% or 0.25"),
        ([{"steps": 1.5}], "integer"),
        ([{"steps": 0}], "greater"),
        ([], "at least 1"),
        ([{"share": "1/2", "compresor": "a"}, {}], "Extra inputs"),
    ],
)
def test_impossible_stages_are_refused(entries: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        stages(*entries)
    assert message in str(caught.value)
