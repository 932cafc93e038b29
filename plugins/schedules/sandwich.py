"""`sandwich`: each step trains the fullest variant, the heaviest and some drawn ones, all learning from the fullest."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin


class SandwichSpec(plugin.ScheduleSpec):
    """Every step has several passes: `other` learns from labels; `heaviest` and drawn variants learn from it.

    The sandwich rule with in-place distillation of universally slimmable networks (arXiv 1903.05134, section 3 and
    algorithm 1), which Stage-wise Pruning (arXiv 2011.04908) keeps for a supernet's stages: the full and the smallest
    are in each step. The loss is `CE(other) + weight sum_k T^2 KL(other || k)`, the gradients of all passes add up, and
    none flows from a student into its teacher. What is drawn depends on (seed, step) alone, so it is the same on every
    rank and after a restart.
    """

    kind: Literal["sandwich"] = "sandwich"
    heaviest: str
    """Variant that each step trains beside `other`: the most compressed."""
    compressors: tuple[str, ...] = ()
    """Further variants, of which each step draws `num_random`."""
    num_random: plugin.Whole = 1
    """Different variants drawn in each step."""
    other: str = "full"
    """The fuller variant, which learns from labels and teaches the others."""
    weight: plugin.Positive = 1.0
    """Factor of each student's distillation in the loss."""
    temperature: plugin.Positive = 1.0
    """Temperature that divides the logits of teacher and students."""
    seed: plugin.Integer = 0
    """Seed of the draws."""
    final: str | None = None
    """Variant the finished model is tested under; null takes `other`."""

    @model_validator(mode="after")
    def _fits(self) -> SandwichSpec:
        names = (self.other, self.heaviest, *self.compressors)
        if len(set(names)) < len(names):
            raise PydanticCustomError("sandwich_twice", "a variant is named twice; each has one pass in a step")
        if self.num_random > len(self.compressors):
            text = "num_random is {num_random}, but compressors names {count}; name more, or draw fewer"
            raise PydanticCustomError(
                "sandwich_random", text, {"num_random": self.num_random, "count": len(self.compressors)}
            )
        if self.compressors and not self.num_random:
            raise PydanticCustomError("sandwich_none", "num_random is 0, so none of compressors would ever train")
        return self

    def variants(self) -> tuple[str, ...]:
        """Return `other`, the heaviest, those to draw from, and `final` where it is another."""
        return tuple(dict.fromkeys((self.other, self.heaviest, *self.compressors, self.final or self.other)))

    def compile(self, total_steps: int, global_batch_size: int) -> plugin.StageTable:
        """Return one set of passes a step; neighbours with the same set are merged."""
        steps: list[tuple[int, int, str]] = []
        students: dict[str, plugin.Students] = {}
        for step in range(total_steps):
            passes = (self.heaviest, *self._drawn(step))
            name = " + ".join((self.other, *passes))
            students.setdefault(name, plugin.Students(passes, self.weight, self.temperature))
            steps.append((step, step + 1, name))
        derived: dict[str, tuple[str, dict[str, Any]]] = {name: (self.other, {}) for name in students}
        return plugin.StageTable(
            plugin.merge_actions(steps), self.final or self.other, (total_steps,), derived, students=students
        )

    def _drawn(self, step: int) -> list[str]:
        """Return the variants drawn in a step, in the order of `compressors`; all sets are equally likely."""

        def place(name: str) -> bytes:
            number = self.compressors.index(name)
            return hashlib.sha256(f"sandwich:{self.seed}:{step}:{number}".encode()).digest()

        return sorted(sorted(self.compressors, key=place)[: self.num_random], key=self.compressors.index)
