"""Rungs of a search: the steps of a cell after which trials are compared, and a cell planned up to one of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from orchestrator.errors import UsageError
from orchestrator.plan.cells.cell import Cell, PhasePlan


def rung_steps(phases: Sequence[PhasePlan], rungs: Sequence[Fraction]) -> dict[Fraction, int]:
    """Return the optimizer steps of all phases that lie before each rung; halves round up, as stages' ends do.

    Raises:
        UsageError: so few steps have no room for the rungs.
    """
    total = sum(plan.total_steps for plan in phases)
    found = {rung: int(rung * total + Fraction(1, 2)) for rung in rungs}
    if len({0, *found.values(), total}) < len(found) + 2:
        raise UsageError(
            f"search.scheduler.rungs: the {total} steps of a trial have no room for {', '.join(map(str, rungs))}: each "
            "rung needs steps of its own before it and after it; give fewer rungs, or more steps"
        )
    return found


def stretches(phases: Sequence[PhasePlan], steps: int) -> Iterator[tuple[PhasePlan, int]]:
    """Yield the phases that so many steps reach, each with its own steps among them."""
    for plan in phases:
        if steps <= 0:
            return
        yield plan, min(steps, plan.total_steps)
        steps -= plan.total_steps


def planned_up_to(cell: Cell, rung: Fraction | None, passed: Collection[Fraction]) -> Cell:
    """Return a cell as far as a search plans it: trained up to a rung, compared there and at the rungs before.

    It keeps its id: what is trained is the beginning of what the whole cell trains.

    Args:
        cell: The cell, with the evaluations of all rungs.
        rung: Where it ends for now; None for its own end.
        passed: Rungs at which it was compared before; at others it is not tested.
    """
    along = tuple(each for each in cell.along if each.rung is None or each.rung == rung or each.rung in passed)
    if rung is None:
        return replace(cell, along=along)
    step = rung_steps(cell.phases, [rung])[rung]
    phases = tuple(
        plan if here == plan.total_steps else replace(plan, planned_steps=here, end=plan.state_at(here))
        for plan, here in stretches(cell.phases, step)
    )
    used = {plan.start for plan in phases}
    starts = tuple(start for start in cell.starts if start.id in used)
    used |= {need for start in starts for need in (start.base, start.source) if need is not None}
    return replace(
        cell, phases=phases, evaluations=(), along=tuple(each for each in along if each.last_step < step),
        state=phases[-1].end, rung=rung, starts=starts,
        sources=tuple(source for source in cell.sources if source.state in used),
    )  # fmt: skip
