"""The table of planned experiments: cells under several names, several experiments, repeated trials."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from ledger_work import finish
from rich.console import Console

from orchestrator.plan.documents import plan_document, status_document
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.plan.trials import Trial
from orchestrator.report import table as tables
from orchestrator.report.console import print_plan, print_status
from orchestrator.report.statistics import compare
from orchestrator.report.table import table_of

STRIDES = "matrix:\n  compressors.heavy.stride: [8, 4]\n"
BASELINE = "report: {baseline: {phases.finetune.schedule: full}}\n"
NAMES = ["stride=8,schedule=full", "stride=8,schedule=heavy", "stride=8,schedule=two_stage",
         "stride=4,schedule=full", "stride=4,schedule=heavy", "stride=4,schedule=two_stage"]  # fmt: skip


@pytest.fixture
def grid(tiny_text: str) -> str:
    """Six cells; the two on full tokens are the same work."""
    return tiny_text.replace("matrix:\n", STRIDES) + BASELINE


@pytest.fixture(autouse=True)
def _storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))


def finished(file: Path, text: str) -> ExperimentPlan:
    """The experiment of a text, everything done; every evaluation with a score of its own."""
    file.write_text(text)
    plan = prepare(file)
    for job in plan.tree.work(plan.ledger):
        if isinstance(job, EvaluationJob):
            accuracy = int(job.id[:4], 16) / 0x10000
            plan.ledger.write_evaluation(job.id, {"metrics": {"accuracy": accuracy}, "seconds": 1.0})
        else:
            finish(plan.ledger, job)
    return prepare(file)


def test_every_name_that_was_asked_for_has_a_row(tmp_path: Path, grid: str) -> None:
    plan = finished(tmp_path / "grid.yaml", grid)
    assert len({cell.id for cell in plan.cells}) == 5
    table = table_of([plan])
    rows = {row.name: row for row in table.rows}
    assert list(rows) == NAMES and table.warnings == ()
    one, other = rows[NAMES[0]], rows[NAMES[3]]
    assert one.values == other.values and one.marks == other.marks == ("baseline",)
    for name in (NAMES[1], NAMES[4]):
        assert rows[name].against["eval/vqa/accuracy"] == (
            rows[name].values["eval/vqa/accuracy"] - one.values["eval/vqa/accuracy"]
        )
    assert plan.find(one.cells[0]).name == one.name and plan.find(other.name).name == other.name
    assert plan.find(plan.cells[0].id[:8]).name == plan.find("schedule=full").name == NAMES[0]


def test_an_evaluation_that_was_done_unlike_is_flagged(tmp_path: Path, grid: str) -> None:
    plan = finished(tmp_path / "grid.yaml", grid)
    jobs = [job for cell in plan.cells for job in cell.evaluations if job.under == "final"]
    for job in jobs:
        size = 1 if job is jobs[-1] else 16
        marks = {"batch_size": size, "settings": {"max_new_tokens": 8}, "compressor": "none"}
        plan.ledger.write_evaluation(job.id, {"metrics": {"accuracy": 0.5}, "fingerprint": marks})
    plan = prepare(tmp_path / "grid.yaml")
    (warning,) = (text for text in table_of([plan]).document()["warnings"] if "batch_size" in text)
    assert "batch_size of evaluate.vqa differs (16: " in warning and f"; 1: {plan.cells[-1].name})" in warning
    tags = plan.record(plan.cells[-1]).tags
    assert tags["fingerprint.eval.vqa"] == "batch_size 1, settings.max_new_tokens 8"


def test_the_trees_show_a_shared_stage_run_as_all_its_cells(tmp_path: Path, grid: str) -> None:
    plan = finished(tmp_path / "grid.yaml", grid)
    console = Console(file=io.StringIO(), width=200)
    print_plan(plan_document(plan.loaded, plan.cells, plan.tree, plan.ledger), console)
    print_status(status_document(plan), console)
    lines = [line for line in console.file.getvalue().splitlines() if "finetune 0-6  full  done" in line]
    assert len(lines) == 2 and all("2 cells" in line for line in lines)


def test_cells_that_only_tests_tell_apart_keep_their_own_scores(tmp_path: Path, grid: str) -> None:
    plan = finished(tmp_path / "grid.yaml", grid.replace("under: [final, full]", "under: [final, heavy]"))
    table = table_of([plan])
    one, other = (row for row in table.rows if "baseline" in row.marks)
    score = "eval/vqa/under_heavy/accuracy"
    assert one.values["eval/vqa/accuracy"] == other.values["eval/vqa/accuracy"]
    assert one.values[score] != other.values[score]
    (warning,) = table.warnings
    assert warning.startswith(f"{NAMES[3]} is {NAMES[0]} tested in another way")
    assert warning in plan_document(plan.loaded, plan.cells, plan.tree, plan.ledger)["notices"]


def test_each_experiment_has_its_own_baseline_and_means(tmp_path: Path, grid: str, tiny_text: str) -> None:
    alone = finished(tmp_path / "grid.yaml", grid)
    second = tiny_text.replace("matrix:\n", "matrix:\n  seed: [3, 4]\n").replace("name: tiny", "name: seeds")
    seeds = finished(tmp_path / "seeds.yaml", second + BASELINE.replace("}}", "}, mean_over: [seed]}"))
    table = table_of([alone, seeds])
    assert table.rows == (*table_of([alone]).rows, *table_of([seeds]).rows) and table.warnings == ()
    assert table_of([alone, alone]) == table_of([alone])


def test_a_row_of_an_earlier_experiment_is_shown_there_and_says_so(tmp_path: Path, grid: str, tiny_text: str) -> None:
    plan, tiny = finished(tmp_path / "grid.yaml", grid), finished(tmp_path / "tiny.yaml", tiny_text)
    table = table_of([tiny, replace(plan, loaded=plan.loaded)])
    assert [row.name for row in table.rows] == [f"schedule={n}" for n in ("full", "heavy", "two_stage")] + NAMES[4:]
    (warning,) = table.warnings
    assert warning == f"tiny: shown once, in the experiment before it: {', '.join(NAMES[:4])}"
    other = finished(tmp_path / "other.yaml", tiny_text.replace("name: tiny", "name: other\nseed: 5"))
    names = [row.name for row in table_of([tiny, other]).rows]
    assert names[0] == "tiny/schedule=full" and names[3] == "other/schedule=full"


def test_a_trial_that_repeats_an_earlier_one_is_named(tmp_path: Path, grid: str) -> None:
    plan = finished(tmp_path / "grid.yaml", grid)
    trials = tuple(Trial(number, {}, {}, cells=(plan.cells[number % 2].id,)) for number in range(3))
    assert table_of([replace(plan, trials=trials)]).warnings == ("trial-002 is the same as trial-000",)


def test_a_headline_that_no_result_has_is_named(tmp_path: Path, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = finished(tmp_path / "grid.yaml", grid)
    monkeypatch.setattr(type(plan.cells[0].spec.evaluate["vqa"]), "headline", ("acuracy", "accuracy"))
    (warning,) = table_of([plan]).warnings
    assert warning.startswith("evaluate.vqa has no metric acuracy")


def answers(plan: ExperimentPlan, right: dict[str, list[int]], *, apart: bool = False) -> None:
    """Keeps for every evaluation the answers of its cell's schedule: `right` holds 1 and 0, two questions a picture.

    With `apart` the metric of the heavy cells under full is not the mean of their scores.
    """
    for cell in plan.cells:
        for job in cell.evaluations:
            schedule = cell.axes["phases.finetune.schedule"]
            scores, is_apart = right[schedule], apart and (schedule, job.under) == ("heavy", "full")
            metrics = {"accuracy": sum(scores) / len(scores) + (0.01 if is_apart else 0)}
            said = [{"row": i, "images": [f"{i // 2}.png"], "right": bool(one)} for i, one in enumerate(scores)]
            plan.ledger.write_evaluation(job.id, {"metrics": metrics, "seconds": 1.0}, said)


SEEDS = "matrix:\n  seed: [3, 4, 5]\n"
# Of 40 questions about 20 pictures: heavy loses ten pictures, two_stage one question and wins another.
RIGHT = {"full": [1] * 39 + [0], "heavy": [0] * 20 + [1] * 19 + [0], "two_stage": [0] + [1] * 39}


def test_what_differs_from_the_baseline_is_marked(tmp_path: Path, tiny_text: str) -> None:
    text = tiny_text.replace("matrix:\n", SEEDS) + BASELINE.replace("}}", "}, mean_over: [seed]}")
    plan = finished(tmp_path / "seeds.yaml", text)
    answers(plan, RIGHT, apart=True)
    table = table_of([plan])
    full, heavy, two_stage = table.rows
    final, under_full = "eval/vqa/accuracy", "eval/vqa/under_full/accuracy"
    # What is not the mean of its scores is compared and not tested; the last stage of two_stage is full.
    assert full.tests == {} and heavy.tests.keys() == {final} and two_stage.tests.keys() == {final, under_full}
    by_hand = compare(*([_records(RIGHT[name])] * 3 for name in ("heavy", "full")))
    assert heavy.tests[final] == by_hand and (by_hand.images, by_hand.seeds) == (20, 3)
    found = [row["tests"][final] for row in table.document()["rows"][1:]]
    p_values = [each["p_value"] for each in found]
    assert [each["p_corrected"] for each in found] == [2 * p_values[0], p_values[1]] and p_values[1] == 1
    shown = table.render("md").splitlines()
    assert "0.475 ± 0.000 (-0.500 *)" in shown[3] and "(+0.000 ns)" in shown[4]
    assert "0.485 ± 0.000 (-0.490) |" in shown[3] and "corrected for 2 tests" in str(table.explanations())


def _records(right: list[int]) -> list[dict[str, object]]:
    return [{"row": i, "images": [f"{i // 2}.png"], "right": bool(one)} for i, one in enumerate(right)]


def test_what_cannot_be_tested_says_so_or_has_no_mark(
    tmp_path: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tiny_text.replace("matrix:\n", SEEDS) + BASELINE.replace("}}", "}, mean_over: [seed]}")
    plan = finished(tmp_path / "seeds.yaml", text)
    assert not any(row.tests for row in table_of([plan]).rows)  # no answers were kept
    answers(plan, RIGHT | {"heavy": [1] * 38})
    assert [len(row.tests) for row in table_of([plan]).rows] == [0, 0, 2]  # other questions
    answers(plan, RIGHT)
    job = next(cell for cell in plan.cells if cell.axes["phases.finetune.schedule"] == "heavy").evaluations[0]
    plan.ledger.store.write(f"predictions/{job.id}.jsonl.gz", b"torn")
    table = table_of([plan])
    assert [len(row.tests) for row in table.rows] == [0, 1, 2]
    (warning,) = table.warnings
    assert warning.startswith("tiny: not tested: ") and "damaged" in warning
    monkeypatch.setattr(tables, "MOST_TESTS", 3)
    (warning,) = table_of([plan]).warnings
    assert "4 differences from the baseline are not tested" in warning


def test_a_layout_chooses_rows_and_columns_and_tests_stay_corrected_for_all(tmp_path: Path, grid: str) -> None:
    whole = table_of([finished(tmp_path / "grid.yaml", grid)])
    columns = "[cost/train_tflops, 'eval/*/accuracy', eval/vqa/nothing]"
    chosen = f"rows: ['{NAMES[4]}', '*two_stage*', nowhere], columns: {columns}"
    text = grid.replace(BASELINE.strip(), BASELINE.strip().removesuffix("}") + f", {chosen}}}")
    assert text != grid
    table = table_of([finished(tmp_path / "grid.yaml", text)])
    assert table.rows == whole.rows and table.tests() == whole.tests(), "data has every row"
    assert table.columns == ("cost/train_tflops", *(name for name in whole.columns if name.startswith("eval/")))
    lines = [line.strip("| ").split(" | ") for line in table.to_markdown().splitlines()]
    two_stage = [row.name for row in whole.rows if "two_stage" in row.name and row.name != NAMES[4]]
    assert [line[0] for line in lines[2:]] == [NAMES[4], *two_stage] and lines[0][1].startswith("train ")
    assert [text for text in table.warnings if "nowhere" in text or "nothing" in text] == [
        "tiny: no row fits 'nowhere' of report.rows",
        "no cell has a metric that fits 'eval/vqa/nothing' of report.columns",
    ]
    assert "status" not in table.to_latex() and "status" in lines[0]
    assert [row.name for row in table_of([prepare(tmp_path / "grid.yaml")], all_metrics=True).rows] == [
        row.name for row in whole.rows
    ]
