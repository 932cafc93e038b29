"""`random_scale`: each step under a variant drawn for it, for models that take any number of tokens (M3, MQT)."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin


class RandomScaleSpec(plugin.ScheduleSpec):
    """Every step's variant is drawn from (seed, step) alone, so it is the same on every rank and after a restart.

    MQT-LLaVA (arXiv 2405.19315) draws the number of tokens of each step; M3 (arXiv 2405.17430) trains every scale in
    every step, of which one drawn scale a step is the unbiased estimate at a fraction of the cost.
    """

    kind: Literal["random_scale"] = "random_scale"
    compressors: Annotated[tuple[str, ...], Field(min_length=2)]
    """Variants to draw from."""
    weights: tuple[plugin.Positive, ...] | None = None
    """Relative frequencies of the variants; null draws them equally often."""
    seed: plugin.Integer = 0
    """Seed of the draws."""
    final: str | None = None
    """Variant the finished model is tested under; null takes the fuller one."""
    distill: plugin.DistillSpec | None = None
    """Self-distillation: the fuller variant teaches the others: `full` where it is drawn from, else the last of
    `compressors`, or `distill.teacher`. null trains on labels alone.
    """

    @model_validator(mode="after")
    def _fits(self) -> RandomScaleSpec:
        if len(set(self.compressors)) < len(self.compressors):
            raise PydanticCustomError("scale_twice", "a variant is named twice; `weights` says how often it is drawn")
        if self.weights is not None and len(self.weights) != len(self.compressors):
            text = "there are {weights} weights for {variants} compressors"
            counts = {"weights": len(self.weights), "variants": len(self.compressors)}
            raise PydanticCustomError("scale_weights", text, counts)
        return self

    @property
    def fuller(self) -> str:
        """The variant taken for the least compressed."""
        return "full" if "full" in self.compressors else self.compressors[-1]

    def variants(self) -> tuple[str, ...]:
        """Return the variants as listed, then `final` and the teacher where they are others."""
        further = [self.final, self.distill.teacher if self.distill else None]
        return tuple(dict.fromkeys([*self.compressors, *(name for name in further if name)]))

    def compile(self, total_steps: int, global_batch_size: int) -> plugin.StageTable:
        """Return one draw a step; runs of one variant are merged."""
        weights = [Fraction(repr(weight)) for weight in self.weights or (1,) * len(self.compressors)]
        # Whole numbers out of 2^64, so that a draw does not depend on how a machine rounds.
        bounds = [int(bound * 2**64 / sum(weights)) for bound in accumulate(weights)]
        steps = []
        for step in range(total_steps):
            digest = hashlib.sha256(f"random_scale:{self.seed}:{step}".encode()).digest()
            drawn = bisect_right(bounds, int.from_bytes(digest[:8], "big"))
            steps.append((step, step + 1, self.compressors[drawn]))
        teachers = plugin.teachers_of(self.distill, self.compressors, self.fuller)
        return plugin.StageTable(
            plugin.merge_actions(steps), self.final or self.fuller, (total_steps,), teachers=teachers
        )

    def remarks(self, total_steps: int) -> list[str]:
        """Return which variants are never drawn."""
        drawn = {name for *_, name in self.compile(total_steps, 1).actions}
        never = [name for name in self.compressors if name not in drawn]
        return [f"{', '.join(never)} is drawn for no step; give more steps, or another seed"] if never else []
