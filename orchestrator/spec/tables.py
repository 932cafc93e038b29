"""What a schedule compiles to: the variant of every step, variants it derives, and what a step learns from beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from orchestrator.spec.base import Positive, Spec

if TYPE_CHECKING:
    pass

AMOUNTS = ("stride", "keep_tokens", "keep_ratio", "layer_average_tokens")


class DistillSpec(Spec):
    """Self-distillation: every step that is not under the fuller variant also learns from a pass under it.

    The loss is `(1 - weight) CE + weight T^2 KL(teacher || student)`, both means over the label tokens of the global
    batch, `T` the temperature of both softmaxes; the teacher's pass is the same model's, without gradient. `T^2` keeps
    the size of the gradient (Hinton et al., arXiv 1503.02531, section 2); the default weight is EPIC's (0.3 SFT +
    0.7 KL, arXiv 2510.00515).

    Attributes:
        weight: Share of the distillation in the loss.
        temperature: Divides the logits of teacher and student.
        teacher: Variant of the teacher's pass; None takes the schedule's own fuller one.
    """

    weight: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.7
    temperature: Positive = 1.0
    teacher: str | None = None


@dataclass(frozen=True)
class Teaching:
    """From whom the steps under some variant learn beside their labels (see `DistillSpec` for the loss)."""

    teacher: str
    weight: float
    temperature: float


@dataclass(frozen=True)
class StageTable:
    """A compiled schedule: what every optimizer step of a phase does.

    Attributes:
        actions: `(first_step, last_step, variant name)`, 0-based, half open, gapless, equal neighbours merged.
        final: Variant the finished model is tested under.
        stage_ends: Where stage runs end, ascending, the phase's end last; empty means where an action ends. A policy
            that mixes variants step by step is one stage run: `(total_steps,)`.
        derived: Variants that the schedule makes itself: name -> (named variant, fields changed in its one point).
        teachers: Variants whose steps also learn from a teacher's pass.
    """

    actions: tuple[tuple[int, int, str], ...]
    final: str
    stage_ends: tuple[int, ...] = ()
    derived: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    teachers: Mapping[str, Teaching] = field(default_factory=dict)


def merged(steps: list[tuple[int, int, str]]) -> tuple[tuple[int, int, str], ...]:
    """Return the actions with equal neighbours made one."""
    actions: list[tuple[int, int, str]] = []
    for first, last, name in steps:
        if actions and actions[-1][2] == name:
            actions[-1] = (actions[-1][0], last, name)
        else:
            actions.append((first, last, name))
    return tuple(actions)


def teachers_of(distill: DistillSpec | None, variants: tuple[str, ...] | list[str], fuller: str) -> dict[str, Teaching]:
    """Return what each variant learns from: the fuller one teaches all but itself."""
    if distill is None:
        return {}
    teacher = distill.teacher or fuller
    teaching = Teaching(teacher, distill.weight, distill.temperature)
    return {name: teaching for name in variants if name != teacher}
