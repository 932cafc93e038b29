"""From a compiled schedule to actions with resolved points: what every step does, and where stage runs end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.plan.cell import CHAINED, next_state
from orchestrator.plan.identity import digest
from orchestrator.plan.jobs import Action, Distillation
from orchestrator.spec.components import StageTable

if TYPE_CHECKING:
    from orchestrator.plan.cell import Variant


@dataclass(frozen=True)
class ActionTable:
    """A phase's actions; made once for all phases of one schedule, length and variants.

    Attributes:
        actions: Neighbours that do the same are one action.
        ids: Digest of what each action does: its points, and what it learns from.
        tails: Digests of the actions beyond the first `CHAINED`, the same for every lineage.
        ends: Where stage runs end.
        final: Variant the finished model is tested under.
    """

    actions: tuple[Action, ...]
    ids: tuple[str, ...]
    tails: tuple[str, ...]
    ends: tuple[int, ...]
    final: Variant


def resolve_table(table: StageTable, variant_of: Callable[[str], Variant]) -> ActionTable:
    """Puts points in the place of names.

    Args:
        table: A compiled schedule.
        variant_of: The resolved variant of a name, derived ones included.

    Raises:
        ValueError: the table's stage ends are not steps of the phase in order.
    """
    resolved: dict[str, tuple[Variant, Distillation | None, str]] = {}
    actions: list[Action] = []
    ids: list[str] = []
    for first, last, name in table.actions:
        if name not in resolved:
            resolved[name] = _resolve(table, name, variant_of)
        variant, distill, identity = resolved[name]
        # Two names may stand for the same points: then nothing changes between them.
        if ids and ids[-1] == identity:
            actions[-1] = replace(actions[-1], last_step=last)
        else:
            actions.append(Action(first, last, name, variant.points, distill))
            ids.append(identity)
    tails = [""] if len(actions) > CHAINED else []
    for action, identity in zip(actions[CHAINED:], ids[CHAINED:], strict=True):
        tails.append(next_state(tails[-1], action.first_step, action.last_step, identity))
    return ActionTable(tuple(actions), tuple(ids), tuple(tails), _ends(table, actions), variant_of(table.final))


def _resolve(
    table: StageTable, name: str, variant_of: Callable[[str], Variant]
) -> tuple[Variant, Distillation | None, str]:
    variant, teaching = variant_of(name), table.teachers.get(name)
    if teaching is None:
        return variant, None, variant.id
    teacher = variant_of(teaching.teacher)
    if teacher.id == variant.id:  # the fuller variant under another name learns from nobody
        return variant, None, variant.id
    taught = {"weight": teaching.weight, "temperature": teaching.temperature}
    identity = digest({"points": variant.id, "teacher": teacher.id, **taught})
    return variant, Distillation(teaching.teacher, teacher.points, **taught), identity


def _ends(table: StageTable, actions: list[Action]) -> tuple[int, ...]:
    total = actions[-1].last_step
    ends = table.stage_ends
    if not ends:
        return tuple(action.last_step for action in actions)
    if ends[-1] != total or list(ends) != sorted({end for end in ends if 0 < end <= total}):
        raise ValueError(f"the schedule's stage ends {list(ends)} do not ascend to its last step {total}")
    return tuple(ends)
