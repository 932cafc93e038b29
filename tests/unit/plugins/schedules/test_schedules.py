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

ANNEAL = {"key": "keep_ratio", "start": 1, "end": "1/4"}


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


@given(st.sampled_from(["linear", "cubic"]), st.integers(2, 12), st.integers(2, 200))
def test_an_annealed_stage_moves_its_amount_from_start_to_end(shape: str, moves: int, steps: int) -> None:
    anneal = {"key": "keep_ratio", "start": 1, "end": "1/4", "moves": moves, "shape": shape}
    spec = stages({"steps": steps, "compressor": "a", "anneal": anneal}, {"steps": 5})
    table = spec.compile(steps + 5, 32)
    count = min(moves, steps)
    assert table.stage_ends == (steps, steps + 5) and table.final == "full"
    assert table.actions[-1] == (steps, steps + 5, "full") and len(table.actions) == count + 1
    assert all(left[1] == right[0] for left, right in pairwise(table.actions))
    lengths = {last - first for first, last, _ in table.actions[:-1]}
    assert max(lengths) - min(lengths) <= 1
    for number, (_, _, name) in enumerate(table.actions[:-1]):
        base, changes = table.derived[name]
        u = Fraction(number, count - 1)
        wanted = 1 - Fraction(3, 4) * u if shape == "linear" else Fraction(1, 4) + Fraction(3, 4) * (1 - u) ** 3
        assert (base, Fraction(changes["keep_ratio"])) == ("a", wanted)


def test_annealed_whole_numbers_are_rounded_and_a_stage_keeps_its_place() -> None:
    first = {"key": "keep_tokens", "start": 16, "end": 4, "moves": 4}
    last = {"key": "stride", "start": 1, "end": 8, "moves": 3, "shape": "cubic"}
    spec = stages(
        {"share": "1/2", "compressor": "a", "anneal": first}, {"share": "1/2", "compressor": "b", "anneal": last}
    )
    table = spec.compile(24, 1)
    assert [(first, last, *table.derived[name]) for first, last, name in table.actions] == [
        (0, 3, "a", {"keep_tokens": 16}), (3, 6, "a", {"keep_tokens": 12}), (6, 9, "a", {"keep_tokens": 8}),
        (9, 12, "a", {"keep_tokens": 4}), (12, 16, "b", {"stride": 1}), (16, 20, "b", {"stride": 7}),
        (20, 24, "b", {"stride": 8}),
    ]  # fmt: skip
    assert table.stage_ends == (12, 24) and table.final == "b stride=8" and spec.variants() == ("a", "b")
    plain = stages({"share": "1/2", "compressor": "a"}, {})
    assert all("anneal" not in stage for stage in plain.model_dump()["stages"]), "as it always was"
    assert plain.compile(24, 1).stage_ends == ()


@pytest.mark.parametrize(
    ("entries", "total", "message"),
    [
        ([{"share": "1/100", "compressor": "a"}, {}], 10, "stage 1 (a) never starts"),
        ([{"steps": 10, "compressor": "a"}, {}], 10, "stage 2 (full) never starts"),
        ([{"steps": 300}, {"steps": 200}], 400, "add up to 500 steps, the phase has 400"),
        ([{"steps": 300}, {"steps": 200}, {}], 400, "add up to 500 steps, the phase has 400"),
        ([{"steps": 300}, {"steps": 50}], 400, "add up to 350 steps, the phase has 400"),
        ([{"samples": 60, "compressor": "a"}, {}], 10, "stage 1 (a) never starts"),
        ([{"steps": 1, "compressor": "a", "anneal": ANNEAL}, {}], 10, "stage 1 (a) needs at least 2 steps"),
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
        ([{"share": "1/2", "anneal": ANNEAL}, {}], "full has no amount"),
        ([{"compressor": "a", "anneal": ANNEAL | {"end": 1}}], "are equal"),
        ([{"compressor": "a", "anneal": ANNEAL | {"moves": 1}}], "at least 2 values"),
        ([{"compressor": "a", "anneal": ANNEAL | {"key": "layer"}}], "keep_ratio"),
        ([{"compressor": "a", "anneal": ANNEAL | {"end": "5/4"}}], "at most 1"),
    ],
)
def test_impossible_stages_are_refused(entries: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        stages(*entries)
    assert message in str(caught.value)
