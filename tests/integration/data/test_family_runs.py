"""A whole run of every model family whose processor is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from family_folders import FOLDERS, write_folder

# What their processors ask for in transformers, where it is not installed.
NEEDS = {
    family: package
    for family, package in {"smolvlm": "num2words", "mistral3": "torchvision"}.items()
    if find_spec(package) is None
}


EXPERIMENT = """
schema_version: 1
name: tiny
model: {model_name_or_path: model, weights: random, dtype: float32}
data:
  train: {kind: easy_vqa, split: train, max_samples: 64}
  test: {kind: easy_vqa, split: test, max_samples: 12}
compressors:
  half: {kind: average_pool, layer: 1, keep_ratio: 0.5}
phases:
  finetune:
    data: train
    train: [vision_tower, projector, language_model]
    max_steps: 2
    global_batch_size: 4
    per_device_train_batch_size: 2
    learning_rate: 1.0e-3
    model_max_length: 512
    deepspeed: zero0
evaluate:
  vqa: {kind: exact_match, data: test, under: [final, full]}
matrix:
  phases.finetune.schedule: [half]
"""


@pytest.mark.parametrize(
    "family", [family if family == "qwen2_5_vl" else pytest.param(family, marks=pytest.mark.slow) for family in FOLDERS]
)
def test_a_whole_run(family, tmp_path, llavolta):
    if family in NEEDS:
        pytest.skip(f"its processor needs {NEEDS[family]}")
    write_folder(family, tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    done = llavolta("run", "tiny.yaml", "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finetune steps 0-2 under half (loss" in done.stdout
    table = next(line for line in done.stdout.splitlines() if line.startswith("schedule=half  "))
    assert table.split()[-1] == "finished" and 0 <= float(table.split()[1]) <= 1
