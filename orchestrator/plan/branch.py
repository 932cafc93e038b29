"""Branches of the stage tree as it grows: cells of one lineage that go the same way, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.plan.cell import Cell, PhasePlan


@dataclass
class Branch:
    """A plan of one lineage with the cells that go through it.

    Attributes:
        owner: A cell whose phase it is; those that go through it may be others, which start from it.
        index: The action under way.
        stage: The stage run under way, as the plan alone would cut them.
    """

    plan: PhasePlan
    owner: Cell
    cells: list[Cell]
    index: int = 0
    stage: int = 0

    @property
    def stage_end(self) -> int:
        """Where the stage run under way ends."""
        return self.plan.stage_ends[self.stage]

    def does(self, end: int) -> str:
        """What it does up to a step; equal for branches of one state that do the same."""
        # An action goes up to its end unchanged, so one digest says it all.
        return self.plan.points_ids[self.index] if self._action_end() >= end else self.plan.state_at(end)

    def move_to(self, step: int) -> None:
        """Goes on to a step before the phase's end."""
        self.stage += self.stage_end <= step
        while self._action_end() <= step:
            self.index += 1

    def _action_end(self) -> int:
        return self.plan.table[self.index].last_step


def split(group: Sequence[Branch]) -> list[list[Branch]]:
    """Branches of one state that do the same up to the first stage end among them; last part first, for the stack.

    Two parts differ before the end of either, so no state is ever reached on two ways.
    """
    parts: list[list[Branch]] = []
    undecided = [list(group)]
    while undecided:
        some = undecided.pop()
        end = min(branch.stage_end for branch in some)
        alike: dict[str, list[Branch]] = {}
        for branch in some:
            alike.setdefault(branch.does(end), []).append(branch)
        for part in alike.values():
            # A part without the branch that ends first goes on to a later end, up to which it may differ in itself.
            ends_here = len(part) == 1 or min(branch.stage_end for branch in part) == end
            (parts if ends_here else undecided).append(part)
    order = {id(branch): number for number, branch in enumerate(group)}
    return sorted(parts, key=lambda part: order[id(part[0])], reverse=True)
