"""Rows whose images have several sizes, none, one or two a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from orchestrator import registry

SIZES_HW = [(30, 44), (50, 21), (24, 24), (60, 66), (90, 20), (48, 48)]
QUESTIONS = ["what is it?", "which of the shapes is red, and which is blue?", "is there a circle?"]
# An experiment on them; its phase's last lines are the test's.
SIZED = """\
name: sized
model: {model_name_or_path: model, weights: random, dtype: float32}
data:
  train: {kind: llava_json, data_path: rows.json, image_folder: ., conversation_template: chat_template}
compressors:
  half: {kind: average_pool, layer: 1, keep_ratio: 0.5}
phases:
  finetune:
    data: train
    train: [projector, language_model]
    per_device_train_batch_size: 2
    learning_rate: 1.0e-3
"""


def sized_rows(folder: Path) -> Any:
    """Writes a data set of 18 rows and gives its spec."""
    for number, (height, width) in enumerate(SIZES_HW):
        Image.fromarray(np.full((height, width, 3), 40 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    records = []
    for number in range(18):
        shown = [f"{(number + i) % len(SIZES_HW)}.png" for i in range((0, 1, 1, 2)[number % 4])]
        question = "<image>\n" * len(shown) + QUESTIONS[number % 3]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes " * (1 + number % 5)}]
        records.append({"id": str(number), **({"image": shown} if shown else {}), "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(records))
    fields = {"data_path": str(folder / "rows.json"), "image_folder": str(folder)}
    kind = registry.spec_class(registry.DATA, "llava_json")
    return kind.model_validate({"kind": "llava_json", "conversation_template": "chat_template", **fields})
