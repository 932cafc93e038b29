"""What MLflow has of an experiment as a whole: the views that its dashboard opens with, the numbers in them."""

from __future__ import annotations

from orchestrator.plan.cell_record import axis_params
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.identity import canonical_json
from orchestrator.plan.trials import ADDED
from orchestrator.report.table import COSTS, Table
from orchestrator.tracking.mlflow_views import Shown, view_tags

_CURVES = ("train/loss", "train/visual_tokens")


def experiment_tags(plan: ExperimentPlan, table: Table | None = None) -> dict[str, str]:
    """Return the tags of an experiment in MLflow.

    Args:
        plan: The experiment.
        table: Its table; without it the views show what its evaluations are expected to measure.
    """
    columns = _expected_columns(plan) if table is None else table.columns
    scores = [name for name in columns if name.startswith("eval/")]
    costs = [name for name in columns if not name.startswith("eval/")]
    along = [name for name in scores if any(name.startswith(each.job.place) for c in plan.cells for each in c.along)]
    seeds = {"seed", *plan.loaded.spec.report.mean_over}
    params: dict[str, None] = {}
    groups: dict[str, None] = {}
    for cell in plan.cells:
        for axis, name in axis_params(cell).items():
            params[name] = None
            if axis not in seeds:
                groups[name] = None
    grouped = {canonical_json({axis: v for axis, v in cell.axes.items() if axis not in seeds}) for cell in plan.cells}
    shown_groups = tuple(groups) if len(grouped) < len(plan.cells) else ()
    return view_tags(Shown(tuple(params), scores, costs, (*_CURVES, *along), shown_groups))


def _expected_columns(plan: ExperimentPlan) -> tuple[str, ...]:
    expected = {
        f"{test.place}/{metric}": None
        for cell in plan.cells
        for test in cell.evaluations
        for metric in cell.spec.evaluate[test.name].shown
        if "*" not in metric
    }
    return (*expected, *(name for name in COSTS if name != ADDED or plan.loaded.spec.search is not None))
