"""`ramp`: the amount or the layer of one variant moves with the step (EPIC)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin


def _number(value: Any) -> Any:
    plugin.parse_share(value)
    return value


Value = Annotated[int | float | str, BeforeValidator(_number)]


class RampSpec(plugin.ScheduleSpec):
    """One field of a variant goes from `start` to `end` in equal moves over equal stretches of the phase.

    EPIC (arXiv 2510.00515) trains from light to heavy: its token consistency distillation raises the share of tokens
    dropped, its layer consistency distillation moves the point from deep to shallow, both as training proceeds; a less
    compressed pass of the same model teaches. The model is tested under the last value.
    """

    kind: Literal["ramp"] = "ramp"
    compressor: str
    """Variant of one point whose field moves."""
    key: Literal["keep_ratio", "keep_tokens", "stride", "layer"]
    """Field that moves: `keep_ratio` (a share), `keep_tokens` or `stride` (whole numbers), or `layer` (whole numbers,
    or shares of the depth such as 50%).
    """
    start: Value
    """Value of the first stretch."""
    end: Value
    """Value of the last stretch, under which the model is tested."""
    moves: plugin.Count = 10
    """Number of values; values that round to the same whole number count once."""
    distill: plugin.DistillSpec | None = None
    """Self-distillation: `full` (or `distill.teacher`) teaches every step; null trains on labels alone."""

    @model_validator(mode="after")
    def _moves_somewhere(self) -> RampSpec:
        if self.compressor == "full":
            raise PydanticCustomError("ramp_full", "full has nothing that could move; name a variant")
        check_movement(self.key, self.start, self.end, self.moves)
        return self

    def variants(self) -> tuple[str, ...]:
        """Return the variant that moves, and the teacher."""
        return (self.compressor, self.distill.teacher or "full") if self.distill else (self.compressor,)

    def compile(self, total_steps: int, global_batch_size: int) -> plugin.StageTable:
        """Return the table: stretches end at rounded multiples of the phase, which has as many moves as fit.

        Raises:
            ValueError: the phase is too short to move.
        """
        if min(self.moves, total_steps) < 2:
            raise ValueError(f"a ramp needs at least 2 steps, the phase has {total_steps}")
        steps, derived = movement(self.compressor, self.key, self.start, self.end, self.moves, 0, total_steps)
        final = steps[-1][2]
        teachers = plugin.teachers_of(self.distill, [*derived], "full")
        return plugin.StageTable(plugin.merge_actions(steps), final, (total_steps,), derived, teachers)

    def remarks(self, total_steps: int) -> list[str]:
        """Return how many moves fit, where that is fewer than `moves`."""
        fit = f"only {total_steps} of the {self.moves} moves fit, one a step; give fewer moves or more steps"
        return [fit] if total_steps < self.moves else []


def check_movement(key: str, start: float | str, end: float | str, moves: int) -> None:
    """Refuse what a field cannot move between.

    Raises:
        PydanticCustomError: a value the field does not take, fewer than two values, or two that are equal.
    """
    if moves < 2:
        raise PydanticCustomError("ramp_moves", "a ramp has at least 2 values")
    depth = _percent(key, start)
    if depth != _percent(key, end):
        raise PydanticCustomError("ramp_layer", "start and end are both layers, or both shares of the depth")
    whole = key != "keep_ratio" and not depth
    for value in map(plugin.parse_share, (start, end)):
        if whole and value.denominator != 1:
            raise PydanticCustomError("ramp_whole", "{key} takes whole numbers", {"key": key})
        if key in ("keep_tokens", "stride") and value < 1:
            raise PydanticCustomError("ramp_amount", "{key} is at least 1", {"key": key})
        if key == "keep_ratio" and not 0 < value <= 1:
            raise PydanticCustomError("ramp_share", "keep_ratio is more than 0 and at most 1")
        if key == "layer" and not whole and value >= 1:
            raise PydanticCustomError("ramp_depth", "a share of the depth is less than 100%")
    if plugin.parse_share(start) == plugin.parse_share(end):
        raise PydanticCustomError("ramp_still", "start and end are equal; name the variant itself")


def movement(
    compressor: str,
    key: str,
    start: float | str,
    end: float | str,
    moves: int,
    first_step: int,
    last_step: int,
    progress: Callable[[Fraction], Fraction] = lambda part: part,
) -> tuple[list[tuple[int, int, str]], dict[str, tuple[str, dict[str, Any]]]]:
    """Return the actions of a variant whose field moves over some steps, and the variants they derive.

    Args:
        compressor: The variant.
        key: Its field.
        start: Value of the first stretch.
        end: Value of the last one.
        moves: Number of values; as many as there are steps where these are fewer.
        first_step: First step.
        last_step: Step after the last; at least two steps.
        progress: From the share of the moves made to the share of the way from start to end.
    """
    total = last_step - first_step
    moves = min(moves, total)
    low, high = plugin.parse_share(start), plugin.parse_share(end)
    steps: list[tuple[int, int, str]] = []
    derived: dict[str, tuple[str, dict[str, Any]]] = {}
    done = first_step
    for move in range(moves):
        value = _written(key, low + (high - low) * progress(Fraction(move, moves - 1)), _percent(key, start))
        name = f"{compressor} {key}={value}"
        derived[name] = (compressor, {key: value})
        last = first_step + int(Fraction((move + 1) * total, moves) + Fraction(1, 2))
        steps.append((done, last, name))
        done = last
    return steps, derived


def _percent(key: str, value: float | str) -> bool:
    """Return whether it is a share of the depth."""
    return key == "layer" and isinstance(value, str) and value.endswith("%")


def _written(key: str, value: Fraction, percent: bool) -> int | str:
    """Return a value as the variant's field takes it; whole numbers are rounded, halves up."""
    if key == "keep_ratio":
        return str(value)
    if percent:
        return f"{value * 100}%"
    return int(value + Fraction(1, 2))
