"""`kind: lmms_eval` before anything runs: names, suites, averages, what is refused. No torch, no lmms-eval imported."""

from __future__ import annotations

import json

import pytest
from orchestrator_plugins.benchmarks import suites, tasks
from orchestrator_plugins.benchmarks.spec import LmmsEvalSpec
from repository import TINY_LLAVA

from orchestrator.errors import SpecError, UsageError
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.spec.loader import load_experiment

installed = pytest.mark.skipif(tasks.installed() is None, reason="lmms-eval is not installed")
PAPER = {  # Table 2, single stage, in the order of its columns
    "gqa": 62.6, "mmvet": 31.9, "scienceqa": 70.8, "mme": 1467, "textvqa_val": 58.3, "pope": 86.1,
    "mmbench_en_dev": 65.3, "mmbench_cn_dev": 59.4, "vqav2_test": 78.9, "llava_in_the_wild": 65.5,
    "vizwiz_vqa_test": 49.8, "seedbench": 66.7, "mmmu_val": 35.1,
}  # fmt: skip


def scores(values=PAPER):
    """A table's figures under lmms-eval's names, in lmms-eval's units."""
    names = {name: f"{name}/{suites.SCORES[name].metric}" for name in values}
    units = {name: 1 if name == "mme" else suites.SCORES[name].most / 100 for name in values}
    return {names[name]: value * units[name] for name, value in values.items()}


def load(tmp_path, **spec):
    values = {
        "schema_version": 1, "name": "t", "phases": {},
        "model": {"model_name_or_path": str(TINY_LLAVA), "weights": "random"}, **spec,
    }  # fmt: skip
    (tmp_path / "t.yaml").write_text(json.dumps(values))
    return load_experiment(tmp_path / "t.yaml")


def refusal(tmp_path, **entry) -> str:
    with pytest.raises(SpecError) as raised:
        load(tmp_path, evaluate={"bench": {"kind": "lmms_eval", **entry}})
    return str(raised.value)


def test_the_raw_average_is_the_papers():
    spec = LmmsEvalSpec(suite="llavolta13", average="raw")
    assert spec.summary(scores(), None)["average"] == pytest.approx(61.8, abs=0.05)
    assert spec.summary({**scores(), "gqa/exact_match": 0.0}, None)["average"] < 58, "a score of nothing is a score"


def test_there_is_no_average_without_every_score():
    spec = LmmsEvalSpec(suite="llavolta13", average="raw")
    for name in scores():
        assert spec.summary({key: value for key, value in scores().items() if key != name}, None) == {}
    assert LmmsEvalSpec(suite="llavolta13").summary(scores(), None) == {}


def test_retained_is_the_mean_of_shares_of_the_baseline():
    spec = LmmsEvalSpec(tasks=("gqa", "mme"), average="retained")
    ours, theirs = scores({"gqa": 60.0, "mme": 1450}), scores({"gqa": 62.6, "mme": 1467})
    assert spec.summary(ours, theirs) == {"retained": pytest.approx((60.0 / 62.6 + 1450 / 1467) / 2)}
    assert spec.summary(theirs, theirs) == {"retained": 1.0}
    assert spec.summary(ours, None) == spec.summary(ours, {**theirs, "gqa/exact_match": 0.0}) == {}


def test_an_absent_package_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None if name in ("lmms_eval", "loguru") else name)
    told = refusal(tmp_path, tasks=["pope"])
    assert "not installed: lmms_eval, loguru" in told and "evaluate.bench.kind" in told
    assert "pip install --no-deps lmms-eval==0.7.2" in told and "make benchmarks" in told


@installed
def test_unknown_and_incomplete_tasks_are_refused(tmp_path):
    assert "has no task popee" in (told := refusal(tmp_path, tasks=["popee"])) and "did you mean pope?" in told
    told = refusal(tmp_path, tasks=["docvqa_val"])
    assert "which the installed lmms-eval lacks" in told and "pip install --no-deps git+https" in told
    assert "there is no folder" in refusal(tmp_path, tasks=["pope"], include_path="nowhere")
    assert "either `tasks` or a `suite`" in refusal(tmp_path)
    assert "no average is defined with mmstar" in refusal(tmp_path, tasks=["mmstar"], average="raw")
    assert "add it to `under`" in refusal(tmp_path, suite="llavolta13", average="retained", under="full")


@installed
def test_every_task_of_the_suite_is_one_evaluation_with_the_prompts_of_training(tmp_path):
    data = {"kind": "llava_json", "data_path": "data.json", "num_samples": 64, "image_aspect_ratio": "pad"}
    phase = {
        "train": ["projector"], "schedule": "full", "max_steps": 2, "global_batch_size": 8, "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
    }  # fmt: skip
    sets = {"one": {**data, "conversation_template": "vicuna_v1"}, "two": data}
    spec = {
        "data": sets,
        "evaluate": {"bench": {"kind": "lmms_eval", "suite": "llavolta13", "under": ["final", "full"]}},
    }
    (cell,) = expand_cells(load(tmp_path, phases={"finetune": {**phase, "data": "one"}}, **spec))
    assert len(cell.evaluations) == 26 and len({job.id for job in cell.evaluations}) == 13, "`final` is `full` here"
    first = cell.evaluations[0]
    assert (first.label, first.part, first.place) == ("bench/gqa", "gqa", "eval/bench/gqa")
    assert cell.evaluations[13].place == "eval/bench/under_full/gqa"
    assert (first.spec["conversation_template"], first.spec["image_aspect_ratio"]) == ("vicuna_v1", "pad")
    assert first.spec["tasks"] == ["gqa"] and first.spec["suite"] is None

    with pytest.raises(UsageError, match="differ in conversation_template; set it here"):
        expand_cells(load(tmp_path, phases={"finetune": {**phase, "data": {"one": 1.0, "two": 1.0}}}, **spec))
    spec["evaluate"]["bench"] |= {"average": "retained"}
    with pytest.raises(UsageError, match=r"`report\.baseline` names none"):
        expand_cells(load(tmp_path, phases={"finetune": {**phase, "data": "one"}}, **spec))


@installed
def test_a_task_is_the_same_evaluation_alone_and_in_a_suite(tmp_path):
    entries = {
        "alone": {"kind": "lmms_eval", "tasks": ["pope"], "batch_size": 1},
        "suite": {"kind": "lmms_eval", "suite": "llavolta13"},
        "fewer": {"kind": "lmms_eval", "tasks": ["pope"], "limit": 8},
    }
    (cell,) = expand_cells(load(tmp_path, evaluate=entries))
    found = {job.label: job.id for job in cell.evaluations}
    assert found["alone/pope"] == found["suite/pope"] != found["fewer/pope"]


@installed
def test_own_tasks_are_found_and_counted_by_their_content(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text("task: mine\ninclude: shared\n")
    entry = {"kind": "lmms_eval", "tasks": ["mine"], "include_path": "own"}
    assert "includes shared, which" in refusal(tmp_path, **entry)
    (own / "shared").write_text("dataset_path: nowhere\n")
    ids = []
    for text in ("a = 1\n", "a = 2\n"):
        (own / "utils.py").write_text(text)
        (cell,) = expand_cells(load(tmp_path, evaluate={"bench": entry}))
        ids.append(cell.evaluations[0].id)
    assert len(set(ids)) == 2
    (tmp_path / "elsewhere").symlink_to(own)
    (cell,) = expand_cells(load(tmp_path, evaluate={"bench": {**entry, "include_path": "elsewhere"}}))
    assert cell.evaluations[0].id == ids[-1], "where the folder lies is nothing"
