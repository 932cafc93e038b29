"""A latency evaluation from the file to the table: one measurement a variant, sweeps included, with units."""

from __future__ import annotations

import json

from repository import TINY_LLAVA

from orchestrator.evaluation.evaluate import evaluate_state
from orchestrator.models.initial_weights import write_initial_weights
from orchestrator.plan.experiment_plan import prepare
from orchestrator.report.table import table_of


def test_every_variant_is_measured_and_shown_in_its_unit(tmp_path):
    sweep = {"kind": "average_pool", "layer": 1, "stride": [2, 8]}
    measure = {"kind": "latency", "data": "test", "new_tokens": 2, "warmup": 0, "repeats": 2}
    spec = {
        "schema_version": 1, "name": "speed", "phases": {}, "cluster": {"storage_path": "runs"},
        "model": {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "float32"},
        "data": {"test": {"kind": "easy_vqa", "split": "test", "max_samples": 3}},
        "evaluate": {"speed": {**measure, "under": ["full", sweep]}},
    }  # fmt: skip
    (tmp_path / "speed.yaml").write_text(json.dumps(spec))
    plan = prepare(tmp_path / "speed.yaml")
    root = plan.cells[0].root
    write_initial_weights(root, plan.ledger.writing_folder(root.id))
    plan.ledger.commit(root.id)
    for job in plan.cells[0].evaluations:
        evaluate_state(job, plan.ledger)
    plan = prepare(tmp_path / "speed.yaml")
    summary = plan.record(plan.cells[0]).summary
    place = "eval/speed/under_{}/kv_cache_bytes"
    full, half, eighth = (
        summary[place.format(name)] for name in ("full", "average_pool_layer1_stride2", "average_pool_layer1_stride8")
    )
    # Of 64 tokens in three of four layers 32 go, or 56; a token holds keys and values of 64 numbers of 4 bytes.
    assert (full - half, full - eighth) == (3 * 32 * 2 * 64 * 4, 3 * 56 * 2 * 64 * 4)
    mark = plan.record(plan.cells[0]).evaluated["eval/speed/under_full"]
    assert mark["task"] == "latency 1" and mark["batch_size"] == 1 and mark["device"] and mark["threads"]
    text = str(table_of([plan]))
    assert f"{full / 1024:.1f} KiB" in text and f"{half / 1024:.1f} KiB (-{(full - half) / full:.0%})" in text, text
