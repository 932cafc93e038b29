"""What figures draw through points: the front of those that differ, and one colour a schedule."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from orchestrator.plan.cells.cell import PROMOTED
from orchestrator.report.table import BOUND, BY_FORMULA, Row
from orchestrator.report.units import lower_is_better

PALETTE = (
    *("#4c78d0", "#e8833a", "#3aa655", "#d6455d", "#8f6cc9"),
    *("#9c755f", "#d982b5", "#7f8c8d", "#b5a642", "#2fa5b5"),
)
"""Colours that can be told apart on white and on black, in the order in which they are given."""


def differing_front(points: Sequence[tuple[float, float, float | None] | None], lower: bool = False) -> list[int]:
    """Return which points are the front by cost, cheapest first, where each is surely better than the one before.

    A point joins where its 95 % interval does not overlap that of the last that joined: between others a line would
    show a gain that may be chance. Where fewer than two join there is no front.

    Args:
        points: Cost, score, and half of the score's interval (None: not known, so it never joins); None is left out.
        lower: Whether a smaller score is better.
    """
    sign = -1.0 if lower else 1.0
    known = [
        (cost, sign * score, half, number)
        for number, point in enumerate(points)
        if point is not None
        for cost, score, half in [point]
        if half is not None
    ]
    front: list[tuple[float, float, float, int]] = []
    for cost, score, half, number in sorted(known, key=lambda point: (point[0], -point[1])):
        if not front or score - half > front[-1][1] + front[-1][2]:
            front.append((cost, score, half, number))
    return [number for *_, number in front] if len(front) > 1 else []


def front_of_rows(rows: Sequence[Row], score: str, cost: str) -> list[int]:
    """Return the numbers of the rows on the differing front of a score by a cost.

    A bound is no point of it, nor is a trial that was run again, with other seeds or data than the trials.
    """
    points = [
        (row.values[cost], row.values[score], row.ci95.get(score))
        if {score, cost} <= row.values.keys()
        and PROMOTED not in row.marks
        and not (BOUND in row.marks and cost in BY_FORMULA)
        else None
        for row in rows
    ]
    return differing_front(points, lower_is_better(score))


MARKERS = ("o", "s", "^", "P", "*", "h")
OTHER_TRIALS = "other trials"
GREY = "#999999"
"""What trials have in common that are not on their search's front, and their colour."""


def palette(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the colour of each key and matplotlib's marker for it: another marker where the colours begin again."""
    distinct = [key for key in dict.fromkeys(keys) if key != OTHER_TRIALS]
    looks = [(colour, marker) for marker in MARKERS for colour in PALETTE]
    return {OTHER_TRIALS: (GREY, "o"), **dict(zip(distinct, itertools.cycle(looks), strict=False))}


def palette_key(row: Row) -> str:
    """Return what rows of one colour share: the schedule, or where no axis is one the row itself.

    Trials of a search that are not on its front share one.
    """
    if row.is_trial and "pareto" not in row.marks:
        return OTHER_TRIALS
    schedules = [str(value) for axis, value in row.axes.items() if axis.rpartition(".")[2] == "schedule"]
    control = [str(row.axes["control"])] if row.axes.get("control") else []
    return ", ".join([*schedules, *control]) or row.name
