"""The printed address in a real dashboard: cells, values and charts are there without a click."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browser, needs_browser
from mlflow import MlflowClient
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from tracked_grid import ACCURACY, printed_address

from orchestrator.tracking.mlflow_views import CURVES, SCATTER, SUMMARY

SECONDS = 60


@pytest.fixture(scope="module")
def printed(server: str, tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Iterator[str]:
    """The address that a finished grid of two schedules and two seeds prints at its end."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("dashboard")
        patch.setenv("LLAVOLTA_STORAGE", str(folder / "runs"))
        patch.setenv("MLFLOW_TRACKING_URI", server)
        yield printed_address(folder, tiny_text, "dashboard")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Chrome]:
    with browser(2200, 1000) as driver:
        yield driver
        driver.save_screenshot(str(tmp_path / "page.png"))


def shown(page: Chrome) -> str:
    return page.find_element(By.TAG_NAME, "body").text


def wait_for(page: Chrome, text: str) -> None:
    WebDriverWait(page, SECONDS).until(lambda page: text in shown(page), f"no {text} on the page")


@needs_browser
def test_the_printed_address_shows_axes_accuracy_and_cost_of_every_cell(page: Chrome, printed: str) -> None:
    page.get(printed)
    wait_for(page, "0.8125")
    text = shown(page)
    assert all(name in text and str(value) in text for name, value in ACCURACY.items())
    assert all(f"Group: {name}" in text for name in ("full", "heavy"))
    assert {"0.75 (average)", "0.5 (average)"} <= set(text.split("\n"))
    heads = {head.text for head in page.find_elements(By.CSS_SELECTOR, ".ag-header-cell")}
    assert heads >= {
        *("finetune.schedule", "seed", "eval/vqa/accuracy", "eval/vqa/under_full/accuracy"),
        *("cost/train_tflops", "cost/compression_ratio", "cost/train_seconds"),
    }
    assert "phases.finetune.schedule" not in heads
    assert "summary" not in text.split("\n"), "the run of the experiment as a whole is no cell"


def test_the_description_has_the_table_and_what_the_tree_saved(printed: str) -> None:
    client = MlflowClient(printed.partition("/#/")[0])
    experiment = client.get_experiment_by_name("dashboard")
    note = experiment.tags["mlflow.note.content"]
    assert len(note) < 5000 and "| schedule=heavy,seed=1 |" in note and "0.438" in note
    assert "Stage tree: 24 optimizer steps for 24 alone." in note
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'schedule=heavy,seed=1'")
    assert "| finetune | 0 to 6 | heavy |" in run.data.tags["mlflow.note.content"]
    assert run.info.end_time - run.info.start_time == 1000 * run.data.metrics["cost/train_seconds"]


@needs_browser
def test_the_second_view_draws_accuracy_against_cost_with_the_mean_over_seeds(page: Chrome, printed: str) -> None:
    page.get(printed.replace("viewStateShareKey=cells", f"viewStateShareKey={SCATTER}&compareRunsMode=CHART"))
    wait_for(page, "cost/train_tflops vs. eval/vqa/accuracy")
    assert "final values" in shown(page)
    points = "return [...document.querySelectorAll('.js-plotly-plot')].map(each => each.data.map(d => [d.x, d.y]))"
    WebDriverWait(page, SECONDS).until(lambda page: page.execute_script(points))
    ((xs, ys), *_) = page.execute_script(points)[0]
    assert sorted(ys) == [0.5, 0.75] and xs[ys.index(0.5)] < xs[ys.index(0.75)]


@needs_browser
def test_the_third_view_draws_the_loss_over_steps(page: Chrome, printed: str) -> None:
    page.get(printed.replace("viewStateShareKey=cells", f"viewStateShareKey={CURVES}&compareRunsMode=CHART"))
    wait_for(page, "train/loss")
    curves = "return [...document.querySelectorAll('.js-plotly-plot')].map(each => each.data.map(d => d.y))[0]"
    loss = [1 / (step + 1) for step in range(6)]
    WebDriverWait(page, SECONDS).until(lambda page: loss in (page.execute_script(curves) or []))


@needs_browser
def test_the_fourth_view_has_the_summary_whose_page_shows_table_and_report(page: Chrome, printed: str) -> None:
    page.get(printed.replace("viewStateShareKey=cells", f"viewStateShareKey={SUMMARY}"))
    WebDriverWait(page, SECONDS).until(lambda page: page.find_elements(By.LINK_TEXT, "summary"))
    assert "schedule=heavy,seed=1" not in shown(page)
    address = page.find_element(By.LINK_TEXT, "summary").get_attribute("href")
    page.get(address)
    wait_for(page, "The experiment as a whole, not a cell.")
    wait_for(page, "schedule=full,seed=0")
    page.get(f"{address}/artifacts/table.json")
    wait_for(page, "0.4375")
    assert {"schedule=heavy,seed=1", "heavy", "full"} <= set(shown(page).split("\n"))
    page.get("about:blank")  # else it stays at the file that it shows
    page.get(f"{address}/artifacts/report.html")
    frame = WebDriverWait(page, SECONDS).until(lambda page: page.find_elements(By.TAG_NAME, "iframe"))
    page.switch_to.frame(frame[0])
    wait_for(page, "In short")
