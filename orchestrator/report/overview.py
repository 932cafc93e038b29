"""What MLflow has of an experiment as a whole: its description, and the views that its dashboard opens with."""

from __future__ import annotations

from orchestrator.plan.cell_record import NOTE, axis_params
from orchestrator.plan.cells.cell import distinct_cells
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.identity import canonical_json
from orchestrator.plan.trials import ADDED
from orchestrator.report.front import front_of_rows
from orchestrator.report.table import COSTS, Table
from orchestrator.tracking.mlflow_views import Shown, view_tags

_TABLE_CHARACTERS = 4000  # of 5,000 that servers before MLflow 3.17 take of a tag
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
    views = view_tags(Shown(tuple(params), scores, costs, (*_CURVES, *along), shown_groups))
    return views if table is None else {**views, NOTE: _description(plan, table)}


def _description(plan: ExperimentPlan, table: Table) -> str:
    """Return the experiment's description as Markdown: what it is, the table, the front, what the tree shared."""
    cells, tree = distinct_cells(plan.cells), plan.tree
    runs = [[tree.stage_runs[run] for run in tree.path_of[cell.id]] for cell in cells]
    shared = sum(job.last_step - job.first_step for job in tree.stage_runs.values())
    alone = sum(job.last_step - job.first_step for path in runs for job in path)
    saved = f": sharing saves {1 - shared / alone:.0%}" if shared < alone else ""
    lines = table.to_markdown().split("\n")
    fits = max((n for n in range(len(lines) + 1) if len("\n".join(lines[:n])) <= _TABLE_CHARACTERS), default=0)
    more = [] if fits == len(lines) else [f"{len(table.rows):,} rows in all: `llavolta table` shows them."]
    return "\n\n".join(
        [
            *filter(None, [plan.loaded.spec.description]),
            "\n".join(lines[:fits]), *more, *filter(None, [table.explanations()]), *_front(table),
            *([f"Stage tree: {shared:,} optimizer steps for {alone:,} alone{saved}."] if alone else []),
        ]
    )  # fmt: skip


def _front(table: Table) -> list[str]:
    score, cost = next((name for name in table.columns if name.startswith("eval/")), ""), COSTS[0]
    names = [table.rows[number].name for number in front_of_rows(table.rows, score, cost)]
    text = f"Front of `{score}` by `{cost}`, through rows that differ for sure: {', '.join(names)}."
    return [text] if names else []


def _expected_columns(plan: ExperimentPlan) -> tuple[str, ...]:
    expected = {
        f"{test.place}/{metric}": None
        for cell in plan.cells
        for test in cell.evaluations
        for metric in cell.spec.evaluate[test.name].shown
        if "*" not in metric
    }
    return (*expected, *(name for name in COSTS if name != ADDED or plan.loaded.spec.search is not None))
