"""The summary run: table, figures, report and resolved YAML of a grid, sent once, and never taken for a cell."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ledger_work import finish
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console

from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.report import overview
from orchestrator.run import RunOutcome, run_experiment

FILES = {"experiment.yaml", "grid.png", "report.html", "table.json"}


@pytest.fixture
def plan(
    tiny_experiment: Path,
    tmp_path: Path,
    database: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> ExperimentPlan:
    """The tiny grid; in MLflow it has the test's name."""
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    return prepare(tiny_experiment, [f"tracking.experiment_name={json.dumps(request.node.name)}"])


@pytest.fixture
def grid(plan: ExperimentPlan) -> ExperimentPlan:
    """Its work is done; a stage run took two seconds."""
    for job in plan.tree.work(plan.ledger):
        finish(plan.ledger, job)
    return plan


def run(plan: ExperimentPlan) -> RunOutcome:
    return run_experiment(plan.loaded, local=True, console=Console(file=io.StringIO()))


def found(plan: ExperimentPlan, which: str = "tags.summary_of != ''") -> tuple[MlflowClient, list[Run]]:
    client = MlflowClient(plan.tracking_uri)
    experiment = client.get_experiment_by_name(plan.experiment_name)
    return client, list(client.search_runs([experiment.experiment_id], which))


def artifacts(run: Run) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://"))


def test_it_has_the_table_the_figures_the_report_and_a_file_that_loads_again(
    grid: ExperimentPlan, tmp_path: Path
) -> None:
    outcome = run(grid)
    client, (summary,) = found(grid)
    assert {file.path for file in client.list_artifacts(summary.info.run_id)} == FILES
    folder = artifacts(summary)
    table = client.load_table(summary.info.experiment_id, "table.json")
    assert list(table["cell"]) == [row.name for row in outcome.table.rows] and set(table["status"]) == {"finished"}
    assert list(table["eval/vqa/accuracy"]) == [row.values["eval/vqa/accuracy"] for row in outcome.table.rows]
    shutil.copy(folder / "experiment.yaml", tmp_path / "again.yaml")
    assert [cell.id for cell in prepare(tmp_path / "again.yaml").cells] == [cell.id for cell in grid.cells]
    page = (folder / "report.html").read_text()
    assert all(cell.name in page for cell in grid.cells) and page.count("</html>") == 1
    assert (folder / "grid.png").read_bytes() == (grid.ledger.storage / "cells" / "tiny" / "grid.png").read_bytes()
    note = summary.data.tags["mlflow.note.content"]
    assert "not a cell" in note and "| schedule=heavy |" in note


def test_it_is_no_cell_and_lasts_as_long_as_training_took(grid: ExperimentPlan) -> None:
    run(grid)
    _, (summary,) = found(grid)
    _, cells = found(grid, "tags.cell_id != ''")
    assert {each.info.run_name for each in cells} == {cell.name for cell in grid.cells}
    assert summary.info.run_name == "summary" and not summary.data.params and summary.info.status == "FINISHED"
    assert not {name for each in cells for name in each.data.metrics} & summary.data.metrics.keys()
    shared = len(grid.tree.stage_runs)
    assert summary.data.metrics["tree/train_seconds"] == 2.0 * shared
    assert summary.info.end_time - summary.info.start_time == 2000 * shared
    assert summary.info.start_time == min(each.info.start_time for each in cells)
    assert summary.data.metrics["tree/steps"] < summary.data.metrics["tree/steps_alone"]


def remade(grid: ExperimentPlan, change: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a change has the next run make the report again."""
    run(grid)
    made = []
    real = overview.report_page
    monkeypatch.setattr(overview, "report_page", lambda document: made.append(1) or real(document))
    change()
    assert run(grid).unsent == ()
    return bool(made)


def score(grid: ExperimentPlan) -> None:
    test = grid.cells[0].evaluations[0]
    grid.ledger.write_evaluation(test.id, {"metrics": {"accuracy": 0.75}, "seconds": 1.0})


CHANGES = {
    "nothing": (lambda grid: None, False),
    "a score": (score, True),
    "a file of it is gone": (lambda grid: (artifacts(found(grid)[1][0]) / "report.html").unlink(), True),
    "deleted in MLflow": (lambda grid: found(grid)[0].delete_run(found(grid)[1][0].info.run_id), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_made_again_when_something_changed_or_is_gone_and_only_then(
    grid: ExperimentPlan, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    what, expected = CHANGES[change]
    assert remade(grid, lambda: what(grid), monkeypatch) == expected
    _, (summary,) = found(grid)
    assert summary.info.status == "FINISHED"
    assert {file.name for file in artifacts(summary).iterdir()} == FILES


def test_text_of_ones_own_in_its_description_stays(grid: ExperimentPlan) -> None:
    run(grid)
    client, (summary,) = found(grid)
    note = summary.data.tags["mlflow.note.content"]
    client.set_tag(summary.info.run_id, "mlflow.note.content", f"What I think of it.\n\n{note}")
    score(grid)
    run(grid)
    _, (summary,) = found(grid)
    note = summary.data.tags["mlflow.note.content"]
    assert note.startswith("What I think of it.") and note.count("not a cell") == 1 and "0.75" in note


def test_a_report_that_cannot_be_made_fails_nothing_and_is_made_the_next_time(
    grid: ExperimentPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(overview, "report_page", lambda document: 1 / 0)
        outcome = run(grid)
    assert outcome.exit_code == 0 and outcome.unsent == ("the summary",)
    assert outcome.tracking_problem is not None and "ZeroDivisionError" in outcome.tracking_problem
    assert len(found(grid, "tags.cell_id != ''")[1]) == len(grid.cells) and not found(grid)[1]
    assert run(grid).unsent == () and len(found(grid)[1]) == 1


def test_without_a_finished_cell_there_is_none(plan: ExperimentPlan) -> None:
    for job in plan.tree.work(plan.ledger):
        if isinstance(job, EvaluationJob):
            plan.ledger.write_failure(job.id, {"error": "no"})
        else:
            finish(plan.ledger, job)
    run(plan)
    assert not found(plan)[1]
