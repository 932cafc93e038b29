"""`ramp`: equal moves over equal stretches, from the first value to the last."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orchestrator_plugins.compressors.average_pool import AveragePoolSpec
from orchestrator_plugins.schedules.ramp import RampSpec
from pydantic import ValidationError

from orchestrator.spec.components import StageTable, Teaching, derive


def spec(**fields: Any) -> RampSpec:
    return RampSpec.model_validate({"kind": "ramp", "compressor": "heavy", **fields})


def values(table: StageTable, key: str) -> list[Any]:
    return [table.derived[name][1][key] for _, _, name in table.actions]


@given(st.integers(1, 600), st.integers(1, 600), st.integers(2, 40), st.integers(2, 2000))
def test_whole_numbers_move_from_start_to_end(start: int, end: int, moves: int, steps: int) -> None:
    if start == end:
        return
    table = spec(key="keep_tokens", start=start, end=end, moves=moves).compile(steps, 128)
    assert table.actions[0][0] == 0 and table.actions[-1][1] == steps
    assert all(left[1] == right[0] for left, right in pairwise(table.actions))
    found = values(table, "keep_tokens")
    assert (found[0], found[-1]) == (start, end)
    assert found == sorted(set(found), reverse=end < start), "each value is one action"
    assert len(found) <= min(moves, steps)
    if abs(end - start) >= moves - 1:
        assert len(found) == min(moves, steps)
        lengths = {last - first for first, last, _ in table.actions}
        assert max(lengths) - min(lengths) <= 1
    assert table.final == table.actions[-1][2] and table.stage_ends == (steps,)


def test_shares_are_exact_and_take_the_place_of_the_variants_amount() -> None:
    table = spec(key="keep_ratio", start=1, end="1/4", moves=4).compile(40, 1)
    assert values(table, "keep_ratio") == ["1", "3/4", "1/2", "1/4"]
    assert [last for _, last, _ in table.actions] == [10, 20, 30, 40]
    assert table.final == "heavy keep_ratio=1/4"
    heavy = (AveragePoolSpec.model_validate({"kind": "average_pool", "layer": 2, "stride": 8}),)
    base, changes = table.derived[table.final]
    (point,) = derive(heavy, changes)
    assert (base, point.layer, point.stride, point.keep_ratio) == ("heavy", 2, None, Fraction(1, 4))


@pytest.mark.parametrize(
    ("start", "end", "found"), [(16, 4, [16, 12, 8, 4]), ("80%", "20%", ["80%", "60%", "40%", "20%"])]
)
def test_layers_move_from_deep_to_shallow(start: Any, end: Any, found: list[Any]) -> None:
    table = spec(key="layer", start=start, end=end, moves=4).compile(8, 1)
    assert values(table, "layer") == found
    heavy = (AveragePoolSpec.model_validate({"kind": "average_pool", "layer": 2, "stride": 8}),)
    points = [derive(heavy, table.derived[name][1])[0] for _, _, name in table.actions]
    assert {point.stride for point in points} == {8}
    assert [point.layer_index(20) for point in points] == [16, 12, 8, 4]


def test_uneven_shares_of_the_depth_are_values_a_layer_takes() -> None:
    table = spec(key="layer", start="50%", end="10%", moves=4).compile(8, 1)
    heavy = (AveragePoolSpec.model_validate({"kind": "average_pool", "layer": 2, "stride": 8}),)
    points = [derive(heavy, table.derived[name][1])[0] for _, _, name in table.actions]
    assert [point.layer_index(32) for point in points] == [16, 11, 7, 3]


def test_full_teaches_every_value() -> None:
    schedule = spec(key="stride", start=2, end=8, moves=3, distill={"weight": 0.7, "temperature": 1})
    table = schedule.compile(9, 1)
    assert table.teachers == dict.fromkeys(table.derived, Teaching("full", 0.7, 1.0))
    assert schedule.variants() == ("heavy", "full")
    assert spec(key="stride", start=2, end=8).variants() == ("heavy",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": "keep_ratio", "start": 1, "end": 1.5}, "at most 1"),
        ({"key": "keep_ratio", "start": "1/2", "end": "50%"}, "are equal"),
        ({"key": "keep_tokens", "start": 10, "end": 0}, "at least 1"),
        ({"key": "keep_tokens", "start": 10, "end": 2.5}, "whole numbers"),
        ({"key": "stride", "start": 2, "end": 2}, "are equal"),
        ({"key": "layer", "start": 2, "end": "50%"}, "both"),
        ({"key": "layer", "start": "100%", "end": "50%"}, "less than 100%"),
        ({"key": "layer", "start": 2, "end": "deep"}, "is written 1/4"),
        ({"key": "layer", "start": True, "end": 3}, "is written 1/4"),
        ({"key": "kind", "start": 1, "end": 2}, "keep_ratio"),
        ({"key": "stride", "start": 1, "end": 2, "moves": 1}, "at least 2 values"),
        ({"key": "stride", "start": 1, "end": 2, "compressor": "full"}, "nothing that could move"),
    ],
)
def test_what_cannot_move_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    assert message in str(caught.value)


def test_a_phase_of_one_step_and_a_variant_of_two_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 steps"):
        spec(key="stride", start=1, end=2).compile(1, 1)
    point = AveragePoolSpec.model_validate({"kind": "average_pool", "layer": 2, "stride": 8})
    with pytest.raises(ValueError, match=r"variant of one point .* this one has 2"):
        derive((point, point), {"stride": 2})
    with pytest.raises(ValueError, match="average_pool cannot take stride 0"):
        derive((point,), {"stride": 0})


def test_a_layer_that_a_method_learns_for_does_not_move() -> None:
    class Learning(AveragePoolSpec):
        learns: ClassVar[bool] = True

    point = Learning.model_validate({"kind": "average_pool", "layer": 2, "stride": 8})
    with pytest.raises(ValueError, match="would begin a new module at each move"):
        derive((point,), {"layer": 1})
    assert derive((point,), {"stride": 4})[0].stride == 4
