"""What MLflow has of an experiment as a whole: its description, its dashboard's views, and its summary run."""

from __future__ import annotations

import json
from dataclasses import replace

from orchestrator.plan.cell_record import NOTE, CellRecord, axis_params
from orchestrator.plan.cells.cell import distinct_cells
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.identity import canonical_json, digest
from orchestrator.plan.step_history import last_metrics
from orchestrator.plan.trials import ADDED
from orchestrator.redaction import redacted
from orchestrator.report.experiment_report import report_document, report_page
from orchestrator.report.figures import experiment_figures
from orchestrator.report.front import front_of_rows
from orchestrator.report.table import COSTS, Table
from orchestrator.spec.loaded import resolved_yaml
from orchestrator.tracking.mlflow_state import SUMMARY_OF, TREE_SECONDS
from orchestrator.tracking.mlflow_views import Shown, view_tags

_TABLE_CHARACTERS = 4000  # of 5,000 that servers before MLflow 3.17 take of a tag
_CURVES = ("train/loss", "train/visual_tokens")
_TABLE = "table.json"
_LOGGED = json.dumps([{"path": _TABLE, "type": "table"}])
_SUMMARY = (
    "The experiment as a whole, not a cell. Among its artifacts: `report.html` (one file, works offline), the figures, "
    f"`{_TABLE}` (every digit), `experiment.yaml` (resolved, runs again). Its duration is what training took."
)


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
    search = plan.loaded.spec.search
    # What is set for the best trials says no more than that they were promoted.
    is_set = frozenset() if search is None or search.promote is None else search.promote.set.keys()
    params: dict[str, None] = {}
    groups: dict[str, None] = {}
    for cell in plan.cells:
        for axis, name in axis_params(cell).items():
            if axis in is_set:
                continue
            params[name] = None
            if axis not in seeds:
                groups[name] = None
    grouped = {canonical_json({axis: v for axis, v in cell.axes.items() if axis not in seeds}) for cell in plan.cells}
    shown_groups = tuple(groups) if len(grouped) < len(plan.cells) else ()
    views = view_tags(Shown(tuple(params), scores, costs, (*_CURVES, *along), shown_groups))
    return views if table is None else {**views, NOTE: _description(plan, table)}


def summary_record(plan: ExperimentPlan, table: Table) -> CellRecord | None:
    """Return what the summary run of an experiment has, without the files that take seconds to make.

    It is found by a tag of its own and has no `cell_id`, so that nobody takes it for a cell.

    Args:
        plan: The experiment.
        table: Its table.

    Returns:
        The record, to be completed by `complete_summary` before it is sent; None where no cell is finished.
    """
    if not any(row.status == "finished" for row in table.rows):
        return None
    yaml = redacted(resolved_yaml(plan.loaded, with_sources=False))
    shared, alone = _steps(plan)
    seconds = [float((plan.ledger.result(run) or {}).get("train_seconds", 0.0)) for run in plan.tree.stage_runs]
    # Curves of what is not finished are in the report too, and may grow while the table stays the same.
    open_runs = {run for cell in plan.cells if plan.status(cell) != "finished" for run in plan.tree.path_of[cell.id]}
    reached = {run: (last_metrics(plan.ledger.metrics_file(run)) or {}).get("step") for run in open_runs}
    return CellRecord(
        plan.loaded.spec.name,
        "summary",
        "finished",
        id_tag=SUMMARY_OF,
        tags={NOTE: f"{_SUMMARY}\n\n{_description(plan, table)}", "mlflow.loggedArtifacts": _LOGGED},
        summary={TREE_SECONDS: sum(seconds), "tree/steps": float(shared), "tree/steps_alone": float(alone)},
        artifacts={"experiment.yaml": yaml, "report.html": "", _TABLE: ""},
        artifacts_digest=digest([yaml, table.to_json(), reached]),
    )


def complete_summary(plan: ExperimentPlan, table: Table, record: CellRecord) -> CellRecord:
    """Return a summary with its files (table, figures, report, resolved YAML) and when its first cell began.

    Raises:
        StorageError: the ledger cannot be read.
        OSError: a figure cannot be written.
    """
    began = (next((time_ms for *_, time_ms in plan.record(cell).history), None) for cell in plan.cells)
    with plan.ledger.snapshot():
        report = report_page(report_document([plan]))
    # The dashboard takes a dot in a column's name for a path, and finds nothing there.
    frame = table.to_frame().reset_index().rename(columns=lambda name: str(name).replace(".", "/"))
    files = {
        **record.artifacts,
        "report.html": report,
        # As `mlflow.log_table` writes it, which adds rows to what is there: the dashboard shows it as a table.
        _TABLE: frame.to_json(orient="split", index=False, double_precision=15),
        **{path.name: path for path in experiment_figures(plan, table)},
    }
    return replace(record, artifacts=files, start_ms=min(filter(None, began), default=None))


def _steps(plan: ExperimentPlan) -> tuple[int, int]:
    """Return the optimizer steps of the stage tree, and those of its cells trained alone."""
    paths = [plan.tree.path_of[cell.id] for cell in distinct_cells(plan.cells)]
    steps = {job.id: job.last_step - job.first_step for job in plan.tree.stage_runs.values()}
    return sum(steps.values()), sum(steps[run] for path in paths for run in path)


def _description(plan: ExperimentPlan, table: Table) -> str:
    """Return the experiment's description as Markdown: what it is, the table, the front, what the tree shared."""
    shared, alone = _steps(plan)
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
