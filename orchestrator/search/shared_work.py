"""What a recipe would add to the stage tree of a search: what `prefer_shared` chooses by."""

from __future__ import annotations

import json
from collections.abc import Iterable

from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.cells.cell import Cell, distinct_cells
from orchestrator.plan.documents import with_plans
from orchestrator.plan.tree import build_stage_tree
from orchestrator.plan.trials import Trial, cells_of_trials
from orchestrator.spec.loaded import LoadedExperiment


class SharedWork:
    """Prices recipes against others, whatever is stored, so that a search that was killed prices them alike.

    Args:
        loaded: The experiment, with its search.
    """

    def __init__(self, loaded: LoadedExperiment) -> None:
        self._loaded, self._costs = loaded, Costs()
        self._cells: dict[str, tuple[Cell, ...]] = {}

    def added(self, recipe: str, others: Iterable[str]) -> float:
        """Return the training operations of the stage runs that a recipe has and the others have not.

        In TFLOPs; in samples where the formula does not know the model.

        Args:
            recipe: Dotted path to a value, as canonical JSON.
            others: The same of the trials there are.
        """
        known = distinct_cells(cell for other in others for cell in self._cells_of(other))
        new = {cell.id for cell in self._cells_of(recipe)} - {cell.id for cell in known}
        cells = distinct_cells((*known, *self._cells_of(recipe)))
        tree = build_stage_tree(cells)
        total = 0.0
        for job, cell, plan in with_plans(cells, tree):
            if new.issuperset(tree.cells_of[job.id]):
                price = self._costs.stage_run(cell, plan, job.first_step, job.last_step)["train_tflops"]
                samples = (job.last_step - job.first_step) * job.recipe["global_batch_size"]
                total += samples if price is None else price
        return total

    def _cells_of(self, recipe: str) -> tuple[Cell, ...]:
        if recipe not in self._cells:
            trial = Trial(0, {}, json.loads(recipe))
            ((_, self._cells[recipe]),) = cells_of_trials(self._loaded, [trial], {})
        return self._cells[recipe]
