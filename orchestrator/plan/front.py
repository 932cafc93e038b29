"""The Pareto front: the trials that no other trial beats in every objective."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, TypeVar

Key = TypeVar("Key", bound=Hashable)
Direction = Literal["max", "min"]


def pareto_front(points: Mapping[Key, Sequence[float]], directions: Sequence[Direction]) -> set[Key]:
    """Keys of the points that no other point beats; equal points stay together. One objective: the best point.

    Args:
        points: Key to one value for each objective, all finite.
        directions: Whether more or less of each objective is better.
    """
    costs = {
        key: tuple(value if way == "min" else -value for value, way in zip(values, directions, strict=True))
        for key, values in points.items()
    }
    return {key for key, own in costs.items() if not any(_beats(other, own) for other in costs.values())}


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """At least as low everywhere and lower somewhere."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
