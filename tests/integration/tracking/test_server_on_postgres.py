"""A tracking server as a cluster has one: PostgreSQL behind it, artifacts in a bucket that only the server can read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser import browser, needs_browser
from mlflow import MlflowClient
from mlflow_servers import free_port, mlflow_server
from postgres import needs_postgres, postgres
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from tracked_grid import ACCURACY, printed_address

SECONDS = 120


@pytest.mark.slow
@needs_postgres
@needs_browser
def test_cells_summary_artifacts_and_models_are_there_and_the_page_shows_them(
    tmp_path: Path, tiny_text: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    objects = boto3.client("s3")
    with (
        postgres() as store,
        mlflow_server(tmp_path, free_port(), f"postgresql+psycopg2{store[10:]}", f"{bucket}/mlflow") as server,
    ):
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)  # a driver has no keys of the bucket
        monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        address = printed_address(tmp_path, tiny_text, "on_postgres")
        client = MlflowClient(server)
        experiment = client.get_experiment_by_name("on_postgres")
        runs = client.search_runs([experiment.experiment_id], "tags.cell_id != ''")
        assert {run.info.run_name: run.data.metrics["eval/vqa/accuracy"] for run in runs} == ACCURACY
        assert all(run.info.status == "FINISHED" and len(run.inputs.dataset_inputs) == 2 for run in runs)
        curve = client.get_metric_history(runs[0].info.run_id, "train/loss")
        assert [point.value for point in curve] == [1 / (step + 1) for step in range(6)]
        models = client.search_logged_models([experiment.experiment_id])
        assert {model.source_run_id for model in models} == {run.info.run_id for run in runs} and len(models) == 4
        (summary,) = client.search_runs([experiment.experiment_id], "tags.summary_of != ''")
        assert summary.info.artifact_uri.startswith("mlflow-artifacts:")
        read = Path(client.download_artifacts(summary.info.run_id, "", str(tmp_path)))
        assert {"experiment.yaml", "grid.png", "report.html", "table.json"} <= {file.name for file in read.iterdir()}
        listed = objects.list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix="mlflow/")["Contents"]
        sizes = {
            entry["Key"].rpartition("/")[2]: entry["Size"] for entry in listed if summary.info.run_id in entry["Key"]
        }
        assert sizes == {name: (read / name).stat().st_size for name in sizes} and "report.html" in sizes
        with browser(2200, 1000) as page:
            page.get(address)
            values = [*ACCURACY, *map(str, ACCURACY.values())]

            def shows_all(_: object) -> bool:
                text = page.find_element(By.TAG_NAME, "body").text
                return all(value in text for value in values)

            WebDriverWait(page, SECONDS).until(shows_all, "a cell or its accuracy is not on the page")
            page.save_screenshot(str(tmp_path / "page.png"))
