"""`ramp`: the amount or the layer of one variant moves with the step (EPIC)."""

from __future__ import annotations

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
        if self.moves < 2:
            raise PydanticCustomError("ramp_moves", "a ramp has at least 2 values")
        if self._percent(self.start) != self._percent(self.end):
            raise PydanticCustomError("ramp_layer", "start and end are both layers, or both shares of the depth")
        for value in (plugin.parse_share(self.start), plugin.parse_share(self.end)):
            self._refuse(value)
        if plugin.parse_share(self.start) == plugin.parse_share(self.end):
            raise PydanticCustomError("ramp_still", "start and end are equal; name the variant itself")
        return self

    def _refuse(self, value: Fraction) -> None:
        whole = self.key != "keep_ratio" and not self._percent(self.start)
        if whole and value.denominator != 1:
            raise PydanticCustomError("ramp_whole", "{key} takes whole numbers", {"key": self.key})
        if self.key in ("keep_tokens", "stride") and value < 1:
            raise PydanticCustomError("ramp_amount", "{key} is at least 1", {"key": self.key})
        if self.key == "keep_ratio" and not 0 < value <= 1:
            raise PydanticCustomError("ramp_share", "keep_ratio is more than 0 and at most 1")
        if self.key == "layer" and not whole and value >= 1:
            raise PydanticCustomError("ramp_depth", "a share of the depth is less than 100%")

    def variants(self) -> tuple[str, ...]:
        """Return the variant that moves, and the teacher."""
        return (self.compressor, self.distill.teacher or "full") if self.distill else (self.compressor,)

    def compile(self, total_steps: int, global_batch_size: int) -> plugin.StageTable:
        """Return the table: stretches end at rounded multiples of the phase, which has as many moves as fit.

        Raises:
            ValueError: the phase is too short to move.
        """
        moves = min(self.moves, total_steps)
        if moves < 2:
            raise ValueError(f"a ramp needs at least 2 steps, the phase has {total_steps}")
        start, end = plugin.parse_share(self.start), plugin.parse_share(self.end)
        steps: list[tuple[int, int, str]] = []
        derived: dict[str, tuple[str, dict[str, Any]]] = {}
        done = 0
        for move in range(moves):
            value = self._written(start + (end - start) * Fraction(move, moves - 1))
            name = f"{self.compressor} {self.key}={value}"
            derived[name] = (self.compressor, {self.key: value})
            last = int(Fraction((move + 1) * total_steps, moves) + Fraction(1, 2))
            steps.append((done, last, name))
            done = last
        final = steps[-1][2]
        teachers = plugin.teachers_of(self.distill, [*derived], "full")
        return plugin.StageTable(plugin.merge_actions(steps), final, (total_steps,), derived, teachers)

    def remarks(self, total_steps: int) -> list[str]:
        """Return how many moves fit, where that is fewer than `moves`."""
        fit = f"only {total_steps} of the {self.moves} moves fit, one a step; give fewer moves or more steps"
        return [fit] if total_steps < self.moves else []

    def _percent(self, value: float | str) -> bool:
        """Return whether it is a share of the depth."""
        return self.key == "layer" and isinstance(value, str) and value.endswith("%")

    def _written(self, value: Fraction) -> int | str:
        """Return a value as the variant's field takes it; whole numbers are rounded, halves up."""
        if self.key == "keep_ratio":
            return str(value)
        if self._percent(self.start):
            return f"{value * 100}%"
        return int(value + Fraction(1, 2))
