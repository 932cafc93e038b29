"""Policies in a file: names, shares, teachers and every value a ramp makes are checked before anything starts."""

# ruff: noqa: E501 (a table is read by its columns)
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.loader import load_experiment

Write = Callable[..., Path]
STAGES = "kind: stages\n    stages: [{share: 1/2, compressor: heavy}, {}]"

WRONG = [
    ("kind: interleaved\n    compressor: hevy\n    full_share: 1/10", 12, "compressor", "no variant `hevy`", "heavy"),
    ("kind: interleaved\n    compressor: heavy\n    full_share: 3/2", 13, "full_share", "at most 1", None),
    ("kind: interleaved\n    compressor: heavy\n    full_share: 1/1000", 10, "", "no step of 100 for full", None),
    ("kind: interleaved\n    compressor: heavy\n    full_share: 1/4\n    other: wid", 14, "other", "no variant `wid`", "wide"),
    ("kind: interleaved\n    compressor: heavy\n    full_share: 1/4\n    final: wid", 14, "final", "no variant `wid`", "wide"),
    ("kind: interleaved\n    compressor: heavy\n    full_share: 1/4\n    distill: {teacher: ful}", 14, "distill.teacher", "no variant `ful`", "full"),
    ("kind: interleaved\n    compressor: heavy\n    full_share: 1/4\n    distill: {weight: 2}", 14, "distill.weight", "at most 1", None),
    ("kind: random_scale\n    compressors: [heavy, wid, full]", 12, "compressors.1", "no variant `wid`", "wide"),
    ("kind: random_scale\n    compressors: [heavy]", 12, "compressors", "at least 2", None),
    ("kind: ramp\n    compressor: hevy\n    key: stride\n    start: 2\n    end: 8", 12, "compressor", "no variant `hevy`", "heavy"),
    ("kind: ramp\n    compressor: heavy\n    key: layer\n    start: 9\n    end: 1", 10, "", "`heavy layer=9`: the model has 4 decoder layers", "0 to 3"),
    ("kind: ramp\n    compressor: heavy\n    key: keep_tokens\n    start: 65\n    end: 8", 10, "", "keep_tokens 65 is more than the image's 64 tokens", None),
    ("kind: ramp\n    compressor: heavy\n    key: keep_tokens\n    start: 60", 10, "end", "`end` is missing", None),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "line", "key", "message", "allowed"), WRONG)
def test_what_a_policy_gets_wrong_is_reported_where_it_stands(
    schedule: str, line: int, key: str, message: str, allowed: str | None, small: str, write: Write
) -> None:
    assert STAGES in small
    with pytest.raises(SpecError) as caught:
        load_experiment(write(small.replace(STAGES, schedule)))
    (error,) = caught.value.errors
    assert message in error.message
    assert error.path == ".".join(["schedules.two", *([key] if key else [])])
    assert error.line == line
    assert allowed is None or allowed in f"{error.allowed} {error.hint}"


def test_a_policy_may_stand_in_the_phase_or_on_an_axis(small: str, write: Write) -> None:
    ramp = "{kind: ramp, compressor: heavy, key: layer, start: 3, end: 0, moves: 4, distill: {weight: 0.7, temperature: 2}}"
    scale = "{kind: random_scale, compressors: [heavy, wide, full], weights: [1, 1, 2]}"
    axis = f"matrix:\n  phases.finetune.schedule:\n    - {ramp}\n    - {scale}\n    - two\n"
    loaded = load_experiment(write(small + axis))
    kinds = [getattr(cell.spec.phases.finetune.schedule, "kind", "name") for cell in loaded.cells]
    assert kinds == ["ramp", "random_scale", "name"]
    wrong = axis.replace("start: 3", "start: 4")
    with pytest.raises(SpecError) as caught:
        load_experiment(write(small + wrong))
    (error,) = caught.value.errors
    assert "`heavy layer=4`: the model has 4 decoder layers" in error.message


def test_what_a_short_phase_has_no_room_for_is_a_note(small: str, write: Write) -> None:
    ramp = "kind: ramp\n    compressor: heavy\n    key: stride\n    start: 2\n    end: 60\n    moves: 40"
    scale = "kind: random_scale\n    compressors: [heavy, wide, full]"
    said = []
    for schedule in (ramp, scale):
        for steps in (2, 100):
            text = small.replace(STAGES, schedule).replace("max_steps: 100", f"max_steps: {steps}")
            said.append(load_experiment(write(text)).notices)
    (fit,), enough, (never,), drawn = said
    assert fit == (
        "schedules.two (ramp), 2 steps of phases.finetune: only 2 of the 40 moves fit, one a step; "
        "give fewer moves or more steps"
    )
    assert "is drawn for no step" in never and enough == drawn == ()


PLUGIN = """
from typing import Literal
from orchestrator import plugin

class Edges(plugin.ScheduleSpec):
    kind: Literal["edges"] = "edges"
    edge: int = 2

    def variants(self):
        return ("full", "heavy")

    def compile(self, total_steps, global_batch_size):
        a, b = self.edge, total_steps - self.edge
        return TABLE
"""
EDGES = 'plugin.StageTable(((0, a, "full"), (a, b, "heavy"), (b, total_steps, "full")), final="full")'


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (EDGES, "of 3 steps the action (2, 1, 'heavy') is no stretch"),
        (EDGES.replace("(a, b, ", "(a, a + 9, "), "of 3 steps step 1 has two actions"),
        ('plugin.StageTable(((0, 2, "full"),), final="full")', "the actions end at step 2 of 3"),
        ('plugin.StageTable((), final="full")', "the actions end at step 0 of 3"),
        (
            'plugin.StageTable(((0, 3, "full"),), "full", (2, 2, 3))',
            "stage_ends is (2, 2, 3); give rising steps up to 3",
        ),
        ('plugin.StageTable(((0, 3, "hevy"),), final="full")', "edges uses `hevy`: there is no such variant"),
        ("((0, 3, 'full'),)", "edges cannot be divided into 3 steps: AttributeError"),
        ("1 / 0", "edges cannot be divided into 3 steps: ZeroDivisionError: division by zero"),
    ],
)
def test_a_table_that_a_schedule_of_ones_own_gets_wrong_is_reported_before_it_is_planned(
    table: str, message: str, small: str, write: Write
) -> None:
    write(PLUGIN.replace("TABLE", table), "edges.py")
    text = small.replace(STAGES, "kind: edges").replace("max_steps: 100", "max_steps: 3")
    with pytest.raises(SpecError) as caught:
        load_experiment(write(text + "plugins: [edges.py]\n"))
    (error,) = caught.value.errors
    assert error.path == "schedules.two" and message in error.message
    if table == EDGES:
        load_experiment(write(text.replace("max_steps: 3", "max_steps: 5") + "plugins: [edges.py]\n"))
