"""Data sets as inputs of a cell's run, and one logged model for its kept state: once, and never twice after a kill."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from cell_tracker import Tracker
from ledger_work import finish
from mlflow_servers import Gate
from rich.console import Console

from orchestrator.plan.cell_record import CellRecord, KeptState, UsedData
from orchestrator.plan.experiment_plan import prepare
from orchestrator.run import run_experiment
from orchestrator.tracking.mlflow_state import MODEL, NO_MODELS, has_record, read_state

TRAIN = UsedData("train", "d" * 36, "llava_json", '{"data_path": "/data/train.json"}', ("training",))
TEST = UsedData("test", "e" * 36, "llava_json", '{"data_path": "/data/test.json"}', ("evaluation",))
RECORD = CellRecord(
    "c" * 64,
    "keep=0.5,schedule=a/b",
    "finished",
    params={"keep": "0.5"},
    history=tuple(("train/loss", 1.0, step, 1_700_000_000_000 + step) for step in range(10)),
    summary={"eval/vqa/accuracy": 0.5, "cost/train_seconds": 2.0},
    last_step=9,
    data=(TRAIN, TEST),
    kept=KeptState("s" * 64, "/storage/stage_runs/s/weights"),
)


@pytest.fixture(params=["sqlite", "server"])
def tracker(request: pytest.FixtureRequest, database: Path) -> Tracker:
    uri = request.getfixturevalue("server") if request.param == "server" else f"sqlite:///{database}"
    return Tracker(uri, request.node.name)


def again(tracker: Tracker) -> Tracker:
    """As the next `run` has it."""
    return Tracker(tracker._uri, tracker._experiment_name)


def models(tracker: Tracker) -> list[Any]:
    return list(tracker._client().search_logged_models([tracker.experiment()]))


def metrics_of(model: Any) -> dict[str, float]:
    return {metric.key: metric.value for metric in model.metrics}


def test_a_run_has_its_data_and_a_model_that_says_where_the_weights_are(tracker: Tracker) -> None:
    run_id = tracker.log(RECORD)
    run = tracker._client().get_run(run_id)
    found = {each.dataset.name: each for each in run.inputs.dataset_inputs}
    assert {name: each.dataset.digest for name, each in found.items()} == {"train": "d" * 36, "test": "e" * 36}
    assert found["train"].dataset.source_type == "llava_json" and found["train"].dataset.source == TRAIN.source
    assert {name: each.tags[0].value for name, each in found.items()} == {"train": "training", "test": "evaluation"}
    (model,) = models(tracker)
    assert (model.name, model.source_run_id, str(model.status)) == ("keep=0_5,schedule=a_b", run_id, "READY")
    assert model.tags["weights"] == "/storage/stage_runs/s/weights" and model.tags["state"] == "s" * 64
    assert model.params == {"keep": "0.5"} and metrics_of(model) == RECORD.summary
    assert [each.model_id for each in run.outputs.model_outputs] == [model.model_id]


def test_once_more_sends_nothing_and_a_new_score_is_the_models_too(tracker: Tracker) -> None:
    tracker.log(RECORD)
    state = read_state(tracker._uri, tracker._experiment_name)
    assert state is not None and has_record(state.runs[RECORD.cell_id], RECORD)
    better = dataclasses.replace(RECORD, summary={**RECORD.summary, "eval/gqa/accuracy": 0.25})
    again(tracker).log(better)
    (model,) = models(tracker)
    assert metrics_of(model) == better.summary


def test_a_driver_killed_before_it_noted_them_leaves_no_twins(tracker: Tracker) -> None:
    run_id = tracker.log(RECORD)
    client = tracker._client()
    for tag in (MODEL, "data_sha256"):
        client.delete_tag(run_id, tag)
    state = read_state(tracker._uri, tracker._experiment_name)
    assert state is not None and not has_record(state.runs[RECORD.cell_id], RECORD)
    again(tracker).log(RECORD)
    (model,) = models(tracker)
    assert client.get_run(run_id).data.tags[MODEL] == model.model_id and metrics_of(model) == RECORD.summary
    assert len(client.get_run(run_id).inputs.dataset_inputs) == 2
    assert len(client.get_metric_history(run_id, "eval/vqa/accuracy")) == 1


def test_runs_that_were_there_before_get_both(tracker: Tracker) -> None:
    tracker.log(dataclasses.replace(RECORD, data=(), kept=None))
    assert not models(tracker)
    run_id = again(tracker).log(RECORD)
    (model,) = models(tracker)
    assert metrics_of(model) == RECORD.summary and model.source_run_id == run_id
    assert len(tracker._client().get_metric_history(run_id, "cost/train_seconds")) == 1
    assert len(tracker._client().get_run(run_id).inputs.dataset_inputs) == 2


class OlderServer(Gate):
    """A server from before there were logged models."""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        if "logged-models" in path:
            return 404, "text/html", b"<h1>Not Found</h1>"
        return super().answer(method, path, headers, body)


def test_a_server_without_logged_models_takes_all_the_rest(server: str) -> None:
    gate = OlderServer(server)
    try:
        tracker = Tracker(f"http://{gate.place}", "older")
        run_id = tracker.log(RECORD)
        run = tracker._client().get_run(run_id)
        assert run.data.metrics["eval/vqa/accuracy"] == 0.5 and run.data.tags[MODEL] == NO_MODELS
        state = read_state(tracker._uri, "older")
        assert state is not None and has_record(state.runs[RECORD.cell_id], RECORD)
    finally:
        gate.close()


def test_a_real_cell_says_what_it_read_and_what_is_kept(
    tiny_experiment: Path, tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    plan = prepare(tiny_experiment, ["tracking.experiment_name=real"])
    cell = plan.cells[0]
    assert plan.record(cell).kept is None, "nothing is trained yet"
    for job in plan.tree.work(plan.ledger):
        finish(plan.ledger, job)
    record = plan.record(cell)
    assert record.kept is not None and (Path(record.kept.weights) / "model.safetensors").is_file()
    uses = {data.name: data.uses for data in record.data}
    assert set(uses.values()) == {("training",), ("evaluation",)}
    assert all(len(data.digest) == 36 and data.kind == "easy_vqa" for data in record.data)
    digests = {data.digest for data in record.data}
    assert len(digests) == len(record.data)
    other = prepare(tiny_experiment, ["data.train.max_samples=100"])
    changed = {data.name for data in other.record(other.cells[0]).data if data.digest not in digests}
    assert changed == {"train"}
    for _ in range(2):
        outcome = run_experiment(plan.loaded, local=True, console=Console(file=io.StringIO()))
        assert outcome.exit_code == 0 and not outcome.unsent
    tracker = Tracker(f"sqlite:///{database}", "real")
    assert {model.tags["cell_id"] for model in models(tracker)} == {each.id for each in plan.cells}
