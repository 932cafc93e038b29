"""An experiment without phases whose evaluations are done: what predictions shows."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from repository import TINY_LLAVA

from orchestrator.evaluation.evaluate import evaluate_state
from orchestrator.models.initial_weights import write_initial_weights
from orchestrator.plan.experiment_plan import prepare
from orchestrator.report.pages import predictions_document

ROWS = 30


def write_evaluated(folder: Path) -> Path:
    """An experiment without phases, whose evaluations `vqa` (final, heavy) and `colours` are done; `later` is not."""
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (50, 40), colour).save(folder / f"{number}.png")
    said = [{"from": "human", "value": "<image>\nWhat <color>?"}, {"from": "gpt", "value": "red & blue"}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": said} for n in range(2)]
    records.append({"id": "2", "conversations": [{**said[0], "value": "No picture?"}, said[1]]})
    (folder / "colours.json").write_text(json.dumps(records))
    test = {"kind": "exact_match", "max_new_tokens": 3}
    spec = {
        "schema_version": 1, "name": "tests", "phases": {}, "cluster": {"storage_path": "runs"},
        "model": {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "float32"},
        "data": {
            "test": {"kind": "easy_vqa", "split": "test", "max_samples": ROWS},
            "colours": {"kind": "llava_json", "data_path": "colours.json", "image_folder": "."},
        },
        "compressors": {"heavy": {"kind": "average_pool", "layer": 1, "stride": 8}},
        "evaluate": {
            "vqa": {**test, "data": "test", "under": ["final", "heavy"]},
            "colours": {**test, "data": "colours"},
            "later": {**test, "data": "test", "max_new_tokens": 2},
        },
    }  # fmt: skip
    (folder / "tests.yaml").write_text(json.dumps(spec))
    walk = prepare(folder / "tests.yaml")
    cell, ledger = walk.cells[0], walk.ledger
    write_initial_weights(cell.root, ledger.writing_folder(cell.root.id))
    ledger.commit(cell.root.id)
    for job in cell.evaluations:
        if job.name != "later":
            evaluate_state(job, ledger)
    return folder


def document(folder: Path, *arguments, **options):
    walk = prepare(folder / "tests.yaml")
    return predictions_document(walk, walk.cells[0], *arguments, **options)
