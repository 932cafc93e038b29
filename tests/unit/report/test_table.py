"""The ablation table: grouping, unequal comparisons, and every format."""

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.plan.cell_record import CellRecord
from orchestrator.report.console import nothing_done
from orchestrator.report.figures import grid_figure
from orchestrator.report.table import ablation_table
from orchestrator.report.units import Operations, clock, operations
from orchestrator.spec.infrastructure import ReportSpec

AXES = {
    f"cell-{schedule}{seed}": {"phases.finetune.schedule": schedule, "seed": seed}
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


def test_mean_over_seeds_gives_mean_and_interval_and_marks_the_baseline():
    table = ablation_table(RECORDS, AXES, mean_over=["seed"], baseline={"phases.finetune.schedule": "full"})
    full, heavy = table.rows
    assert full.values["eval/vqa/accuracy"] == pytest.approx(0.7)
    assert full.spread["eval/vqa/accuracy"] == pytest.approx(0.1414, abs=1e-4)
    assert "baseline" in full.marks and "baseline" not in heavy.marks
    # Two values: Student's t with one degree of freedom is 12.706.
    assert full.ci95["eval/vqa/accuracy"] == pytest.approx(12.706 * 0.1, rel=1e-4)
    assert "0.700 ± 1.271" in table.render("md") and "±: half of the 95% interval" in str(table.explanations())
    head = table.render("csv").splitlines()[0]
    assert "eval/vqa/accuracy/std" in head and "eval/vqa/accuracy/ci95" in head


def test_bounds_are_shown_as_such_and_compared_with_nothing(tmp_path):
    adaptive = [replace(one, tags={**one.tags, "costs_at_most": "true"}) for one in RECORDS[2:]]
    options = {"mean_over": ["seed"], "baseline": {"phases.finetune.schedule": "full"}}
    exact, table = (ablation_table([*RECORDS[:2], *rest], AXES, **options) for rest in (RECORDS[2:], adaptive))
    assert "cost/train_tflops" in exact.rows[1].against and "≤" not in exact.render("md")
    row = table.rows[1]
    assert "costs at most" in row.marks and row.against.keys() == exact.rows[1].against.keys() - {
        "cost/train_tflops", "cost/compression_ratio", "cost/visual_layer_tokens"
    }  # fmt: skip
    assert "| ≤ 4.00 | ≥ 5.57 |" in table.render("md") or "| ≤ 4.000 | ≥ 5.57 |" in table.render("md")
    assert r"$\leq$ 4.00" in table.render("latex")
    assert grid_figure(table, "t", tmp_path / "grid.png") and (tmp_path / "grid.png").stat().st_size > 1000


def test_a_failed_cell_leaves_its_group_failed_and_out_of_the_mean():
    records = [RECORDS[0], record("full1", 0.0, 0.0, status="failed")]
    (row,) = ablation_table(records, AXES, mean_over=["seed"]).rows
    assert row.status == "failed" and row.values["eval/vqa/accuracy"] == 0.8
    assert "1 of 2 cells" in row.marks


def test_a_mean_over_every_axis_bears_no_cells_name():
    """Else a figure of three seeds is titled `seed=0`."""
    axes = {name: {"seed": axes["seed"]} for name, axes in AXES.items()}
    (row,) = ablation_table(RECORDS[:2], axes, mean_over=["seed"]).rows
    assert (row.name, row.values["eval/vqa/accuracy"]) == ("mean over seed", pytest.approx(0.7))


def test_cells_of_unequal_fingerprint_are_flagged():
    records = [RECORDS[0], record("heavy0", 0.7, 4, threads="1")]
    (warning,) = ablation_table(records, AXES).warnings
    assert "threads" in warning and "cell-full0" in warning and "cell-heavy0" in warning
    assert ablation_table(RECORDS, AXES).warnings == ()


def test_evaluations_done_unlike_are_flagged_with_what_differs():
    def tested(number: int, **marks) -> CellRecord:
        marks = {"batch_size": 16, "settings": {"max_new_tokens": 8}, "compressor": f"stride {number}", **marks}
        evaluated = {"eval/vqa": marks, "eval/vqa/under_full": {**marks, "compressor": "none"}}
        return replace(RECORDS[number], evaluated=evaluated)

    same = [tested(0), tested(1)]
    assert ablation_table(same, AXES).warnings == (), "what cells are trained for differs in `final`, and may"
    (warning,) = ablation_table([*same, tested(2, settings={"max_new_tokens": 4})], AXES).warnings
    assert warning == (
        "unequal comparison: settings.max_new_tokens of evaluate.vqa differs "
        "(8: cell-full0, cell-full1; 4: cell-heavy0)"
    )
    named = [
        replace(one, evaluated={"eval/vqa/under_heavy": {"compressor": f"stride {number}"}})
        for number, one in enumerate(RECORDS[:2])
    ]
    (warning,) = ablation_table(named, AXES).warnings
    assert warning.startswith("unequal comparison: compressor of evaluate.vqa differs (stride 0: cell-full0")
    by_axis = [replace(one, params={"compressors.heavy.stride": "8"}) for one in named]
    assert ablation_table(by_axis, AXES).warnings == ()
    (warning,) = ablation_table([same[0], replace(RECORDS[1], evaluated={"eval/vqa": {}})], AXES).warnings
    assert "not recorded of cell-full1" in warning


def test_csv_and_json_hold_unrounded_values_and_agree():
    table = ablation_table(RECORDS, AXES)
    lines = list(csv.DictReader(io.StringIO(table.render("csv"))))
    document = json.loads(table.render("json"))
    assert [float(line["cost/compression_ratio"]) for line in lines] == [5.565] * 4
    assert [row["metrics"]["eval/vqa/accuracy"] for row in document["rows"]] == [0.8, 0.6, 0.7, 0.5]
    assert [float(line["eval/vqa/accuracy"]) for line in lines] == [0.8, 0.6, 0.7, 0.5]


def test_markdown_and_latex_escape_what_would_break_them():
    table = ablation_table([record("full0", 0.8, 10)], {"cell-full0": {}})
    odd = type(table.rows[0])("a|b_c%", ("x",), {}, table.rows[0].values, {}, "finished")
    table = type(table)(table.columns, (odd,))
    assert r"a\|b_c%" in table.render("md")
    assert r"a|b\_c\%" in table.render("latex")
    assert len({line.count("|") - line.count(r"\|") for line in table.render("md").splitlines()}) == 1


def test_the_figure_is_drawn_only_where_there_is_something_to_draw(tmp_path):
    assert not grid_figure(ablation_table([record("full0", 0, 0, status="failed")], AXES), "t", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
    assert grid_figure(ablation_table(RECORDS, AXES, mean_over=["seed"]), "t", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_cells_that_cost_nothing_are_drawn_without_a_warning(tmp_path):
    tested = [record("full0", 0.8, 0.0), record("heavy0", 0.7, 0.0)]  # nothing was trained
    assert grid_figure(ablation_table(tested, AXES), "t", tmp_path / "grid.png")


BASELINE = {"phases.finetune.schedule": "full"}


def test_the_other_rows_are_held_against_the_baseline_of_their_seed():
    table = ablation_table(RECORDS, AXES, baseline=BASELINE)
    against = {row.name: row.against.get("eval/vqa/accuracy") for row in table.rows}
    assert against["cell-full0"] is None
    assert against["cell-heavy0"] == pytest.approx(-0.1)
    assert against["cell-heavy1"] == pytest.approx(-0.1)
    lines = table.render("md").splitlines()
    assert "| 0.700 (-0.100) |" in lines[4] and "| 4.000 (-60%) |" in lines[4] and "| 5.57 |" in lines[4]
    assert "(" not in lines[2].replace("(baseline)", "")
    rows = json.loads(table.render("json"))["rows"]
    assert rows[2]["to_baseline"]["cost/train_tflops"] == -6
    assert rows[2]["metrics"]["cost/train_tflops"] == 4  # documents keep their unit


def test_no_difference_is_shown_where_no_baseline_fits():
    many = {name: {**own, "seed": own["seed"] + 7 * ("full" in name)} for name, own in AXES.items()}
    table = ablation_table(RECORDS, many, baseline=BASELINE)
    assert all(not row.against for row in table.rows)
    (warning,) = table.warnings
    assert warning.startswith("no difference from the baseline in cell-heavy0, cell-heavy1: the baseline is cell-full0")
    failed = [record("full0", 0, 0, status="failed"), RECORDS[2]]
    assert all(not row.against for row in ablation_table(failed, AXES, baseline=BASELINE).rows)


def test_what_the_formula_gives_has_no_deviation_of_nothing():
    text = ablation_table(RECORDS, AXES, mean_over=["seed"]).render("md")
    assert "± 1.271" in text and "10.00 |" in text and "5.57 |" in text
    assert "± 0.00" not in text and "± 0 " not in text
    moved = [record("full0", 0.8, 10), record("full1", 0.6, 12)]
    assert "11.00 ± 12.71" in ablation_table(moved, AXES, mean_over=["seed"]).render("md")


def test_operations_are_shown_in_a_unit_that_fits():
    large = [record("full0", 0.8, 33_263_875.49), record("heavy0", 0.7, 6_377_911.66)]
    text = ablation_table(large, AXES).render("md")
    assert "train EFLOPs" in text and "| 33.26 |" in text and "| 6.378 |" in text
    assert [operations(value) for value in (0.0087, 2.456, 1234.5, 2e6, 3e9)] == [
        "8.700 GFLOPs", "2.456 TFLOPs", "1.234 PFLOPs", "2.000 EFLOPs", "3.000 ZFLOPs",
    ]  # fmt: skip
    assert operations(None) == "– TFLOPs" and operations(0.0) == "0 TFLOPs"
    unit = Operations.of([5e6, 12.0, None])
    assert (unit.name, unit.text(12.0), unit.text(5e6)) == ("EFLOPs", "1.2e-05", "5.000")


def test_long_spans_are_shown_in_days():
    assert [clock(s) for s in (7, 3723, 47 * 3600, 100 * 3600)] == ["0:07", "1:02:03", "47:00:00", "4 days 4 h"]


def test_the_screen_explains_the_short_heads():
    console = Console(file=io.StringIO(), width=100)
    ablation_table(RECORDS, AXES, baseline=BASELINE).print(console)
    text = " ".join(console.file.getvalue().split())
    assert "CR: compression ratio, decoder layers x visual tokens / visual layer-tokens" in text
    assert "seconds: training time on the clock" in text


def test_a_group_that_is_partly_done_was_not_interrupted():
    new = CellRecord("full1", "cell-full1", "new")
    (row,) = ablation_table([RECORDS[0], new], AXES, mean_over=["seed"]).rows
    assert row.status == "unfinished"


def test_a_run_that_did_nothing_says_why():
    assert nothing_done({}, {}) == "nothing to do: all runnable jobs are complete"
    assert "2 cells failed before; --retry-failed" in nothing_done({"a": "", "b": ""}, {})
    assert "1 cell could not be finished" in nothing_done({}, {"a": ""})


def test_every_headline_metric_is_shown_under_every_setting_and_no_other():
    summary = {
        "eval/caption/cider": 1.1, "eval/caption/bleu": 0.3, "eval/caption/length": 9.0,
        "eval/caption/under_full/cider": 1.2, "eval/caption/under_full/length": 9.5,
        "eval/vqa/accuracy": 0.5, "eval/vqa/num_samples": 40.0, "eval/odd/score": 3.0, "cost/train_tflops": 4.0,
    }  # fmt: skip
    made = CellRecord("full0", "cell-full0", "finished", summary=summary)
    table = ablation_table([made], AXES, headlines={"caption": ("cider", "bleu"), "vqa": ("accuracy",)})
    assert table.columns == (
        "eval/caption/cider", "eval/caption/bleu", "eval/caption/under_full/cider", "eval/vqa/accuracy",
        "eval/odd/score", "cost/train_tflops",
    )  # fmt: skip


def test_a_headline_metric_that_no_result_has_is_told():
    made = CellRecord("full0", "cell-full0", "finished", summary={"eval/caption/cider": 1.1, "eval/vqa/f1": 0.5})
    table = ablation_table([made], AXES, headlines={"caption": ("cider", "blue"), "vqa": ("accuracy",), "new": ("x",)})
    (warning,) = table.warnings
    assert "evaluate.caption has no metric blue" in warning


def test_a_frame_holds_axes_deviations_and_differences():
    frame = ablation_table(RECORDS, AXES, mean_over=["seed"], baseline=BASELINE).to_frame()
    heavy = frame.iloc[1]
    assert heavy["phases.finetune.schedule"] == "heavy" and heavy["status"] == "finished"
    assert heavy["eval/vqa/accuracy"] == pytest.approx(0.6)
    assert heavy["eval/vqa/accuracy/std"] == pytest.approx(0.1414, abs=1e-4)
    assert heavy["eval/vqa/accuracy/to_baseline"] == pytest.approx(-0.1)
    assert frame["eval/vqa/accuracy/to_baseline"].isna().tolist() == [True, False]


def test_a_notebook_shows_the_table_escaped_and_explained():
    records = [replace(RECORDS[0], cell_name="<b>"), RECORDS[2]]
    table = ablation_table(records, {**AXES, "<b>": AXES["cell-full0"]}, baseline=BASELINE)
    page = table._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and "in brackets: difference from the baseline" in page


def test_two_names_of_one_cell_have_a_row_each_and_count_once_in_a_mean():
    axes = {
        f"{schedule},{measure}": {"phases.finetune.schedule": schedule, "compressors.out.measure": measure}
        for schedule in ("full", "out")
        for measure in ("norm", "mean")
    }
    ids = ["one", "one", "two", "three"]
    figures = [(0.5, 10.0), (0.5, 10.0), (0.75, 4.0), (0.25, 4.0)]
    records = [
        replace(record(identity, *figure), cell_name=name)
        for name, identity, figure in zip(axes, ids, figures, strict=True)
    ]
    table = ablation_table(records, axes, baseline=BASELINE)
    assert [row.name for row in table.rows] == list(axes)
    assert [row.against.get("eval/vqa/accuracy") for row in table.rows] == [None, None, 0.25, -0.25]
    assert len(table.to_frame()) == len(table.to_csv().splitlines()) - 1 == 4 and table.warnings == ()
    full, out = ablation_table(records, axes, baseline=BASELINE, mean_over=["compressors.out.measure"]).rows
    assert (full.name, full.cells, full.spread) == ("schedule=full", ("full,norm", "full,mean"), {})
    assert full.marks == ("baseline",) and out.marks == ("2 of 2 cells",)
    assert out.values["eval/vqa/accuracy"] == 0.5 and out.spread["eval/vqa/accuracy"] > 0
    # The same training, tested in two ways, is one cost and two scores.
    records[1] = replace(records[1], summary={**records[1].summary, "eval/vqa/accuracy": 0.7}, tested=("other",))
    full, _ = ablation_table(records, axes, mean_over=["compressors.out.measure"]).rows
    assert full.values["eval/vqa/accuracy"] == pytest.approx(0.6) and set(full.spread) == {
        "eval/vqa/accuracy", "eval/vqa/under_full/accuracy"
    }  # fmt: skip


def test_rows_of_means_name_their_axes():
    axes = {name: {**own, "phases.finetune.learning_rate": 1e-3} for name, own in AXES.items()}
    rows = ablation_table(RECORDS, axes, mean_over=["seed"]).rows
    assert [row.name for row in rows] == ["schedule=full,learning_rate=0.001", "schedule=heavy,learning_rate=0.001"]


def test_drawn_numbers_are_short_on_the_screen_alone():
    axes = {"cell-full0": {"phases.finetune.learning_rate": 0.0035348175755798086}}
    table = ablation_table(RECORDS[:1], axes, shown_axes=tuple(axes["cell-full0"]))
    assert "| 0.003535 |" in table.render("md") and ",0.0035348175755798086," in table.render("csv")


def test_a_wide_table_is_printed_in_parts_and_no_word_is_broken():
    names = [f"eval/vqa/accuracy_{number}_of_many" for number in range(9)]
    made = replace(RECORDS[0], summary=dict.fromkeys(names, 0.5))
    console = Console(file=io.StringIO(), width=72)
    ablation_table([made], AXES, all_metrics=True).print(console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 72 and sum(line.count("0.500") for line in lines) == 9
    words = " ".join(lines).split()
    assert all(words.count(name.rpartition("/")[2]) == 1 for name in names)
    parts = [line for line in lines if line.startswith("cell-full0")]
    assert len(parts) > 1 and [line.split()[-1] for line in parts].count("finished") == 1


def test_what_rounds_to_nothing_has_no_minus():
    moved = [RECORDS[0], record("heavy0", 0.8 - 1e-6, 10 - 1e-6)]
    text = ablation_table(moved, AXES, baseline=BASELINE).render("md")
    assert "(+0.000)" in text and "(+0%)" in text and "-0" not in text.replace("heavy-0", "")


def laid_out(**layout):
    baseline = {"phases.finetune.schedule": "full"}
    table = ablation_table(RECORDS, AXES, mean_over=["seed"], baseline=baseline)
    return replace(table, layout=ReportSpec(baseline=baseline, mean_over=("seed",), **layout))


def test_a_layout_says_words_digits_and_what_is_bold():
    table = laid_out(
        labels={"eval/vqa/accuracy": "VQA_1", "schedule=full": "All tokens", "cost/train_tflops": "cost_%"},
        decimals={"eval/vqa/accuracy": 1, "cost/*": 0},
        bold="best",
    )
    head, full, heavy = (line.split(" & ") for line in table.render("latex").splitlines()[2:6] if "&" in line)
    assert head[:4] == ["cell", r"VQA\_1", "vqa accuracy (full)", r"cost\_\%"]
    assert full[0] == "All tokens" and full[1] == r"\textbf{0.7} $\pm$ 1.3" and full[2].startswith(r"\textbf{0.350}")
    assert heavy[1] == r"0.6 $\pm$ 1.3 (-0.100)" and heavy[3] == r"4 (-60\%)"
    assert "| **0.7** ± 1.3 |" in table.render("md")
    assert "**" not in str(table) and "0.7 ± 1.3" in str(table)
    assert json.loads(table.render("json"))["rows"][0]["metrics"]["eval/vqa/accuracy"] == pytest.approx(0.7)


def test_what_looks_equal_is_equally_bold_and_less_loss_is_better():
    records = [
        replace(one, summary={"eval/held_out/loss": loss, "eval/vqa/accuracy": accuracy})
        for one, loss, accuracy in zip(RECORDS, (0.52, 0.51, 0.7, 0.9), (0.501, 0.499, 0.2, 0.1), strict=True)
    ]
    table = ablation_table(records, AXES, headlines={"held_out": ["loss"]})
    table = replace(table, layout=ReportSpec(decimals={"*": 1}, bold="best"))
    lines = [line.strip("| ").split(" | ")[1:-1] for line in table.to_markdown().splitlines()[2:]]
    assert lines == [["**0.5**", "**0.5**"], ["**0.5**", "**0.5**"], ["0.7", "0.2"], ["0.9", "0.1"]]
