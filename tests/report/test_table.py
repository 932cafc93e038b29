"""The ablation table: grouping, unequal comparisons, and every format."""

import csv
import io
import json

import pytest

from orchestrator.plan.record import CellRecord
from orchestrator.report.figure import grid_figure, pareto_front
from orchestrator.report.table import ablation_table, render

AXES = {
    f"{schedule}{seed}": {"phases.finetune.schedule": schedule, "seed": seed}
    for schedule in ("full", "heavy")
    for seed in (0, 1)
}


def record(identity: str, accuracy: float, tflops: float, status: str = "finished", threads: str = "2") -> CellRecord:
    summary = {
        "eval/vqa/accuracy": accuracy,
        "eval/vqa/under_full/accuracy": accuracy / 2,
        "cost/train_tflops": tflops,
        "cost/compression_ratio": 5.565,
        "cost/train_seconds": 1234.5,
    }
    tags = {"fingerprint.threads": threads}
    return CellRecord(identity, f"cell-{identity}", status, tags=tags, summary=summary if status == "finished" else {})


RECORDS = [record("full0", 0.8, 10), record("full1", 0.6, 10), record("heavy0", 0.7, 4), record("heavy1", 0.5, 4)]


def test_a_row_a_cell_in_the_order_of_the_file():
    table = ablation_table(RECORDS, AXES)
    assert [row.name for row in table.rows] == ["cell-full0", "cell-full1", "cell-heavy0", "cell-heavy1"]
    assert table.columns[:2] == ("eval/vqa/accuracy", "eval/vqa/under_full/accuracy")


def test_mean_over_seeds_gives_mean_and_deviation_and_marks_the_baseline():
    table = ablation_table(RECORDS, AXES, mean_over=["seed"], baseline={"phases.finetune.schedule": "full"})
    full, heavy = table.rows
    assert full.values["eval/vqa/accuracy"] == pytest.approx(0.7)
    assert full.spread["eval/vqa/accuracy"] == pytest.approx(0.1414, abs=1e-4)
    assert "baseline" in full.marks and "baseline" not in heavy.marks
    assert "0.700 ± 0.141" in render(table, "md")


def test_a_failed_cell_leaves_its_group_failed_and_out_of_the_mean():
    records = [RECORDS[0], record("full1", 0.0, 0.0, status="failed")]
    (row,) = ablation_table(records, AXES, mean_over=["seed"]).rows
    assert row.status == "failed" and row.values["eval/vqa/accuracy"] == 0.8
    assert "1 of 2 cells" in row.marks


def test_cells_of_unequal_fingerprint_are_flagged():
    records = [RECORDS[0], record("heavy0", 0.7, 4, threads="1")]
    (warning,) = ablation_table(records, AXES).warnings
    assert "threads" in warning and "cell-full0" in warning and "cell-heavy0" in warning
    assert ablation_table(RECORDS, AXES).warnings == ()


def test_csv_and_json_hold_unrounded_values_and_agree():
    table = ablation_table(RECORDS, AXES)
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    document = json.loads(render(table, "json"))
    assert [float(line["cost/compression_ratio"]) for line in lines] == [5.565] * 4
    assert [row["metrics"]["eval/vqa/accuracy"] for row in document["rows"]] == [0.8, 0.6, 0.7, 0.5]
    assert [float(line["eval/vqa/accuracy"]) for line in lines] == [0.8, 0.6, 0.7, 0.5]


def test_markdown_and_latex_escape_what_would_break_them():
    table = ablation_table([record("full0", 0.8, 10)], {"full0": {}})
    odd = type(table.rows[0])("a|b_c%", ("x",), {}, table.rows[0].values, {}, "finished")
    table = type(table)(table.columns, (odd,))
    assert r"a\|b_c%" in render(table, "md")
    assert r"a|b\_c\%" in render(table, "latex")
    assert len({line.count("|") - line.count(r"\|") for line in render(table, "md").splitlines()}) == 1


def test_the_front_keeps_only_points_nothing_beats():
    assert pareto_front([(10, 0.8), (4, 0.7), (5, 0.6), (4, 0.65), (12, 0.8)]) == [1, 0]
    assert pareto_front([]) == []


def test_the_figure_is_drawn_only_where_there_is_something_to_draw(tmp_path):
    assert not grid_figure(ablation_table([record("full0", 0, 0, status="failed")], AXES), "t", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
    assert grid_figure(ablation_table(RECORDS, AXES, mean_over=["seed"]), "t", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
