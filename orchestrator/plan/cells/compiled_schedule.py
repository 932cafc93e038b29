"""CompiledSchedule: what every step of a phase does, with resolved points; one for all phases that do the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.plan.identity import digest
from orchestrator.plan.jobs import Action, Distillation, StudentPasses
from orchestrator.spec.components import StageTable


@dataclass(frozen=True)
class Variant:
    """A resolved variant: its points for `attach` and the digest of what they do."""

    points: tuple[dict[str, Any], ...]
    id: str


FULL_TOKENS = Variant((), digest([]))
CHAINED = 32
"""Actions whose states are chained one by one; those beyond are hashed once for all lineages of a schedule."""


def next_state(before: str, first_step: int, last_step: int, points_id: str) -> str:
    """Return the identity of the state after some steps under one variant, from that of the state before them.

    Equal neighbours are one action, so that there is one chain for one table.
    """
    return hashlib.sha256(f"{before} {first_step} {last_step} {points_id}".encode()).hexdigest()


@dataclass(frozen=True)
class CompiledSchedule:
    """A schedule over the steps of a phase; one object for all phases of one schedule, length and variants.

    Attributes:
        kind: Kind of the schedule, the name of a stage run that mixes variants.
        actions: What every step does; neighbours that do the same are one action.
        ids: Digest of what each action does: its points, and what it learns from.
        tails: Digests of the actions beyond the first `CHAINED`, the same for every lineage.
        stage_ends: Where stage runs end unless others cut them: at every action's end, for a policy at the phase's.
        final: Variant the model is tested under once the phase is its last.
    """

    kind: str
    actions: tuple[Action, ...]
    ids: tuple[str, ...]
    tails: tuple[str, ...]
    stage_ends: tuple[int, ...]
    final: Variant


def resolve_schedule(
    kind: str, table: StageTable, total_steps: int, variant_of: Callable[[str], Variant]
) -> CompiledSchedule:
    """Return a compiled schedule with points in the place of names.

    Args:
        kind: The schedule's.
        table: What it compiled to.
        total_steps: Optimizer steps of the phase.
        variant_of: The resolved variant of a name, those included that the schedule derives itself.

    Raises:
        ValueError: it is no table of a phase of so many steps.
    """
    if problem := table.problem(total_steps):
        raise ValueError(problem)
    resolved = {name: _resolve(table, name, variant_of) for name in dict.fromkeys(name for *_, name in table.actions)}
    actions: list[Action] = []
    ids: list[str] = []
    for first, last, name in table.actions:
        variant, distill, students, identity = resolved[name]
        # Two names may stand for the same points: then nothing changes between them.
        if ids and ids[-1] == identity:
            actions[-1] = replace(actions[-1], last_step=last)
        else:
            actions.append(Action(first, last, name, variant.points, distill, students))
            ids.append(identity)
    tails = [""] if len(actions) > CHAINED else []
    for action, identity in zip(actions[CHAINED:], ids[CHAINED:], strict=True):
        tails.append(next_state(tails[-1], action.first_step, action.last_step, identity))
    ends = table.stage_ends or tuple(action.last_step for action in actions)
    return CompiledSchedule(kind, tuple(actions), tuple(ids), tuple(tails), tuple(ends), variant_of(table.final))


def _resolve(
    table: StageTable, name: str, variant_of: Callable[[str], Variant]
) -> tuple[Variant, Distillation | None, StudentPasses | None, str]:
    variant, teaching = variant_of(name), table.teachers.get(name)
    teacher = variant_of(teaching.teacher) if teaching is not None else variant
    does: dict[str, Any] = {"points": variant.id}
    distill = students = None
    if teaching is not None and teacher.id != variant.id:  # the fuller variant under another name learns from nobody
        taught: dict[str, Any] = {"weight": teaching.weight, "temperature": teaching.temperature}
        taught |= {"added": True} if teaching.added else {}
        does |= {"teacher": teacher.id, **taught}
        distill = Distillation(teaching.teacher, teacher.points, **taught)
    if (further := table.students.get(name)) is not None:
        if distill is not None:
            raise ValueError(f"{name} has students and a teacher; a step learns from one pass")
        passes = {each: variant_of(each) for each in further.variants}
        taught = {"weight": further.weight, "temperature": further.temperature}
        does |= {"students": [each.id for each in passes.values()], **taught}
        students = StudentPasses(tuple(passes), tuple(each.points for each in passes.values()), **taught)
    return variant, distill, students, digest(does) if distill or students else variant.id
