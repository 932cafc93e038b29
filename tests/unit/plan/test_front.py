"""The Pareto front against its definition, written out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.trials import pareto_front

VALUES = st.integers(0, 4).map(float)


def test_ties_stay_and_what_is_beaten_goes():
    points = {"a": (0.9, 5.0), "b": (0.9, 5.0), "c": (0.8, 5.0), "d": (0.7, 2.0), "e": (0.9, 6.0)}
    assert pareto_front(points, ["max", "min"]) == {"a", "b", "d"}


def test_one_objective_has_the_best_alone():
    assert pareto_front({1: (3.0,), 2: (1.0,), 3: (1.0,)}, ["min"]) == {2, 3}
    assert pareto_front({1: (3.0,), 2: (1.0,)}, ["max"]) == {1}
    assert pareto_front({}, ["max"]) == set()
    points = {0: (10, 0.8), 1: (4, 0.7), 2: (5, 0.6), 3: (4, 0.65), 4: (12, 0.8)}
    assert pareto_front(points, ["min", "max"]) == {0, 1}


@given(st.lists(st.tuples(VALUES, VALUES, VALUES), max_size=12))
def test_it_is_what_nothing_beats(rows):
    points = dict(enumerate(rows))
    front = pareto_front(points, ["max", "min", "max"])
    for key, (a, b, c) in points.items():
        better = [(x, y, z) for x, y, z in rows if x >= a and y <= b and z >= c and (x, y, z) != (a, b, c)]
        assert (key in front) == (not better)
