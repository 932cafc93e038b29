"""The report file in a real browser: everything is in it, nothing is asked for, and it says what the table says."""

import json
import math
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import browser, console_errors, needs_browser, requested
from ledger_work import finish_answered
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

import orchestrator as llv
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.jobs import EvaluationJob

# Of 40 questions about 20 pictures.
RIGHT = {"full": 38, "heavy": 10, "two_stage": 37}


def finished(file: Path, right: dict[str, int]) -> ExperimentPlan:
    """Everything of an experiment done: the first `right` answers are, one fewer with seed 1."""

    def said(cell: Cell, job: EvaluationJob) -> list[dict]:
        few = right[cell.axes["phases.finetune.schedule"]] - cell.axes["seed"]
        return [
            {"row": i, "images": [f"{i // 2}.png"], "right": i < few, "question": f"<image>\nWhat {i}?",
             "answer": "red", "expected": "red" if i < few else "blue"}
            for i in range(40)
        ]  # fmt: skip

    finish_answered(prepare(file), said)
    return prepare(file)


@pytest.fixture
def experiment(tmp_path: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
    text = tiny_text.replace("[full, heavy, two_stage]", "[full, heavy, two_stage]\n  seed: [0, 1]")
    file = tmp_path / "tiny.yaml"
    file.write_text(text + "report: {baseline: {phases.finetune.schedule: full}, mean_over: [seed]}\n")
    return file


def test_it_says_which_is_best_and_whether_that_is_sure(experiment: Path) -> None:
    finished(experiment, RIGHT)
    document = llv.load(experiment).report()
    told = document["in_short"]
    table = llv.load(experiment).table()
    full, heavy, two_stage = table.rows
    assert told[0].startswith("Baseline, vqa accuracy (final): schedule=full has 0.938 ± ")
    ratio = two_stage.values["cost/train_tflops"] / full.values["cost/train_tflops"]
    assert 0.75 < ratio < 1 and told[1].startswith("Best with at most 100% of its cost: schedule=two_stage has 0.913")
    assert f"({ratio:.0%}), -0.025, no more than chance" in told[1]
    assert heavy.values["cost/train_tflops"] < 0.75 * full.values["cost/train_tflops"]
    assert told[2].startswith("Best with at most 75%") and "-0.700, more than chance (corrected p " in told[2]
    assert "25% of its cost." in told[3]
    totals = llv.load(experiment).plan()["totals"]
    assert f"{1 - totals['train_ratio']:.0%} of which equal beginnings save" in told[-1]
    # heavy costs least and is surely worse than full; two_stage lies between and is not sure to differ from full.
    names = [row["name"] for row in document["rows"]]
    front = document["fronts"]["eval/vqa/accuracy"]["cost/train_tflops"]
    assert [names[n] for n in front] == ["schedule=heavy", "schedule=two_stage"]


def test_cells_of_the_same_name_are_told_apart(experiment: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        experiment.read_text().replace("name: tiny", "name: other", 1).replace("seed: [0, 1]", "seed: [2, 3]")
    )
    finished(experiment, RIGHT), finished(other, dict.fromkeys(RIGHT, 20))
    rows = llv.load(experiment).report(beside=[llv.load(other)])["rows"]
    assert len(rows) == 6
    for row in rows:
        own = [cell["values"]["eval/vqa/accuracy"] for cell in row["cells"]]
        assert sum(own) / len(own) == pytest.approx(row["values"]["eval/vqa/accuracy"])
    assert [row["cells"][0]["values"]["eval/vqa/accuracy"] for row in rows] == [0.95, 0.25, 0.925, 0.45, 0.45, 0.45]


def test_a_loss_that_diverged_is_left_out(experiment: Path) -> None:
    plan = finished(experiment, RIGHT)
    job = next(iter(plan.tree.stage_runs.values()))
    file = plan.ledger.metrics_file(job.id)
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), "loss": math.nan}), *rest]) + "\n")
    page = llv.load(experiment).report().to_html()
    data = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    points = [p for curve in json.loads(data)["curves"]["train/loss"] for p in curve["points"]]
    assert [0, 1.0] in points and sum(point[0] == 0 for point in points) == 5, "the sixth cell begins at step 1"


@needs_browser
def test_the_file_works_alone(experiment: Path, tmp_path: Path, llavolta) -> None:
    finished(experiment, RIGHT)
    done = llavolta("report", experiment, "-o", "report.html")
    assert done.returncode == 0 and "Baseline, vqa accuracy" in done.stdout, done.stderr
    with browser(500, 900, dark=True) as page:
        page.get((tmp_path / "report.html").as_uri())
        assert page.find_element(By.TAG_NAME, "body").get_attribute("data-drawn") == "yes"
        assert {urlsplit(url).scheme for url in requested(page)} == {"file"} and not console_errors(page)
        width = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], "a phone scrolls it in one direction only"
        dark = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert dark == "rgb(13, 17, 23)"
        assert page.execute_script("return document.getElementById('scatter')._fullLayout.font.color") == "#e6edf3"

        shown = page.find_element(By.ID, "in-short").text
        assert all(sentence in shown for sentence in llv.load(experiment).report()["in_short"])

        points = page.execute_script(
            "return document.getElementById('scatter').data.filter((t) => t.error_y)"
            ".map((t) => [t.name, t.y[0], t.error_y.array[0]])"
        )
        table = llv.load(experiment).table()
        expected = [
            [["full", "heavy", "two_stage"][n], row.values["eval/vqa/accuracy"], row.ci95["eval/vqa/accuracy"]]
            for n, row in enumerate(table.rows)
        ]
        assert points == expected

        drawn = page.execute_script("return document.getElementById('tree').data.flatMap((t) => t.hovertext)")
        runs = llv.load(experiment).plan()["stage_runs"]
        assert len(drawn) == len(runs) and sum("shared by 2 cells" in text for text in drawn) == 2

        # By keyboard alone: another score, and the table in order of it.
        select = page.find_element(By.ID, "score")
        select.send_keys(Keys.ARROW_DOWN)
        assert Select(select).first_selected_option.text == "vqa accuracy (full)"
        assert (
            page.execute_script("return document.getElementById('scatter')._fullLayout.yaxis.title.text")
            == "vqa accuracy (full)"
        )
        head = page.find_element(By.XPATH, "//th[button[text()='vqa accuracy (final)']]")
        head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
        assert head.get_attribute("aria-sort") == "ascending"
        assert first_cells(page) == ["schedule=heavy", "schedule=two_stage", "schedule=full"]
        head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
        assert first_cells(page) == ["schedule=full", "schedule=two_stage", "schedule=heavy"]

        answers = page.find_element(By.CSS_SELECTOR, "#answers summary")
        assert answers.text == "schedule=full: vqa, 2 of 40 wrong (schedule=full,seed=0)"
        answers.send_keys(Keys.ENTER)
        assert "What 38?" in page.find_element(By.ID, "answers").text


def first_cells(page) -> list[str]:
    return [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#table tbody td:first-child")]


@needs_browser
def test_an_experiment_of_which_nothing_is_done_has_a_report(experiment: Path, tmp_path: Path, llavolta) -> None:
    done = llavolta("report", experiment, "-o", "report.html")
    assert done.returncode == 0 and "0 of 3 rows finished" in done.stdout, done.stderr
    with browser() as page:
        page.get((tmp_path / "report.html").as_uri())
        assert page.find_element(By.TAG_NAME, "body").get_attribute("data-drawn") == "yes"
        assert not console_errors(page) and len(first_cells(page)) == 3
