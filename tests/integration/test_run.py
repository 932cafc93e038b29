"""The whole walk as a user starts it: real Ray, DeepSpeed, MLflow and easy-VQA, without a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from program import run_anew, run_forked

CELLS = 3
STAGE_RUNS = 4
EVALUATIONS = 4  # `final` and `full` are one where the last stage is on full tokens


def runs_in_mlflow(storage: Path, experiment: str) -> list:
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id], "tags.cell_id != ''")


def family_of(marker: str) -> list[psutil.Process]:
    """Processes started with this value in their environment, the test itself left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("LLAVOLTA_TEST") == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_text):
    """The tiny experiment, run once on Ray in a folder of its own."""

    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(tiny_text)
    return folder, run_anew(["run", "tiny.yaml"], folder, LLAVOLTA_TEST=str(folder))


def test_a_run_ends_with_the_table_and_the_line_that_opens_mlflow(finished):
    _, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("cell") and "vqa accuracy (final)" in line and "CR" in line for line in lines)
    assert sum(line.rstrip().endswith(("finished", "finished (baseline)")) for line in lines) == CELLS
    assert "mlflow server --backend-store-uri sqlite:///" in lines[-1]
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr, done.stderr


def test_no_process_stays_behind(finished):
    folder, _ = finished
    assert family_of(str(folder)) == []


def test_the_ledger_holds_each_stage_run_once(finished):
    folder, _ = finished
    stage_runs = [p for p in (folder / "runs" / "stage_runs").iterdir() if (p / "metrics.jsonl").exists()]
    assert len(stage_runs) == STAGE_RUNS
    assert len(list((folder / "runs" / "evaluations").iterdir())) == EVALUATIONS
    assert not list((folder / "runs" / "work").rglob("metrics.jsonl"))


def test_mlflow_has_a_run_a_cell_with_the_names_of_the_contract(finished):
    folder, _ = finished
    runs = runs_in_mlflow(folder / "runs", "tiny")
    assert len(runs) == CELLS
    two_stage = next(run for run in runs if "two_stage" in run.info.run_name)
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = set(two_stage.data.metrics)
    assert names >= {
        "train/loss", "train/learning_rate", "train/visual_tokens", "train/step_seconds", "eval/vqa/accuracy",
        "cost/train_tflops", "cost/visual_layer_tokens", "cost/compression_ratio", "cost/train_seconds",
        "cost/finetune/train_seconds", "cost/samples_per_second", "cost/peak_memory_gib",
    }  # fmt: skip
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    history = client.get_metric_history(two_stage.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(6))
    assert len({run.data.tags["cell_id"] for run in runs}) == CELLS
    heavy = next(run for run in runs if "heavy" in run.info.run_name)
    assert "eval/vqa/under_full/accuracy" in heavy.data.metrics
    artifacts = {entry.path for entry in client.list_artifacts(heavy.info.run_id)}
    assert artifacts >= {"cell.yaml", "schedule.csv", "training.png"}


def test_cells_that_begin_alike_share_their_first_steps(finished):
    folder, _ = finished
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    losses = {}
    for run in runs_in_mlflow(folder / "runs", "tiny"):
        history = client.get_metric_history(run.info.run_id, "train/loss")
        losses[run.info.run_name] = [point.value for point in sorted(history, key=lambda point: point.step)]
    heavy = next(value for name, value in losses.items() if "heavy" in name)
    staged = next(value for name, value in losses.items() if "two_stage" in name)
    full = next(value for name, value in losses.items() if "full" in name)
    assert heavy[:3] == staged[:3] and heavy[3:] != staged[3:] and full[0] != heavy[0]


def test_a_second_run_has_nothing_to_do_and_starts_neither_ray_nor_mlflow(finished):
    folder, first = finished
    code = (
        "import sys; sys.argv = ['llavolta', 'run', 'tiny.yaml']\nfrom orchestrator.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    # pytest's readline puts COLUMNS into the process' environment behind Python's back.
    again = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert "nothing to do" in again.stdout and again.stdout.splitlines()[-1] == "[]"
    rows = [line for line in first.stdout.splitlines() if "finished" in line and re.search(r"\d\.\d", line)]
    assert [line for line in again.stdout.splitlines() if "finished" in line and re.search(r"\d\.\d", line)] == rows


def test_status_table_logs_and_path_read_the_same_ledger(finished):
    folder, _ = finished

    def call(*arguments: str) -> str:
        done = run_forked(arguments, folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    status = json.loads(call("status", "tiny.yaml", "--json"))
    assert [(cell["state"], cell["steps_done"], cell["steps"]) for cell in status["cells"]] == [("finished", 6, 6)] * 3
    table = json.loads(call("table", "tiny.yaml", "--json"))
    assert all(0 <= row["metrics"]["eval/vqa/accuracy"] <= 1 for row in table["rows"])
    weights = Path(call("path", "tiny.yaml", "--cell", "schedule=heavy").strip())
    assert (weights / "model.safetensors").stat().st_size > 100_000
    assert call("logs", "tiny.yaml", "--cell", "schedule=heavy").strip()


def test_a_lost_mlflow_file_is_written_again_and_runs_nobody_works_on_are_ended(finished, tmp_path):
    folder, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    before = {run.info.run_name: run.data.metrics for run in runs_in_mlflow(folder / "runs", "tiny")}
    (copy / "runs" / "mlflow.db").unlink()
    assert run_forked(["run", "tiny.yaml"], copy).returncode == 0
    runs = runs_in_mlflow(copy / "runs", "tiny")
    assert {run.info.run_name: run.data.metrics for run in runs} == before
    # A cell that is no longer in the file, whose driver was killed; and nothing else to record.
    client = MlflowClient(f"sqlite:///{copy / 'runs' / 'mlflow.db'}")
    driver = json.loads(runs[0].data.tags["storage_driver"])  # that of the command above, which has ended
    tags = {"cell_id": "gone", "storage_driver": json.dumps(driver)}
    left = client.create_run(runs[0].info.experiment_id, tags=tags).info.run_id
    again = run_forked(["run", "tiny.yaml"], copy)
    assert again.returncode == 0 and "nothing to do" in again.stdout and client.get_run(left).info.status == "KILLED"


def test_local_gives_the_same_weights_without_ray(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "tiny.yaml").write_text((folder / "tiny.yaml").read_text())
    done = run_forked(["run", "tiny.yaml", "--local"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for weights in (folder / "runs" / "cells" / "tiny").glob("*/weights/model.safetensors"):
        assert (tmp_path / weights.relative_to(folder)).read_bytes() == weights.read_bytes()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.model_name_or_path=./no-such-folder", "no-such-folder"),
        ("cluster.num_workers=64", "64"),
        pytest.param("cluster.lanes=64", "64 lanes do not fit", marks=pytest.mark.slow),
        ("phases.finetune.schedule=nobody", "nobody"),
    ],
)
def test_what_cannot_run_is_refused_in_one_block(llavolta, tiny_experiment, setting, told):
    text = tiny_experiment.read_text().replace("matrix:\n  phases.finetune.schedule: [full, heavy, two_stage]\n", "")
    tiny_experiment.write_text(text)
    done = llavolta("run", tiny_experiment, "--set", setting)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr
