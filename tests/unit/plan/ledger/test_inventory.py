"""`ledger ls` and `ledger verify`: damage found in every byte, and who reaches what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from repository import TINY_LLAVA
from stored import collect, finish, kinds, seal

from orchestrator.plan.experiment_plan import ExperimentPlan, prepare, record_experiment
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.inventory import damage, discard_damage, ledger_document, recorded_experiments


def test_damage_is_found_and_taken_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs")
    for state in ("flipped", "cut", "whole"):
        finish(ledger, state)
    weights = "weights/model.safetensors"
    (ledger.state_folder("flipped") / weights).write_bytes(b"x" * 999 + b"y")
    (ledger.state_folder("cut") / weights).write_bytes(b"x")
    (seal(ledger, "b", 5) / "optim.pt").write_bytes(b"")
    seal(ledger, "b", 6)
    found = damage(ledger)
    assert [(e["kind"], e["id"], e.get("step"), e["files"]) for e in found] == [
        ("state", "cut", None, [weights]),
        ("state", "flipped", None, [weights]),
        ("checkpoint", "b", 5, ["optim.pt"]),
    ]
    assert ledger.is_done("flipped")  # its size is right
    discard_damage(ledger, found)
    assert damage(ledger) == [] and not ledger.is_done("flipped") and ledger.is_done("whole")
    assert [path.name for path in ledger.store.checkpoints("b")] == ["step_000006"]


def test_a_state_whose_curve_lacks_steps_is_damaged(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs")
    for state, steps in (("whole", range(4, 8)), ("cut", range(6, 8))):
        writing = ledger.writing_folder(state)
        text = "".join(json.dumps({"step": step}) + "\n" for step in steps)
        (ledger.work_folder(state) / "metrics.jsonl").write_text(text)
        (writing / "job.json").write_text(json.dumps({"type": "stage", "first_step": 4, "last_step": 8}))
        (writing / "result.json").write_text('{"steps": 4}')
        ledger.commit(state)
    assert damage(ledger) == [{"kind": "state", "id": "cut", "files": ["metrics.jsonl"]}]


@pytest.mark.parametrize("place", ["evaluations/{}.json", "predictions/{}.jsonl.gz", "evaluation_files/{}.json.gz"])
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_damaged_evaluations_are_found_and_taken_out(tmp_path: Path, place: str, how: str) -> None:
    ledger = Ledger(tmp_path / "runs")
    for name in ("whole", "bare", "damaged"):
        more = () if name == "bare" else ([{"row": 0, "answer": "red"}], {"submission.json": b"{}"})
        ledger.write_evaluation(name, {"metrics": {"accuracy": 0.5}}, *more)
    ledger.record_score("damaged", "cider", {"value": 1.0, "source": "elsewhere", "when": 0})
    assert damage(ledger) == []
    key = place.format("damaged")
    file = tmp_path / "runs" / key
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink() if how == "gone" else file.write_bytes(content)
    found = damage(ledger)
    without_result = how == "gone" and place.startswith("evaluations")
    assert found == ([] if without_result else [{"kind": "evaluation", "id": "damaged", "files": [key]}])
    discard_damage(ledger, found)
    assert damage(ledger) == [] and ledger.evaluation("damaged") is None
    assert ledger.predictions("whole") == [{"row": 0, "answer": "red"}] and ledger.predictions("bare") is None
    assert ledger.evaluation_files("whole") == {"submission.json": b"{}"} and ledger.evaluation_files("bare") == {}


EXPERIMENT = """
schema_version: 1
name: small
model: {{model_name_or_path: {model}, weights: random, dtype: float32}}
data: {{train: {{kind: easy_vqa, split: train, max_samples: 80}}}}
compressors: {{heavy: {{kind: average_pool, layer: 2, stride: 8}}}}
phases:
  finetune: {{data: train, max_steps: 8, global_batch_size: 8, per_device_train_batch_size: 8, schedule: heavy}}
matrix: {{phases.finetune.schedule: [full, heavy]}}
"""


def planned(tmp_path: Path, *overrides: str) -> ExperimentPlan:
    model = TINY_LLAVA
    file = tmp_path / "small.yaml"
    file.write_text(EXPERIMENT.format(model=model))
    return prepare(file, [f"cluster.storage_path={tmp_path / 'runs'}", *overrides])


def test_a_record_holds_what_the_plan_reaches_and_ls_tells_by_whom(tmp_path: Path) -> None:
    walk = planned(tmp_path)
    record_experiment(walk)
    ledger = walk.ledger
    for job in walk.tree.work(ledger):
        finish(ledger, job.id, phase=getattr(job, "phase", None), last_step=8)
    finish(ledger, "stray")
    ledger.write_failure("stray", {"error": "diverged\nlong"})
    document = ledger_document(ledger)
    assert [each["name"] for each in document["experiments"]] == ["small"]
    by_id = {entry["id"]: entry for entry in document["states"]}
    assert set(by_id) == {*walk.tree.order, "stray"}
    cell = walk.cells[0]
    assert by_id[cell.state]["cells"] == [cell.name] and by_id[cell.state]["experiments"] == ["small"]
    assert by_id[cell.root.id]["cells"] == [each.name for each in walk.cells]
    assert (by_id["stray"]["cells"], by_id["stray"]["kept"]) == ([], ["weights"])
    assert document["failures"] == [{"id": "stray", "error": "diverged"}]
    assert document["bytes"] == sum(entry["bytes"] for entry in document["states"]) > 4000
    assert kinds(collect(ledger)) == {("state", "stray"), ("failure", "stray")}


def test_a_changed_file_takes_the_place_of_its_record_and_other_settings_do_not(tmp_path: Path) -> None:
    for overrides in ((), ("seed=1",), ()):
        record_experiment(planned(tmp_path, *overrides))
    first, second = recorded_experiments(planned(tmp_path).ledger.store)
    assert first.name == second.name == "small"
    assert first.states.keys().isdisjoint(second.states)  # another seed
