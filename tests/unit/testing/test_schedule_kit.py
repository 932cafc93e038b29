"""`check_schedule` proves the built-in schedules and names what is wrong with broken ones, each broken in one way."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator

from orchestrator import plugin


class Half(plugin.ScheduleSpec):
    """One variant for the first half, full tokens for the second."""

    kind: Literal["half"] = "half"
    compressor: Annotated[str, Field(examples=["heavy"])]

    def variants(self):
        return (self.compressor, "full")

    def compile(self, total_steps, global_batch_size):
        if total_steps < 2:
            raise ValueError("half needs 2 steps")
        middle = total_steps // 2
        return plugin.StageTable(((0, middle, self.compressor), (middle, total_steps, "full")), "full")


class Undescribed(Half):
    pass


class NamesAMissingField(Half):
    """..."""

    not_identity = frozenset({"batch_size"})


class ChangesItsOwnValues(Half):
    """..."""

    @field_validator("compressor")
    @classmethod
    def _longer(cls, value):
        return value + "_"


class ListsVariantsTwice(Half):
    """..."""

    def variants(self):
        return (self.compressor, "full", self.compressor)


class ListsNoVariant(Half):
    """..."""

    def variants(self):
        return []


class ReturnsActionsAlone(Half):
    """..."""

    def compile(self, total_steps, global_batch_size):
        return super().compile(max(2, total_steps), global_batch_size).actions


class FailsOtherwiseThanByValueError(Half):
    """..."""

    def compile(self, total_steps, global_batch_size):
        if total_steps < 2:
            raise ZeroDivisionError("division by zero")
        return super().compile(total_steps, global_batch_size)


class RefusesEveryPhase(Half):
    """..."""

    def compile(self, total_steps, global_batch_size):
        raise ValueError("too short")


class DrawsAtRandom(Half):
    """..."""

    def compile(self, total_steps, global_batch_size):
        table = super().compile(total_steps, global_batch_size)
        return replace(table, final=random.choice(["full", self.compressor]))


class CountsItsCalls(Half):
    """..."""

    def compile(self, total_steps, global_batch_size):
        table = super().compile(total_steps, global_batch_size)
        return replace(table, final=("full", self.compressor)[next(CALLS) % 2])


CALLS = itertools.count()


class With(Half):
    """..."""

    def changed(self, table, total_steps):
        return {}

    def compile(self, total_steps, global_batch_size):
        table = super().compile(total_steps, global_batch_size)
        return replace(table, **self.changed(table, total_steps))


class LeavesAGap(With):
    """..."""

    def changed(self, table, total_steps):
        return {"actions": ((0, 3, self.compressor), (4, total_steps, "full"))}


class Overlaps(With):
    """..."""

    def changed(self, table, total_steps):
        return {"actions": ((0, 3, self.compressor), (2, total_steps, "full"))}


class EndsEarly(With):
    """..."""

    def changed(self, table, total_steps):
        return {"actions": ((0, total_steps - 1, "full"),)}


class EmptyAction(With):
    """..."""

    def changed(self, table, total_steps):
        return {"actions": ((0, 0, "full"), (0, total_steps, self.compressor))}


class LeavesNeighboursApart(With):
    """..."""

    def changed(self, table, total_steps):
        return {"actions": ((0, 3, "full"), (3, total_steps, "full"))}


class UsesAnUnlistedVariant(With):
    """..."""

    def changed(self, table, total_steps):
        return {"final": "light"}


class DerivesFromAnUnlistedVariant(With):
    """..."""

    def changed(self, table, total_steps):
        return {"derived": {"light 2": ("light", {"stride": 2})}}


class StagesEndEarly(With):
    """..."""

    def changed(self, table, total_steps):
        return {"stage_ends": (total_steps - 1,)}


class OverlapsWhereTheEdgesMeet(Half):
    """..."""

    def compile(self, total_steps, global_batch_size):
        ends = ((0, 2, "full"), (2, total_steps - 2, self.compressor), (total_steps - 2, total_steps, "full"))
        return plugin.StageTable(ends, "full")


BROKEN = {
    OverlapsWhereTheEdgesMeet: r"of 1 steps the action \(2, -1, 'heavy'\) is no stretch",
    Undescribed: "its class has a docstring.*Undescribed has none",
    NamesAMissingField: "not_identity name batch_size",
    ChangesItsOwnValues: "changes values that it made itself",
    ListsVariantsTwice: "list each name once",
    ListsNoVariant: r"it returned \[\]; return a tuple",
    ReturnsActionsAlone: "return a plugin.StageTable",
    FailsOtherwiseThanByValueError: "a phase of a few steps.*raised ZeroDivisionError",
    RefusesEveryPhase: "no phase can be compiled: 97 steps of 128: too short",
    DrawsAtRandom: "two tables of 97 steps differ",
    CountsItsCalls: "two tables of 97 steps differ",
    LeavesAGap: "of 97 steps step 3 has no action",
    Overlaps: "of 97 steps step 2 has two actions",
    EndsEarly: "the actions end at step 96 of 97",
    EmptyAction: "is no stretch",
    LeavesNeighboursApart: "equal neighbours are two actions",
    UsesAnUnlistedVariant: r"it uses light, which variants\(\) does not list",
    DerivesFromAnUnlistedVariant: "derived variants come from light",
    StagesEndEarly: r"stage_ends is \(96,\)",
}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_promise_is_named(cls):
    with pytest.raises(AssertionError, match=BROKEN[cls]) as caught:
        plugin.check_schedule(cls)
    assert len(caught.value.broken) == 1, caught.value


def test_a_sound_one_keeps_its_contract():
    report = plugin.check_schedule(Half)
    assert report.component == "half" and not report.skipped
    assert "actions cover every step, equal neighbours merged" in report.held
    assert plugin.check_schedule(Half(compressor="light")) == report


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "constant", "compressor": "heavy"},
        {"kind": "interleaved", "compressor": "heavy", "full_share": "1/10", "distill": {}},
        {"kind": "ramp", "compressor": "heavy", "key": "keep_ratio", "start": 1, "end": "1/4", "distill": {}},
        {
            "kind": "stages",
            "stages": [
                {"share": "1/2", "compressor": "heavy", "anneal": {"key": "keep_ratio", "start": 1, "end": "1/4"}},
                {},
            ],
        },
        {"kind": "sandwich", "heaviest": "heavy", "compressors": ["wide", "light"]},
        {"kind": "random_scale", "compressors": ["heavy", "light", "full"], "weights": [2, 1, 1]},
        {"kind": "stages", "stages": [{"share": "1/3", "compressor": "heavy"}, {"compressor": "light"}, {"steps": 7}]},
    ],
    ids=lambda schedule: schedule["kind"],
)
def test_built_in_schedules_keep_their_contract(schedule):
    plugin.check_schedule(schedule)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "stage"}, "no kind 'stage' is registered in orchestrator.schedules; known: constant"),
        ({"kind": "interleaved"}, "interleaved requires compressor, full_share.*examples"),
        ({"kind": "stages", "stages": [{"share": 2}]}, "is no stages: stages.0.share: .*a share is more than 0"),
        ("none.py", "none.py is not a file"),
        (3, "3 is no ScheduleSpec"),
    ],
)
def test_what_is_no_schedule_is_an_error_of_the_call(schedule, message):
    with pytest.raises(plugin.UsageError, match=message):
        plugin.check_schedule(schedule)
