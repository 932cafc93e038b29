"""The plan as one document: cells, stage runs, what each costs, what is done, why the rest runs (DESIGN section 4)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.plan.cell import Cell, PhasePlan
from orchestrator.plan.cost import parameter_count
from orchestrator.plan.costing import Costs
from orchestrator.plan.jobs import Action, StageJob
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.tree import StageTree
from orchestrator.plan.variants import variant_documents

if TYPE_CHECKING:
    from orchestrator.spec.loader import LoadedExperiment

_GIB = 2**30
_BYTES_WEIGHT = 4  # safetensors in float32
_BYTES_TRAINED = 12  # float32 master weights and two Adam states


def plan_document(
    loaded: LoadedExperiment,
    cells: Sequence[Cell],
    tree: StageTree,
    ledger: Ledger,
    text_tokens: float | None = None,
) -> dict[str, Any]:
    """What `plan --json` prints.

    Args:
        loaded: The experiment.
        cells: Its cells.
        tree: Their stage tree.
        ledger: Says what is done.
        text_tokens: Text tokens a sample for the cost figures; None takes the data's measured means.

    Returns:
        `experiment`, `cells`, `stage_runs`, `totals` as DESIGN section 4 fixes them, `variants` and `notices`. Costs
        are None where the model's facts are not known.
    """
    costs, states = Costs(text_tokens), _States.of(loaded.spec.name, tree, ledger)
    plans = _plans(cells)
    runs = [_stage_run(job, *plans[job.id], tree, states, costs) for job in _with_plans(tree, plans)]
    alone: dict[str, float | None] = {}
    shown = []
    for cell in cells:
        price = costs.cell(cell)
        alone[cell.id] = price["train_tflops"]
        shown.append(_cell(cell, price, tree, ledger, states))
    notices = dict.fromkeys((*loaded.notices, *(n for cell in cells for n in cell.notices), *costs.notices))
    totals = {
        "cells": len(cells),
        "stage_runs": len(runs),
        "evaluations": len(tree.evaluations),
        "train_tflops_alone": _sum(alone.values()),
        "train_tflops_shared": _sum(run["cost"]["train_tflops"] for run in runs),
        "disk_peak_gib": disk_peak_gib(cells, tree),
    }
    return {
        "experiment": loaded.spec.name,
        "cells": shown,
        "stage_runs": runs,
        "variants": variant_documents(cells),
        "totals": totals,
        "notices": list(notices),
    }


@dataclass(frozen=True)
class _States:
    """What the ledger says of a tree: states to be written, states and evaluations that failed, runs under way."""

    needed: set[str]
    blocked: set[str]
    running: set[str]

    @classmethod
    def of(cls, experiment: str, tree: StageTree, ledger: Ledger) -> _States:
        needed = tree.needed(ledger)
        running: set[str] = set()
        if needed and ledger.lock_holder(experiment) is not None:
            running = {state for state in needed if ledger.work_folder(state).is_dir()}
        return cls(needed, tree.blocked(ledger, needed), running)

    def state(self, identity: str) -> str:
        if identity in self.blocked:
            return "failed"
        if identity in self.running:
            return "running"
        return "new" if identity in self.needed else "done"


def _plans(cells: Sequence[Cell]) -> dict[str, tuple[Cell, PhasePlan]]:
    """One cell and phase for each final state of a phase; any of a lineage will do for the cost."""
    found: dict[str, tuple[Cell, PhasePlan]] = {}
    for cell in cells:
        for plan in cell.phases:
            found.setdefault(plan.end, (cell, plan))
    return found


def _with_plans(tree: StageTree, plans: dict[str, tuple[Cell, PhasePlan]]) -> list[StageJob]:
    """Stage runs in order; fills `plans` for the states inside a phase from the phase that goes through them."""
    children: dict[str, list[str]] = {}
    for job in tree.stage_runs.values():
        children.setdefault(job.parent, []).append(job.id)
    for state in reversed(tree.order):
        if state in tree.stage_runs and state not in plans:
            # A state inside a phase always has a child in the same phase, which comes after it in the order.
            plans[state] = plans[children[state][0]]
    return list(tree.stage_runs.values())


def _stage_run(
    job: StageJob, cell: Cell, plan: PhasePlan, tree: StageTree, states: _States, costs: Costs
) -> dict[str, Any]:
    actions = _within(job.table, job.first_step)
    variants = list(dict.fromkeys(action[2] for action in actions))
    return {
        "id": job.id,
        "parent": job.parent if job.parent in tree.stage_runs else None,
        "phase": job.phase,
        "variant": variants[0] if len(variants) == 1 else plan.policy,
        "first_step": job.first_step,
        "last_step": job.last_step,
        "actions": actions,
        "cells": list(tree.cells_of[job.id]),
        "state": states.state(job.id),
        "keep": job.keep,
        "cost": costs.stage_run(cell, plan, job.first_step, job.last_step),
    }


def _within(table: Sequence[Action], first: int) -> list[list[Any]]:
    return [[max(a.first_step, first), a.last_step, a.variant] for a in table if a.last_step > first]


def step_table(plan: PhasePlan) -> list[list[Any]]:
    """`[first_step, last_step, variant]` of a phase, 0-based and half open."""
    return [[action.first_step, action.last_step, action.variant] for action in plan.table]


def _cell(
    cell: Cell, price: dict[str, float | None], tree: StageTree, ledger: Ledger, states: _States
) -> dict[str, Any]:
    path = tree.path_of[cell.id]
    tests = [
        {
            "name": job.name,
            "under": job.under,
            "id": job.id,
            "state": _evaluation_state(job.id, ledger, states),
        }
        for job in cell.evaluations
    ]
    missing = [test for test in tests if test["state"] != "done"]
    parts = [states.state(identity) for identity in (*path, cell.state)] + [test["state"] for test in tests]
    state = next((each for each in ("failed", "running", "new") if each in parts), "done")
    reasons = _reasons(cell, state, path, missing, ledger, states)
    return {
        "id": cell.id,
        "name": cell.name,
        "axes": cell.axes,
        "state": state,
        "stage_runs": list(path),
        "cost": price,
        "phases": [
            {"phase": plan.name, "total_steps": plan.total_steps, "seed": plan.seed, "schedule": step_table(plan)}
            for plan in cell.phases
        ],
        "evaluations": tests,
        "reasons": reasons,
        "reason": "; ".join(reasons),
    }


def _evaluation_state(identity: str, ledger: Ledger, states: _States) -> str:
    if ledger.evaluation(identity) is not None:
        return "done"
    return "failed" if identity in states.blocked else "new"


def _reasons(
    cell: Cell, state: str, path: Sequence[str], missing: Sequence[dict[str, Any]], ledger: Ledger, states: _States
) -> list[str]:
    """Why a cell has work to do, for people."""
    if state == "done":
        return ["done"]
    reasons = []
    for identity in (cell.root.id, *path, *(job.id for job in cell.evaluations)):
        if identity in states.blocked and (failure := ledger.failure(identity)) is not None:
            text = str(failure.get("error", "no reason recorded")).strip() or "no reason recorded"
            reasons.append(f"failed: {text.splitlines()[0]} (--retry-failed takes it up again)")
            break
    needed = [run for run in path if run in states.needed]
    if len(needed) == len(path) and path and not any(ledger.is_done(run) for run in path):
        reasons.append("new")
    elif needed:
        reasons.append(f"{len(path) - len(needed)} of {len(path)} stage runs are done")
    for run in needed:
        if ledger.is_done(run):
            reasons.append("a stored state it starts from has no checkpoint any more: trained again")
        elif step := _last_checkpoint(ledger, run):
            reasons.append(f"continues at step {step}")
    if not needed and missing:
        reasons += [f"evaluation {test['name']} under {test['under']} is missing" for test in missing]
    return reasons or ["new"]


def _last_checkpoint(ledger: Ledger, run: str) -> int | None:
    try:
        names = os.listdir(ledger.work_folder(run))
    except OSError:
        return None
    return max((int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdecimal()), default=None)


def _sum(values: Any) -> float | None:
    found = list(values)
    return None if None in found else float(sum(found))


def disk_peak_gib(cells: Sequence[Cell], tree: StageTree) -> float | None:
    """Upper bound of what an experiment's ledger holds, from parameter counts; None where these are not known.

    Weights are float32. A full checkpoint adds master weights and two Adam states of what trains, 12 bytes each.
    Counted: all roots, all finished stage runs by what is kept of them, and two checkpoints inside one stage run.
    """
    facts = {cell.id: cell.facts for cell in cells}
    total, largest = 0.0, 0.0
    by_root = {cell.root.id: cell.facts for cell in cells}
    for found in by_root.values():
        if found is None:
            return None
        total += _BYTES_WEIGHT * sum(parameter_count(found).values())
    for job in tree.stage_runs.values():
        found = facts[tree.cells_of[job.id][0]]
        if found is None:
            return None
        counts = parameter_count(found)
        weights = _BYTES_WEIGHT * sum(counts.values())
        full = weights + _BYTES_TRAINED * sum(counts.get(part, 0) for part in job.recipe["train"])
        total += {"full": weights + full, "weights": weights, "none": 0.0}[job.keep]
        largest = max(largest, full)
    return (total + 2 * largest) / _GIB
