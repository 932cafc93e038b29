"""`status` beside a run, after its death, and of work that waits, failed or is shared: from a real ledger."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from ledger_work import finish, spool
from rich.console import Console

from orchestrator.plan.documents import plan_document, status_document
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.ledger.leases import Leases
from orchestrator.report.console import print_plan, print_status

HEAVY = {"torch", "transformers", "deepspeed", "ray", "mlflow", "matplotlib", "numpy"}


@pytest.fixture
def plan(tiny_experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentPlan:
    """Three cells, two of which begin alike; nothing is done."""
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
    return prepare(tiny_experiment)


def again(plan: ExperimentPlan) -> ExperimentPlan:
    return prepare(plan.loaded.path)


def screen(show: Any, document: dict[str, Any], width: int = 120, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    show(document, console)
    return str(console.file.getvalue())


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {cell["name"].removeprefix("schedule="): cell for cell in document["cells"]}


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_begun(plan: ExperimentPlan, terminal: bool) -> None:
    document = status_document(plan)
    assert {cell["state"] for cell in document["cells"]} == {"new"}
    assert {run["state"] for run in document["stage_runs"]} == {"new"} and document["totals"]["stage_runs_done"] == 0
    text = screen(print_status, document, terminal=terminal)
    assert "3 cells: 3 new; 0/4 stage runs, 0/4 evaluations done" in text and "hours" not in text
    assert "└── finetune 0-3  heavy  new  schedule=heavy, schedule=two_stage" in text


def test_what_runs_where_what_is_shared_and_what_waits(plan: ExperimentPlan) -> None:
    root, full, *_, heavy = plan.tree.work(plan.ledger)[:5]
    heavy = plan.tree.stage_runs[plan.tree.path_of[plan.cells[1].id][0]]
    finish(plan.ledger, root)
    spool(plan.ledger, full, 4)
    spool(plan.ledger, heavy, 1)
    leases = Leases(plan.ledger.store, "driver")
    leases.acquire(full.id, "lane-1")
    document = status_document(again(plan))
    assert {name: cell["state"] for name, cell in by_name(document).items()} == {
        "full": "running", "heavy": "waiting", "two_stage": "waiting"
    }  # fmt: skip
    running, shared, *_ = document["stage_runs"]
    assert running["holder"] == {"lane": "lane-1", "host": os.uname().nodename, "pid": os.getpid(), "owner": "driver"}
    assert (running["step"], running["loss"], running["samples_per_second"]) == (3, 0.25, 32.0)
    assert shared["state"] == "waiting" and len(shared["cells"]) == 2 and shared["steps_done"] == 1
    totals = document["totals"]
    assert totals["worker_hours_done"] == pytest.approx(5 * 0.5 / 3600) and totals["seconds_left"] > 0
    text = screen(print_status, document)
    assert f"finetune 0-6  full  step 4/6  loss 0.250  32 samples/s  running  lane-1 pid {os.getpid()} on" in text
    assert "worker-hours of training done" in text and "to the end" in text
    leases.close()
    after = status_document(again(plan))
    assert {cell["state"] for cell in after["cells"]} == {"interrupted"} and "running" not in screen(
        print_status, after
    )


def test_what_failed_and_why_with_its_log(plan: ExperimentPlan) -> None:
    root, full, test, *_ = plan.tree.work(plan.ledger)
    finish(plan.ledger, root)
    finish(plan.ledger, full)
    plan.ledger.write_failure(test.id, {"error": "the answers [/red] are empty\nmore"})
    heavy = plan.tree.stage_runs[plan.tree.path_of[plan.cells[1].id][0]]
    spool(plan.ledger, heavy, 2)
    (plan.ledger.work_folder(heavy.id) / "log.txt").write_text("...")
    plan.ledger.write_failure(heavy.id, {"error": "diverged at step 2\nmore"})
    document = status_document(again(plan))
    cells = by_name(document)
    assert {cell["state"] for cell in cells.values()} == {"failed"}
    assert cells["two_stage"]["error"] == "diverged at step 2\nmore"
    assert cells["two_stage"]["log"] == str(plan.ledger.log_file(heavy.id))
    text = screen(print_status, document)
    assert "failed: finetune 0-3: diverged at step 2\n" in text
    assert f"log: {plan.ledger.log_file(heavy.id)}" in text
    assert "failed: vqa: the answers [/red] are empty" in text
    assert "evaluate vqa under final  failed  schedule=full" in text


def test_a_failed_evaluation_does_not_hide_what_the_cell_has(plan: ExperimentPlan) -> None:
    from orchestrator.report.table import ablation_table

    cell = plan.cells[1]
    for job in plan.tree.work(plan.ledger):
        finish(plan.ledger, job)
    full = cell.evaluations[1]
    (plan.ledger.storage / "evaluations" / f"{full.id}.json").unlink()
    plan.ledger.write_failure(full.id, {"error": "no"})
    record = again(plan).record(cell)
    assert record.status == "failed"
    assert record.summary["eval/vqa/accuracy"] == 0.5 and record.summary["cost/train_seconds"] == 4.0
    row = ablation_table([record], {cell.name: cell.axes}).to_csv().splitlines()[1]
    assert row.startswith("schedule=heavy,failed,0.5,")


def test_a_long_grid_shows_the_interesting_and_counts_the_rest(plan: ExperimentPlan, tmp_path: Path) -> None:
    text = plan.loaded.path.read_text().replace("matrix:\n", f"matrix:\n  seed: {list(range(70))}\n")
    grid = prepare_text(tmp_path / "grid.yaml", text)
    failed = grid.tree.stage_runs[grid.tree.path_of[grid.cells[-1].id][-1]]
    grid.ledger.write_failure(failed.id, {"error": "no"})
    document = status_document(prepare(grid.loaded.path))
    shown = screen(print_status, document).splitlines()
    tree = shown[shown.index("stage tree") + 1 :]
    assert "└── … 240 more stage runs: 240 new" in tree
    assert sum("finetune" in line and "failed:" not in line for line in tree) == 40
    assert any("failed  seed=69" in line for line in tree)
    assert any(line.startswith("… 170 more cells: 170 new") for line in shown)
    assert any(line.startswith("seed=69,schedule=two_stage") for line in shown)
    plain = screen(print_status, document, terminal=False)
    assert len(re.findall("^seed=[0-9]+,schedule=two_stage +new", plain, re.M)) == 69  # a script sees every cell


def prepare_text(path: Path, text: str) -> ExperimentPlan:
    path.write_text(text)
    return prepare(path)


def test_a_narrow_terminal_has_a_line_for_each_stage_run(plan: ExperimentPlan) -> None:
    name = 'cell_name: "a-rather-long-name-of-a-cell-with-{schedule}-in-its-middle-of-all"\n'
    named = prepare_text(plan.loaded.path.with_name("named.yaml"), plan.loaded.path.read_text() + name)
    for show, document in (
        (print_status, status_document(named)),
        (print_plan, plan_document(named.loaded, named.cells, named.tree, named.ledger, 10)),
    ):
        lines = screen(show, document, width=80).splitlines()
        assert all(len(line) <= 80 for line in lines if named.ledger.url not in line)
        begin = lines.index("stage tree")
        assert [line.lstrip("├└─│ ").split()[0] for line in lines[begin + 1 : begin + 5]] == ["finetune"] * 4
        assert lines[begin + 1].endswith("…")


def test_a_plan_shows_the_tree_what_is_kept_and_what_sharing_saves(plan: ExperimentPlan) -> None:
    finish(plan.ledger, plan.tree.work(plan.ledger)[0])
    finish(plan.ledger, plan.tree.work(plan.ledger)[0], train_seconds=3600.0)
    now = again(plan)
    text = screen(print_plan, plan_document(now.loaded, now.cells, now.tree, now.ledger, 10), 160)
    assert re.search("finetune 0-6  full  done  .* GFLOPs  schedule=full  keeps weights", text)
    assert re.search("└── finetune 0-3  heavy  new  .* GFLOPs  schedule=heavy, schedule=two_stage\n", text)
    assert "3 cells: 4 stage runs for 5 alone, 1 done; 4 evaluations for 4 alone, 0 done" in text
    assert re.search(r"train GFLOPs .* shared, .* alone \(ratio 0\.[0-9]{3}: sharing saves [0-9]+%\)", text)
    assert re.search("1.00 worker-hours of training done, [0-9.]+ left; about 1:[0-9:]+ to the end", text)


def test_a_trained_cell_with_a_new_evaluation_is_trained_not_interrupted(plan: ExperimentPlan) -> None:
    for job in plan.tree.work(plan.ledger):
        finish(plan.ledger, job)
    path = plan.loaded.path
    path.write_text(path.read_text().replace("evaluate:\n", "evaluate:\n  more: {kind: exact_match, data: train}\n"))
    now = again(plan)
    assert {now.status(cell) for cell in now.cells} == {"trained"}
    document = status_document(now)
    assert {cell["state"] for cell in document["cells"]} == {"trained"}
    text = screen(print_status, document)
    assert "interrupted" not in text and "evaluation more under final is missing" in text
    job = now.tree.work(now.ledger)[0]
    Leases(now.ledger.store, "driver").acquire(job.id)
    assert {now.status(cell) for cell in now.cells} == {"running"}


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_plan_fits_its_width_and_tells_each_reason_once(plan: ExperimentPlan, width: int, terminal: bool) -> None:
    heavy = next(job for job in plan.tree.work(plan.ledger) if getattr(job, "last_step", 0) == 3)
    error = "diverged at step 3, a reason with many words " * 3
    plan.ledger.write_failure(heavy.id, {"error": error})
    document = plan_document(plan.loaded, plan.cells, plan.tree, plan.ledger, 10)
    text = screen(print_plan, document, width, terminal)
    assert max(map(len, text.splitlines())) <= width
    line = " ".join(text.split())
    assert line.count("failed: diverged at step 3") == 1 and "schedule=heavy, schedule=two_stage: failed" in line


def test_rows_that_failed_are_reported_with_the_failure(plan: ExperimentPlan) -> None:
    job = plan.tree.work(plan.ledger)[1]
    rows = "\n".join(f"    row {n}: two images, one placeholder" for n in range(30))
    plan.ledger.write_failure(job.id, {"error": f"data.train: 30 errors\n{rows}"})
    text = screen(print_status, status_document(again(plan)))
    assert "data.train: 30 errors" in text and "row 0: two images" in text and "row 6: two images" in text
    assert "row 8" not in text and "23 more lines in the log" in text


def test_hours_by_a_given_speed_until_they_are_measured(plan: ExperimentPlan) -> None:
    path = plan.loaded.path
    path.write_text(path.read_text() + "cluster: {device_tflops: 0.001}\n")
    now = again(plan)
    document = plan_document(now.loaded, now.cells, now.tree, now.ledger, 10)
    totals = document["totals"]
    seconds = totals["train_tflops_shared"] / 0.001
    assert totals["worker_hours_left"] == pytest.approx(seconds / 3600) and totals["device_tflops"] == 0.001
    assert totals["seconds_left"] == pytest.approx(seconds)
    text = screen(print_plan, document)
    assert "worker-hours of training at 0.001 TFLOPs a second a worker (cluster.device_tflops)" in " ".join(
        text.split()
    )
    finish(now.ledger, now.tree.work(now.ledger)[0])
    finish(now.ledger, now.tree.work(now.ledger)[0], train_seconds=3600.0)
    totals = plan_document(now.loaded, now.cells, now.tree, now.ledger, 10)["totals"]
    assert "device_tflops" not in totals and totals["worker_hours_done"] == pytest.approx(1.0)


def test_a_plan_that_shares_nothing_saves_nothing(plan: ExperimentPlan) -> None:
    document = plan_document(plan.loaded, plan.cells, plan.tree, plan.ledger)
    document["totals"]["train_ratio"] = 1 + 1e-12  # sums of the same costs in another order
    assert "(ratio 1.000: sharing saves 0%)" in screen(print_plan, document)
