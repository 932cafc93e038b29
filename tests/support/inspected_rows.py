"""An experiment on records of a test's own: what data check and data show look at."""

from __future__ import annotations

import json
from pathlib import Path

from conversations import say
from PIL import Image
from repository import TINY_LLAVA

from orchestrator.plan.experiment_plan import prepare


def write_experiment(folder: Path, records: list, max_length: int = 256, **data) -> Path:
    """Writes an experiment that trains on some records and tests on easy-VQA, and gives its file."""
    for number in range(3):
        Image.new("RGB", (30 + 10 * number, 40), "red").save(folder / f"{number}.png")
    (folder / "data.json").write_text(json.dumps(records))
    mine = {"kind": "llava_json", "data_path": str(folder / "data.json"), "image_folder": ".", **data}
    spec = {
        "schema_version": 1, "name": "look", "cluster": {"storage_path": "runs"},
        "model": {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "float32"},
        "data": {
            "mine": {"conversation_template": "vicuna_v1", **mine},
            "test": {"kind": "easy_vqa", "split": "test", "max_samples": 5},
            "spare": {"kind": "easy_vqa", "split": "train", "max_samples": 3},
        },
        "phases": {"finetune": {
            "data": "mine", "train": ["projector", "language_model"], "max_steps": 1, "global_batch_size": 16,
            "learning_rate": 1e-3, "model_max_length": max_length, "schedule": "full",
        }},
        "evaluate": {"vqa": {"kind": "exact_match", "data": "test"}},
    }  # fmt: skip
    (folder / "look.yaml").write_text(json.dumps(spec))
    return folder / "look.yaml"


def record(number: int, *texts: str, image: str | None = None):
    return {"id": str(number), **({"image": image} if image else {}), "conversations": say(*texts)}


GOOD = [
    record(0, "<image>\nWhat is it?", "A <red> square", image="0.png"),
    record(1, "Two words", "and a longer answer than that of the first row"),
    record(2, "<image>\nAnd?", "So", "Why?", "Because", image="2.png"),
]


def cells(path: Path):
    return prepare(path).cells
