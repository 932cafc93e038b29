"""What each trial of a search adds to the work that is stored, and the limits of `search.budget`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from orchestrator.errors import UsageError
from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.cells.cell import PROMOTED
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.documents import hours_document, with_plans
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.status import TreeStatus
from orchestrator.plan.tree import build_stage_tree
from orchestrator.plan.trials import Trial
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.search import BudgetSpec
from orchestrator.spec.search_space import grid, trial_name, variant_layer_tokens

_ROUNDING = 1 + 1e-9


def most_trials(spec: ExperimentSpec) -> int:
    """Return how many trials there may be: `num_trials`, a budget's, or those of a grid, whichever is least."""
    search = spec.search
    assert search is not None
    limits = [search.num_trials]
    if search.budget is not None and search.budget.trials is not None:
        limits.append(search.budget.trials)
    if search.algorithm.kind == "grid":
        limits.append(sum(1 for _ in grid(search, variant_layer_tokens(spec))))
    return min(limits)


class Budget:
    """The limits of one search, and what counts against them.

    Args:
        loaded: The experiment, with its search.

    Raises:
        UsageError: a limit on operations is given, and the formula does not know what the experiment costs.
    """

    def __init__(self, loaded: LoadedExperiment) -> None:
        assert loaded.spec.search is not None
        self._limits = loaded.spec.search.budget or BudgetSpec()
        self._cluster = loaded.spec.cluster
        self._costs = Costs()
        if self._limits.train_tflops is not None:
            for cell in expand_cells(loaded):
                if self._costs.cell(cell)["train_tflops"] is None:
                    why = "; ".join(self._costs.notices) or "the model's sizes are not known here"
                    raise UsageError(
                        f"{loaded.path}: search.budget.train_tflops cannot be kept: {why}; give gpu_hours or trials"
                    )

    def priced(self, trial: Trial, before: ExperimentPlan, after: ExperimentPlan, so_far: float | None = 0.0) -> Trial:
        """Return a new trial with what it adds, or one that goes on from a rung with what it adds in all.

        Args:
            trial: The trial, its cells known.
            before: The plan without it, or up to that rung.
            after: The plan with it.
            so_far: What it added up to that rung; None where that is not known.
        """
        added = self._added(before, after)
        added = None if so_far is None or added is None else so_far + added
        if self._limits.gpu_hours is None:
            return replace(trial, added_train_tflops=added)
        now, then = (self._hours(plan)[0] for plan in (after, before))
        stored = trial.stored_gpu_hours + max(0.0, now - then)
        return replace(trial, added_train_tflops=added, stored_gpu_hours=stored)

    def _added(self, before: ExperimentPlan, after: ExperimentPlan) -> float | None:
        """Return the operations that a plan has to do and one without some of its work has not; None if not known."""
        # In this order: what is finished in between counts as work in both, and cancels.
        then = TreeStatus(before.tree, before.ledger)
        now = TreeStatus(after.tree, after.ledger)
        parts: list[float | None] = []
        for job, cell, plan in with_plans(after.cells, after.tree):
            earlier = before.tree.stage_runs.get(job.id)
            if earlier is not None and job.id in then.needed:
                # It is trained for others. Cut in two, its beginning is a stage run of its own, which is counted as
                # such; where it is under way in one piece already, that beginning is trained once more.
                under_way = job.id in then.begun or job.id in then.holders
                if earlier.first_step < job.first_step and not under_way:
                    price = self._costs.stage_run(cell, plan, earlier.first_step, job.first_step)["train_tflops"]
                    parts.append(None if price is None else -price)
            elif job.id in now.needed:
                parts.append(self._costs.stage_run(cell, plan, job.first_step, job.last_step)["train_tflops"])
        known = [part for part in parts if part is not None]
        return max(0.0, math.fsum(known)) if len(known) == len(parts) else None

    def refusal(self, trial: Trial, before: ExperimentPlan, after: ExperimentPlan) -> str | None:
        """Return which limit a new trial, with what it adds, would exceed; None where it may run.

        What a scheduler may stop at a rung counts as if nothing were stopped, until it is.
        """
        search, whole = after.loaded.spec.search, after
        assert search is not None
        if search.scheduler is not None and self._limits != BudgetSpec():
            whole = after.replanned(after.trials, to_the_end=True)
        name, limit = trial_name(trial.number), self._limits.train_tflops
        if limit is not None and trial.cells:
            references = {identity for cells in after.references.values() for identity in cells}
            spent = math.fsum(self._counted(each, before) for each in before.trials) + self._alone(references, after)
            added = self._counted(trial, after)
            if whole is not after:
                added += self._added(after, whole) or 0.0
            if spent + added > limit * _ROUNDING:
                return (
                    f"{name} would add {added:.4g} TFLOPs; {spent:.4g} of search.budget.train_tflops {limit:g} are used"
                )
        limit = self._limits.gpu_hours
        if limit is not None:
            done, left = self._hours(whole)
            hours = done + (left or 0.0) - math.fsum(each.stored_gpu_hours for each in (*before.trials, trial))
            if hours > limit * _ROUNDING:
                return f"with {name} there would be {hours:.3g} hours; search.budget.gpu_hours is {limit:g}"
        return None

    def must_wait(self, plan: ExperimentPlan) -> bool:
        """Return whether no trial may be added yet: hours are limited, and the first ones' speed is not known."""
        if self._limits.gpu_hours is None or all(trial.state != "proposed" for trial in plan.trials):
            return False
        return self._hours(plan)[1] is None

    def _counted(self, trial: Trial, plan: ExperimentPlan) -> float:
        """Return the operations a trial added; where that was not noted yet, what it costs alone, which is more."""
        if trial.added_train_tflops is not None:
            return trial.added_train_tflops
        return self._alone(trial.cells, plan)

    def _alone(self, cells: Collection[str], plan: ExperimentPlan) -> float:
        return math.fsum(self._costs.cell(cell)["train_tflops"] or 0.0 for cell in plan.cells if cell.id in cells)

    def _hours(self, plan: ExperimentPlan) -> tuple[float, float | None]:
        """Return the hours of all workers measured for trials, and those to come; None while no speed is known."""
        cells = [cell for cell in plan.cells if PROMOTED not in cell.axes]
        tree = plan.tree if len(cells) == len(plan.cells) else build_stage_tree(cells, plan.ledger)
        status = TreeStatus(tree, plan.ledger)
        work, bounds = dict[str, float | None](), set[str]()
        for job, cell, phase in with_plans(cells, tree):
            work[job.id] = self._costs.stage_run(cell, phase, job.first_step, job.last_step)["train_tflops"]
            if self._costs.at_most(phase, job.first_step, job.last_step):
                bounds.add(job.id)
        found = {
            key.partition("_")[2]: hours for key, hours in hours_document(status, work, self._cluster, bounds).items()
        }
        return found.get("hours_done", 0.0), found.get("hours_left")
