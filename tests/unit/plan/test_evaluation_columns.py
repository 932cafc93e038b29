"""What evaluations read of a row is part of their identity, and of no state's."""

from __future__ import annotations

import json

import pytest
from evaluated_experiment import TINY_LLAVA
from PIL import Image

from orchestrator.plan.experiment_plan import prepare


def test_columns_move_the_evaluation_and_no_state(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "0.png")
    said = [{"from": "human", "value": "<image>\nRed?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "rows.json").write_text(
        json.dumps([{"image": "0.png", "conversations": said, "category": "random"}] * 4)
    )
    spec = {
        "schema_version": 1,
        "name": "columns",
        "model": {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "float32"},
        "data": {"mine": {"kind": "llava_json", "data_path": "rows.json"}},
        "phases": {"finetune": {"data": "mine", "train": ["projector"], "max_steps": 2, "global_batch_size": 2,
                                "per_device_train_batch_size": 2, "learning_rate": 1e-3, "schedule": "full"}},
        "evaluate": {"pope": {"kind": "pope", "data": "mine"}},
    }  # fmt: skip
    cells = []
    for columns in ({}, {"columns": ["category"]}):
        (tmp_path / "columns.yaml").write_text(
            json.dumps({**spec, "data": {"mine": {**spec["data"]["mine"], **columns}}})
        )
        cells.append(prepare(tmp_path / "columns.yaml").cells[0])
    without, having = cells
    assert without.id == having.id and without.evaluations[0].state == having.evaluations[0].state
    assert without.evaluations[0].id != having.evaluations[0].id
    assert "columns" not in without.evaluations[0].data and having.evaluations[0].data["columns"] == ["category"]


def test_another_column_read_as_the_same_is_another_evaluation(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    rows = [{"q": "Red?", "a": "yes", "first": "one", "second": "two"}] * 4
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columns = {"conversations": None, "image": None, "question": "q", "answer": "a"}
    cells = []
    for category in ("first", "second"):
        spec = {
            "schema_version": 1,
            "name": "columns",
            "model": {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "float32"},
            "data": {"mine": {"kind": "hf_dataset", "data_path": "rows.parquet",
                              "columns": {**columns, "category": category}}},
            "phases": {},
            "evaluate": {"pope": {"kind": "pope", "data": "mine"}},
        }  # fmt: skip
        (tmp_path / "columns.yaml").write_text(json.dumps(spec))
        cells.append(prepare(tmp_path / "columns.yaml").cells[0])
    assert cells[0].id == cells[1].id and cells[0].evaluations[0].id != cells[1].evaluations[0].id
