"""The plan's document and the cells' records: the documented keys and names, from the tree and the ledger alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from repository import ROOT

from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.cell_record import cell_record
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.cost import Sample, parameter_count, train_tflops_per_sample
from orchestrator.plan.documents import plan_document
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.jobs import EvaluationJob, RootJob, StageJob, job_to_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.status import cell_status
from orchestrator.plan.tree import build_stage_tree

COST = ["train_tflops", "visual_layer_tokens", "compression_ratio"]
STATE = {"enum": ["new", "done", "failed", "running"]}
SCHEMA = {
    "type": "object",
    "required": ["experiment", "cells", "stage_runs", "totals"],
    "properties": {
        "cells": {
            "items": {
                "required": ["id", "name", "axes", "state", "stage_runs", "cost", "phases", "reasons"],
                "properties": {"state": STATE, "cost": {"required": COST}},
            }
        },
        "stage_runs": {
            "items": {
                "required": ["id", "parent", "phase", "variant", "first_step", "last_step", "actions", "cells", "state",
                             "cost"],
                "properties": {
                    "parent": {"type": ["string", "null"]},
                    "state": STATE,
                    "cost": {"required": [*COST, "forward_decoder_linear_tflops"]},
                },
            }
        },
        "totals": {
            "required": ["cells", "stage_runs", "train_tflops_alone", "train_tflops_shared", "disk_peak_gib"],
            "additionalProperties": {"type": "number"},
        },
    },
}  # fmt: skip


class Run:
    """A planned experiment of two cells that share their first half, and a ledger."""

    def __init__(self, lab: Any, folder: Path, **changes: Any) -> None:
        stages = [[{"share": "1/2", "compressor": "heavy"}, last] for last in ({}, {"compressor": "wide"})]
        trees = [lab.tree(phases__finetune__schedule={"kind": "stages", "stages": each}, **changes) for each in stages]
        self.loaded = lab.loaded(*trees)
        self.cells = expand_cells(self.loaded)
        self.ledger = Ledger(folder)
        self.tree = build_stage_tree(self.cells, self.ledger)

    def document(self, text_tokens: float | None = 10) -> dict[str, Any]:
        found = plan_document(self.loaded, self.cells, self.tree, self.ledger, text_tokens)
        jsonschema.validate(found, SCHEMA)
        json.dumps(found, allow_nan=False)
        return found

    def finish(self, job: Any) -> None:
        if isinstance(job, EvaluationJob):
            self.ledger.write_evaluation(job.id, {"metrics": {"accuracy": 0.25 if job.points else 0.75}})
            return
        work = self.ledger.writing_folder(job.id)
        (work / "weights").mkdir(parents=True)
        (work / "weights" / "model.safetensors").write_bytes(b"w")
        (work / "job.json").write_text(json.dumps(job_to_json(job)))
        if not isinstance(job, RootJob):
            (work / "checkpoint").mkdir()
            (work / "checkpoint" / "state").write_bytes(b"o")
            result = {"train_seconds": 2.0, "peak_memory_gib": job.last_step / 10, "fingerprint": {
                "world_size": 2, "device": "x86", "torch": "2.13", "micro_batch_size": 4}}  # fmt: skip
            (work / "result.json").write_text(json.dumps(result))
            self.spool(job, job.first_step, job.last_step)
        self.ledger.commit(job.id)

    def spool(self, job: StageJob, first: int, last: int) -> None:
        lines = [
            {"step": s, "timestamp_ms": 1000 + s, "loss": 1 / (s + 1), "learning_rate": 0.1, "step_seconds": 0.5,
             "visual_tokens": 8.0, "samples_per_second": 16.0, "variant": "x"}
            for s in range(first, last)
        ]  # fmt: skip
        file = self.ledger.work_folder(job.id) / "metrics.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "lo')


@pytest.fixture
def run(lab: Any, tmp_path: Path) -> Run:
    return Run(lab, tmp_path / "runs")


def test_a_new_experiment(run: Run) -> None:
    document = run.document()
    assert [cell["state"] for cell in document["cells"]] == ["new", "new"]
    assert [cell["reasons"] for cell in document["cells"]] == [["new"], ["new"]]
    pretrain, heavy, full, wide = document["stage_runs"]
    assert pretrain["parent"] is None and heavy["parent"] == pretrain["id"]
    assert full["parent"] == wide["parent"] == heavy["id"]
    assert [r["variant"] for r in document["stage_runs"]] == ["full", "heavy", "full", "wide"]
    assert wide["actions"] == [[10, 20, "wide"]] and heavy["cells"] == [cell["id"] for cell in document["cells"]]
    assert document["cells"][1]["phases"][1]["schedule"] == [[0, 10, "heavy"], [10, 20, "wide"]]
    assert document["cells"][1]["stage_runs"] == [pretrain["id"], heavy["id"], wide["id"]]
    totals = document["totals"]
    assert (totals["cells"], totals["stage_runs"]) == (2, 4)
    assert totals["train_tflops_alone"] > totals["train_tflops_shared"] > 0


def test_the_disk_holds_what_is_kept_and_two_checkpoints_on_every_lane(lab: Any, tmp_path: Path) -> None:
    disk = {
        lanes: Run(lab, tmp_path / "runs", cluster={"lanes": lanes}).document()["totals"]["disk_peak_gib"] * 2**30
        for lanes in (1, 2, 3, "auto")
    }
    counts = parameter_count(lab.cell().facts)
    weights = 4 * sum(counts.values())
    checkpoint = weights + 12 * (counts["projector"] + counts["language_model"])  # of finetune
    kept = 5 * weights + checkpoint  # the root and four stage runs, and where both cells go on from its checkpoint
    assert disk[1] == kept + 2 * checkpoint
    assert disk[2] == disk["auto"] == kept + 4 * checkpoint  # two cells
    assert disk[3] == kept + 6 * checkpoint


def test_costs_of_tokens_that_depend_on_the_image_are_bounds(lab: Any, tmp_path: Path) -> None:
    clusters = {"kind": "divt", "layer": 2, "stride": 2, "heads": 2}  # at most what `wide` keeps
    train = ["projector", "language_model", "compressor"]
    changes = {"phases__finetune__train": train, "phases__finetune__learning_rate": 1e-3}
    exact = Run(lab, tmp_path / "exact", **changes).document()
    run = Run(lab, tmp_path / "runs", **changes, compressors__wide=clusters)
    document = run.document()
    assert ["at_most" in cell["cost"] for cell in document["cells"]] == [False, True]
    assert [one.get("at_most") for one in document["stage_runs"]] == [None] * 4
    assert ["at_most" in one["cost"] for one in document["stage_runs"]] == [False, False, False, True]
    assert {one["name"]: one.get("at_most") for one in document["variants"]} == {"heavy": None, "wide": True}
    assert "train_ratio" not in document["totals"] and "train_ratio" in exact["totals"]
    assert any("wide: how many tokens it leaves depends on the image" in notice for notice in document["notices"])
    for name in ("visual_layer_tokens", "compression_ratio"):
        assert document["cells"][1]["cost"][name] == exact["cells"][1]["cost"][name]
    assert not any("at_most" in str(cell["cost"]) for cell in exact["cells"])
    for job in run.tree.work(run.ledger):
        run.finish(job)
    full, wide = (cell_record(cell, run.tree, run.ledger) for cell in run.cells)
    assert wide.tags["costs_at_most"] == "true" and "costs_at_most" not in full.tags
    assert wide.summary["cost/visual_layer_tokens"] == document["cells"][1]["cost"]["visual_layer_tokens"]


def test_the_speed_of_a_bound_is_no_one_elses(lab: Any, tmp_path: Path) -> None:
    """A stage run that is counted at its most looks faster than it is: others go by another phase's speed."""
    run = Run(lab, tmp_path / "runs", compressors__heavy={"kind": "divt", "layer": 2, "stride": 8, "heads": 2})
    pretrain, heavy, *rest = run.tree.stage_runs.values()
    for job in run.tree.work(run.ledger):
        if job.id in (run.cells[0].root.id, pretrain.id, heavy.id):
            run.finish(job)
    document = run.document()
    work = {one["id"]: one["cost"]["train_tflops"] for one in document["stage_runs"]}
    left = sum(work[job.id] for job in rest) * 2.0 / work[pretrain.id]  # each took 2 seconds on 2 workers
    assert document["totals"]["gpu_hours_left"] == pytest.approx(2 * left / 3600)


