"""`interleaved`: most steps compressed, a fixed share of them on full tokens (DualSpeed)."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin


class InterleavedSpec(plugin.ScheduleSpec):
    """A fixed share of the steps under a fuller variant, spread evenly over the phase.

    DualSpeed (arXiv 2602.03815) runs about a tenth of its batches on full tokens. Its code draws them at random in
    every process; here they are a function of the step, the same on every rank: step `floor((2k + 1) T / (2n))` for
    k < n, in the middle of n equal stretches of T steps. With `distill` the fuller pass teaches the compressed steps;
    in DualSpeed the pruned pass, without gradient, is what the full steps are held to.
    """

    kind: Literal["interleaved"] = "interleaved"
    compressor: str
    """Variant of most steps."""
    full_share: plugin.Share
    """Share of the steps under `other`; their number is rounded once."""
    other: str = "full"
    """The fuller variant."""
    final: str | None = None
    """Variant the finished model is tested under; null takes `other`."""
    distill: plugin.DistillSpec | None = None
    """Self-distillation: `other` (or `distill.teacher`) teaches the steps under `compressor`; null: labels alone."""

    @model_validator(mode="after")
    def _mixes(self) -> InterleavedSpec:
        if self.compressor == self.other:
            raise PydanticCustomError(
                "interleaved_same", "compressor and other are both {name}; name two variants", {"name": self.other}
            )
        if self.full_share == 1:
            raise PydanticCustomError("interleaved_share", "a full_share of 1 leaves nothing to interleave")
        return self

    def variants(self) -> tuple[str, ...]:
        """Return the two variants, then `final` and the teacher where they are others."""
        further = [self.final, self.distill.teacher if self.distill else None]
        return tuple(dict.fromkeys([self.compressor, self.other, *(name for name in further if name)]))

    def compile(self, total_steps: int, global_batch_size: int) -> plugin.StageTable:
        """Return the table: full steps in the middle of equal stretches.

        Raises:
            ValueError: one of the two variants would get no step.
        """
        count = int(self.full_share * total_steps + Fraction(1, 2))
        if not 0 < count < total_steps:
            never = self.other if count == 0 else self.compressor
            raise ValueError(f"a full_share of {self.full_share} leaves no step of {total_steps} for {never}")
        full = {(2 * number + 1) * total_steps // (2 * count) for number in range(count)}
        steps = [(step, step + 1, self.other if step in full else self.compressor) for step in range(total_steps)]
        teachers = plugin.teachers_of(self.distill, (self.compressor, self.other), self.other)
        return plugin.StageTable(
            plugin.merge_actions(steps), self.final or self.other, (total_steps,), teachers=teachers
        )
