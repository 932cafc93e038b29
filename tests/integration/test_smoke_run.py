"""`run --smoke` as a user starts it: two phases, a data file, all of it in a storage of its own."""

from __future__ import annotations

import json

import pytest
from mlflow import MlflowClient
from PIL import Image

PRETRAIN = """
  pretrain:
    data: rows
    train: [projector]
    schedule: heavy
    num_train_epochs: 1
    global_batch_size: 32
    per_device_train_batch_size: 8
    learning_rate: 1.0e-3
    model_max_length: 128
"""


def test_every_path_of_the_experiment_runs_small_and_leaves_its_own_storage_alone(llavolta, tmp_path, tiny_text):
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}]
    # Only the first rows' images are there: no other may be needed.
    names = ["red.png"] * 64 + ["later.png"] * 136
    rows = [{"id": str(i), "image": name, "conversations": turns} for i, name in enumerate(names)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    rows_set = "{kind: llava_json, data_path: rows.json, image_folder: ., conversation_template: plain}"
    text = tiny_text.replace("data:\n", f"data:\n  rows: {rows_set}\n")
    text = text.replace("phases:\n", f"phases:{PRETRAIN}").replace("max_steps: 6", "max_steps: 600")
    (tmp_path / "mine.yaml").write_text(text)
    done = llavolta("run", "mine.yaml", "--smoke", "--local", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "numbers mean nothing" in done.stdout and "schedule=two_stage" in done.stdout
    storage = tmp_path / "runs" / "smoke"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["smoke"]
    steps = [path.read_bytes().count(b"\n") for path in storage.glob("stage_runs/*/metrics.jsonl")]
    assert sorted(steps) == [4, 4, 4, 7, 8]  # one epoch of the pretraining all share is 7, then as the tree has it
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], "tags.cell_id != ''")
    assert {run.info.status for run in runs} == {"FINISHED"} and len(runs) == 3
    assert all("eval/vqa/accuracy" in run.data.metrics for run in runs)


@pytest.mark.slow
def test_a_data_file_that_is_not_there_is_told_before_anything_runs(llavolta, tmp_path, tiny_text):
    text = tiny_text.replace(
        "{kind: easy_vqa, split: train, max_samples: 200}", "{kind: llava_json, data_path: a.json}"
    )
    (tmp_path / "mine.yaml").write_text(text)
    done = llavolta("run", "mine.yaml", "--smoke")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{tmp_path / 'a.json'} cannot be read" in done.stderr