def test_costs_are_the_formula_times_the_steps(run: Run) -> None:
    document, cell = run.document(), run.cells[1]
    facts, plan = cell.facts, cell.phases[1]
    recipe = plan.recipe.model_dump()
    each = [train_tflops_per_sample(facts, action.points, Sample(10, 10), recipe) for action in plan.table]
    heavy, wide = document["stage_runs"][1]["cost"], document["stage_runs"][3]["cost"]
    assert [heavy["train_tflops"], wide["train_tflops"]] == pytest.approx([10 * 8 * one for one in each])
    # 4 layers of 64 tokens, from layer 2 on 8 or 32
    assert [heavy["visual_layer_tokens"], wide["visual_layer_tokens"]] == [144, 192]
    price = document["cells"][1]["cost"]
    assert price["visual_layer_tokens"] == 168 and price["compression_ratio"] == pytest.approx(256 / 168)
    alone = sum(run_["cost"]["train_tflops"] for run_ in document["stage_runs"] if cell.id in run_["cells"])
    assert price["train_tflops"] == pytest.approx(alone)
    shared = sum(run_["cost"]["train_tflops"] for run_ in document["stage_runs"])
    assert document["totals"]["train_tflops_shared"] == pytest.approx(shared)


def test_measured_text_lengths(run: Run, tmp_path: Path) -> None:
    """The rows' own tokens under vicuna_v1: system prompt, question, answer and end."""
    measured, short = run.document(None), run.document(1)
    assert measured["totals"]["train_tflops_shared"] > short["totals"]["train_tflops_shared"]
    assert not any("not at hand" in notice for notice in measured["notices"])
    assert list((tmp_path / "cache" / "llavolta" / "lengths").iterdir())
    assert run.document(None) == measured


