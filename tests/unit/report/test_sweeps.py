"""Sweeps in the table: a table of their own, intervals by question and by seed, tests against full tokens."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from ledger_work import finish_answered
from rich.console import Console

from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.report.figures import grid_figure, sweep_figure
from orchestrator.report.statistics import compare, mean_interval, score_interval
from orchestrator.report.table import table_of

SWEEP = "[full, {kind: average_pool, layer: [1, 2], stride: [2, 8]}]"
# Of 40 questions about 20 pictures; a stride of 8 loses eight pictures before layer 1, one question before layer 2.
RIGHT = {
    "full": [1] * 38 + [0] * 2,
    "layer1_stride8": [0] * 16 + [1] * 22 + [0] * 2,
    "layer2_stride8": [0] + [1] * 37 + [0] * 2,
}


def swept(folder: Path, text: str, under: str = SWEEP, seeds: str = "[0]") -> ExperimentPlan:
    """The full-token cells of some seeds, everything done; seed s has its last s questions wrong."""
    file = folder / "swept.yaml"
    text = text.replace("under: [final, full]", f"under: {under}").replace(
        "[full, heavy, two_stage]", f"[full]\n  seed: {seeds}"
    )
    file.write_text(text + "report: {mean_over: [seed]}\n")
    plan = prepare(file)
    finish_answered(plan, lambda cell, job: records(job.under, cell.axes["seed"]))
    return prepare(file)


def records(variant: str, seed: int = 0) -> list[dict]:
    right = RIGHT.get(variant.removeprefix("average_pool_"), RIGHT["full"])
    right = right[: 38 - 2 * seed] + [0] * (2 + 2 * seed)
    return [{"row": i, "images": [f"{i // 2}.png"], "right": bool(one)} for i, one in enumerate(right)]


@pytest.fixture(autouse=True)
def _storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))


def test_one_model_is_judged_by_its_questions(tmp_path: Path, tiny_text: str) -> None:
    table = table_of([swept(tmp_path, tiny_text)])
    (sweep,) = table.sweeps
    assert [dict(score.values) for score in sweep.scores] == [
        {},
        *({"kind": "average_pool", "layer": layer, "stride": stride} for layer in (1, 2) for stride in (2, 8)),
    ]
    full, _, worst, _, other = sweep.scores
    by_question = score_interval(records("full"))
    assert by_question is not None and full.ci95 == pytest.approx(by_question.high - 0.95) and full.test is None
    # One of 20 pictures is wrong: 0.95, with a standard error of sqrt(0.05 * 0.95 / 19) = 0.05.
    assert full.ci95 == pytest.approx(2.093024 * 0.05, rel=1e-6)
    assert worst.to_full == pytest.approx(-0.4) and worst.test == compare(
        [records("average_pool_layer1_stride8")], [records("full")]
    )
    assert worst.p_corrected == pytest.approx(4 * worst.test.p_value) and worst.p_corrected < 0.05 < other.p_corrected

    printed = Console(file=io.StringIO(), width=200)
    table.print(printed)
    lines = printed.file.getvalue().splitlines()
    assert lines[0].split()[:5] == ["cell", "vqa", "accuracy", "(full)", "train"] and "stride8" not in lines[0]
    assert [line.split()[1:] for line in lines if line.split()[2:4] == ["1", "8"]] == [
        ["average_pool", "1", "8", "34%", "0.550", "±", f"{worst.ci95:.3f}", "(-0.400", "*)"]
    ]
    assert "corrected for 4 tests" in printed.file.getvalue() and "questions, by image" in str(table.explanations())
    assert "eval/vqa/under_average_pool_layer1_stride8/accuracy" in table.render("csv").splitlines()[0]
    document = json.loads(table.render("json"))["sweeps"][0]
    assert document["scores"][2]["values"] == {"kind": "average_pool", "layer": 1, "stride": 8}
    # 64 tokens in the layer before, 8 in the three behind.
    assert document["scores"][2]["token_share"] == (64 + 3 * 8) / 256 and document["scores"][0]["token_share"] == 1
    assert document["scores"][2]["test"]["images"] == 20 and document["cells"] == list(table.rows[0].cells)
    for form in ("md", "latex"):
        assert table.render(form).count("0.550") == 1
    assert table._repr_html_().count("<table>") == 2


def test_several_seeds_are_judged_by_their_spread(tmp_path: Path, tiny_text: str) -> None:
    (sweep,) = table_of([swept(tmp_path, tiny_text, seeds="[0, 1, 2]")]).sweeps
    interval = mean_interval([0.95, 0.9, 0.85])
    full, _, worst, *_ = sweep.scores
    assert full.ci95 == pytest.approx(interval.high - interval.mean) and full.std == pytest.approx(0.05)
    assert (worst.test.seeds, worst.test.images) == (3, 20) and len(sweep.cells) == 3


def test_what_cannot_be_judged_has_no_interval_and_no_mark(tmp_path: Path, tiny_text: str) -> None:
    plan = swept(tmp_path, tiny_text, under="{kind: average_pool, layer: 1, stride: [2, 8]}")
    (sweep,) = table_of([plan]).sweeps
    assert [score.to_full for score in sweep.scores] == [None, None]  # full was not tested
    said = [{"row": i, "images": ["a.png"], "right": True} for i in range(40)]
    assert (
        score_interval(said) is None
        and score_interval([{**one, "images": [str(i)]} for i, one in enumerate(said)]) is None
    )


def test_its_figure_is_drawn_along_what_varies(tmp_path: Path, tiny_text: str) -> None:
    table = table_of([swept(tmp_path, tiny_text)])
    (sweep,) = table.sweeps
    assert sweep.along == "stride"
    assert sweep_figure([sweep], tmp_path / "sweep.png") and (tmp_path / "sweep.png").stat().st_size > 10_000
    assert grid_figure(table, "t", tmp_path / "grid.png")
    (one,) = table_of([swept(tmp_path, tiny_text, under="[full, {kind: average_pool, layer: 1, stride: 8}]")]).sweeps
    many = [replace(sweep, row=f"row {number}") for number in range(25)]
    assert not sweep_figure(many, tmp_path / "none.png") and sweep_figure(many[:5], tmp_path / "five.png")
    assert one.along is None and not sweep_figure([one], tmp_path / "none.png") and not (tmp_path / "none.png").exists()
