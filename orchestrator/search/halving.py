"""Asynchronous successive halving: what becomes of a trial that has reached a rung, from the ledger and the notes.

Ray Tune's own scheduler has its rungs at powers of its factor alone, keeps its decisions in memory, where a killed
driver loses them, and is not there in a local search; so the driver decides, and Tune is told what stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from orchestrator.plan.cell_record import rung_value
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.status import cell_status
from orchestrator.plan.trials import Direction, Trial, rung_name


def is_at_rung(walk: ExperimentPlan, trial: Trial) -> bool:
    """Return whether all cells of a trial are trained up to a rung and tested there."""
    cells = walk.cells_of(trial)
    is_planned_so = bool(cells) and all(cell.rung is not None for cell in cells)
    return is_planned_so and all(cell_status(cell, walk.tree, walk.ledger) == "stopped" for cell in cells)


def judged(walk: ExperimentPlan, trial: Trial) -> Trial:
    """Return a trial once it was compared at the rung where it is: stopped, or to go on; as it is where it is at none.

    A trial that is the same as an earlier one ends as that one does.
    """
    search = walk.loaded.spec.search
    assert search is not None
    if not is_at_rung(walk, trial):
        return trial
    assert search.scheduler is not None
    first: dict[tuple[str, ...], Trial] = {}
    for each in walk.trials:
        first.setdefault(each.cells, each)
    if (same := first[trial.cells]).number != trial.number:
        return replace(trial, state="stopped", rungs=same.rungs) if same.state == "stopped" else trial
    cells = walk.cells_of(trial)
    rung = cells[0].rung
    assert rung is not None
    name = rung_name(rung, search.scheduler)
    ((objective, way),) = search.objectives.items()
    found = [rung_value(cell, walk.ledger, objective) for cell in cells]
    values = [value for value in found if value is not None and math.isfinite(value)]
    if len(values) < len(found):
        return trial.failed(f"the objective {objective} was not measured at {name}")
    others = [each.rungs[name] for each in first.values() if each.number != trial.number and name in each.rungs]
    value = mean(values)
    going = goes_on(value, others, way, search.scheduler.reduction_factor)
    return replace(trial, state="proposed" if going else "stopped", rungs={**trial.rungs, name: value})


def goes_on(value: float, others: Sequence[float], way: Direction, reduction_factor: int) -> bool:
    """Return whether a trial goes on from a rung: asynchronous successive halving (Li et al. 2020, section 3).

    It does among the best of each `reduction_factor` values at the rung, rounded down, but at least one; equal values
    go on together. As in Ray Tune and Optuna it is decided once, when a trial gets there: it neither waits for others
    nor is it taken up again once there are worse ones.

    Args:
        value: The trial's.
        others: Those of the trials that were there before it.
        way: Whether more or less is better.
        reduction_factor: Of so many trials one goes on.
    """
    better = sum(other > value if way == "max" else other < value for other in others)
    return better < max(1, (len(others) + 1) // reduction_factor)