def test_lengths_that_are_not_at_hand_are_told(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert any("--text-tokens" in notice for notice in Run(lab, tmp_path / "runs").document(None)["notices"])


def test_a_model_that_is_not_here_has_no_cost(lab: Any, tmp_path: Path) -> None:
    changes = {"model__model_name_or_path": "org/model", "compressors__light__layer": 1}
    found = plan_document(*(lambda r: (r.loaded, r.cells, r.tree, r.ledger))(Run(lab, tmp_path / "runs", **changes)))
    assert found["totals"]["train_tflops_alone"] is None and found["cells"][0]["cost"]["train_tflops"] is None


def test_states_and_reasons_follow_the_ledger(run: Run) -> None:
    work = run.tree.work(run.ledger)
    for job in work[:3]:
        run.finish(job)
    first, second = run.document()["cells"]
    assert first["state"] == second["state"] == "new" and first["reasons"] == ["2 of 3 stage runs are done"]
    wide = run.tree.stage_runs[run.tree.path_of[run.cells[1].id][-1]]
    run.spool(wide, 10, 15)
    (run.ledger.work_folder(wide.id) / "step_000015").mkdir()
    leases = Leases(run.ledger.store, "driver")
    leases.acquire(wide.id, "lane-0")
    assert run.document()["cells"][1]["state"] == "running"
    leases.close()
    assert run.document()["cells"][1]["state"] == "new"
    assert "continues at step 15" in run.document()["cells"][1]["reason"]
    run.ledger.write_failure(wide.id, {"error": "diverged at step 15\ntrace"})
    failed = run.document()["cells"][1]
    assert failed["state"] == "failed" and "failed: diverged at step 15 (--retry-failed" in failed["reason"]
    for job in run.tree.work(run.ledger):
        run.finish(job)
    first, second = run.document()["cells"]
    assert (first["state"], second["state"]) == ("done", "failed")
    assert first["reasons"] == ["done"] and {test["state"] for test in first["evaluations"]} == {"done"}


def test_the_record_of_a_finished_cell(run: Run) -> None:
    for job in run.tree.work(run.ledger):
        run.finish(job)
    full, wide = run.cells
    record = cell_record(wide, run.tree, run.ledger)
    assert record.status == cell_status(wide, run.tree, run.ledger) == "finished"
    scores = {name: value for name, value in record.summary.items() if name.startswith("eval/")}
    under = {"eval/score/under_full/accuracy": 0.75, "eval/score/under_heavy/accuracy": 0.25}
    assert scores == {"eval/score/accuracy": 0.25, **under}
    assert cell_record(full, run.tree, run.ledger).summary["eval/score/accuracy"] == 0.75
    costs = {name.removeprefix("cost/"): v for name, v in record.summary.items() if name.startswith("cost/")}
    assert costs.keys() == {
        "train_tflops", "visual_layer_tokens", "compression_ratio", "train_seconds", "pretrain/train_seconds",
        "finetune/train_seconds", "samples_per_second", "peak_memory_gib",
    }  # fmt: skip
    assert (costs["train_seconds"], costs["pretrain/train_seconds"], costs["finetune/train_seconds"]) == (6, 2, 4)
    assert costs["samples_per_second"] == pytest.approx((10 * 128 + 20 * 8) / 6) and costs["peak_memory_gib"] == 2.0
    losses = [(step, value, stamp) for key, value, step, stamp in record.history if key == "train/loss"]
    steps = [*range(10), *range(20)]
    assert losses == [(i, 1 / (s + 1), 1000 + s) for i, s in enumerate(steps)]
    assert {key for key, *_ in record.history} == {
        "train/loss", "train/learning_rate", "train/visual_tokens", "train/step_seconds"
    }  # fmt: skip
    assert record.tags["cell_id"] == wide.id and record.tags["hardware"] == "2 x x86"
    assert record.tags["versions"] == "torch 2.13" and record.tags["attention"] == "sdpa"
    assert 0.5 < float(record.tags["tree_share"]) < 1 and record.tags["fingerprint.micro_batch_size"] == "4"
    assert yaml.safe_load(str(record.artifacts["cell.yaml"]))["seed"] == 0
    assert json.loads(str(record.artifacts["schedule.json"]))["finetune"][1][:3] == [10, 20, "wide"]
    assert str(record.artifacts["schedule.csv"]).splitlines()[2] == "finetune,0,10,heavy"
    assert record.params["i"] == "1" and record.params["finetune.global_batch_size"] == "8"
    assert all(isinstance(value, str) for value in {**record.params, **record.tags}.values())


def test_a_record_follows_what_was_trained_not_where_the_tree_is_cut_now(lab: Any, run: Run) -> None:
    for job in run.tree.work(run.ledger):
        run.finish(job)
    more = lab.schedules(["heavy", "full"], ["heavy", "wide", "wide", "wide"])
    tree = build_stage_tree(more)
    assert len(tree.path_of[run.cells[0].id]) == 4  # heavy is cut at step 5 now
    before, after = (cell_record(run.cells[0], each, run.ledger) for each in (run.tree, tree))
    assert before.history == after.history and before.summary == after.summary


def test_the_record_of_a_cell_under_way(run: Run) -> None:
    assert cell_record(run.cells[0], run.tree, run.ledger).status == "new"
    work = run.tree.work(run.ledger)
    for job in work[:2]:
        run.finish(job)
    run.spool(work[2], 0, 4)
    assert cell_status(run.cells[0], run.tree, run.ledger) == "interrupted"
    Leases(run.ledger.store, "driver").acquire(work[2].id)
    record = cell_record(run.cells[0], run.tree, run.ledger)
    assert record.status == "running"
    assert [step for key, _, step, _ in record.history if key == "train/loss"] == list(range(14))
    assert not any(name.startswith("cost/") for name in record.summary)


def test_checkpointing_is_counted_and_does_not_decide_what_a_cell_is(lab: Any, tmp_path: Path) -> None:
    plain, again = lab.cell(), lab.cell(phases__finetune__gradient_checkpointing=True)
    costs = Costs(10)
    assert plain.id == again.id
    assert (costs.cell(again)["train_tflops"] or 0) > (costs.cell(plain)["train_tflops"] or 0)


def test_the_7b_experiment_gives_the_papers_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVolta, Tables 2 and 5: decoder TFLOPs, tokens and compression ratio of each fixed layer and stride."""
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
    # Without its benchmarks, which need a package that is not everywhere.
    walk = prepare(ROOT / "experiments" / "llava15_7b" / "fixed.yaml", ["evaluate.bench=null"])
    document = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger, 62)
    found = {
        run["variant"]: (f"{run['cost']['forward_decoder_linear_tflops']:.2f}", run["cost"]["visual_layer_tokens"])
        for run in document["stage_runs"]
    }
    assert found == {
        "full": ("8.26", 18432), "k16_s2": ("6.40", 13824), "k16_s4": ("5.47", 11520), "k16_s8": ("5.00", 10368),
        "k2_s2": ("4.77", 9792), "k2_s4": ("3.02", 5472), "k2_s8": ("2.14", 3312),
    }  # fmt: skip
    ratios = {cell["name"].split(",")[0]: round(cell["cost"]["compression_ratio"], 3) for cell in document["cells"]}
    assert ratios["k2_s8"] == 5.565 and ratios["full"] == 1.0
    assert not (tmp_path / "runs").exists()
