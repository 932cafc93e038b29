"""Cells as MLflow runs, on a real sqlite store and against a real server that goes down and up."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from cell_tracker import Tracker
from mlflow_servers import Gate, free_port

from orchestrator.errors import TrackingError
from orchestrator.plan.cell_record import NOTE, CellRecord
from orchestrator.tracking import mlflow_state, mlflow_tracker

KEYS = ("train/loss", "train/learning_rate", "train/visual_tokens", "train/step_seconds")
SUMMARY = {
    "eval/vqa/accuracy": 0.81,
    "eval/vqa/under_full/accuracy": 0.83,
    "cost/train_tflops": 1.5,
    "cost/visual_layer_tokens": 3312.0,
    "cost/compression_ratio": 5.565,
    "cost/train_seconds": 12.5,
    "cost/finetune/train_seconds": 12.5,
    "cost/samples_per_second": 80.0,
    "cost/peak_memory_gib": 0.4,
}


def history(steps: int) -> tuple[tuple[str, float, int, int], ...]:
    return tuple((key, 2.0 / (step + 1), step, 1_700_000_000_000 + 250 * step) for key in KEYS for step in range(steps))


def cell(status: str = "finished", steps: int = 30, **changes: object) -> CellRecord:
    record = CellRecord(
        cell_id="c" * 64,
        cell_name="schedule=four_stage, seed=0",
        status=status,
        params={"phases.finetune.schedule": "four_stage", "seed": "0"},
        tags={"experiment_spec_sha": "f" * 64, "hardware": "cpu"},
        history=history(steps),
        summary=SUMMARY if status == "finished" else {},
        artifacts={"cell.yaml": "seed: 0\n", "schedule.json": b"[]"},
    )
    return dataclasses.replace(record, **changes)


def runs_of(tracker: Tracker) -> list:
    return tracker._client().search_runs([tracker.experiment()])


def points_of(tracker: Tracker, run_id: str) -> list[tuple]:
    found = []
    for key in KEYS:
        metrics = tracker._client().get_metric_history(run_id, key)
        found += [(metric.key, metric.value, metric.step, metric.timestamp) for metric in metrics]
    return sorted(found)


def test_a_cell_is_one_finished_run_with_the_names_of_the_design(tracker: Tracker) -> None:
    run_id = tracker.log(cell())
    (run,) = runs_of(tracker)
    assert run.info.run_id == run_id
    assert run.info.run_name == "schedule=four_stage, seed=0"
    assert run.info.status == "FINISHED"
    assert run.info.start_time == 1_700_000_000_000
    assert run.info.end_time == 1_700_000_000_000 + 12_500, "its duration is cost/train_seconds"
    assert run.data.params == {"phases.finetune.schedule": "four_stage", "seed": "0"}
    assert run.data.tags["cell_id"] == "c" * 64
    assert run.data.tags["hardware"] == "cpu"
    assert {key: run.data.metrics[key] for key in SUMMARY} == SUMMARY
    assert points_of(tracker, run_id) == sorted(history(30))


def test_costs_are_of_step_0_and_scores_end_a_curve(tracker: Tracker) -> None:
    run_id = tracker.log(cell(last_step=29))
    steps = {key: [p.step for p in tracker._client().get_metric_history(run_id, key)] for key in SUMMARY}
    assert steps == {key: [29 if key.startswith("eval/") else 0] for key in SUMMARY}


def test_tags_of_the_experiment_are_written_once_and_read_in_every_way(gate: Gate, tracker: Tracker) -> None:
    for each in (tracker, Tracker(f"http://{gate.place}", "described")):
        each.log(cell())
        for _ in range(2):
            gate.asked.clear()
            each.describe({"some.view": "text", "other": "1"})
        assert not gate.asked
        read = mlflow_state.read_state(each._uri, each._experiment_name)
        assert read is not None and read.tags.items() >= {"some.view": "text", "other": "1"}.items()
        assert read.tags == mlflow_state.read_state_with_client(each._client(), each._experiment_name).tags


def test_a_finished_run_of_before_gets_its_duration_with_the_next_record(tracker: Tracker) -> None:
    run_id = tracker.log(cell())
    tracker._client().set_terminated(run_id, "FINISHED", end_time=1_700_000_999_000)
    read = mlflow_state.read_state(tracker._uri, tracker._experiment_name)
    assert read is not None and not mlflow_state.has_record(read.runs["c" * 64], cell())
    assert tracker.log(cell()) == run_id
    read = mlflow_state.read_state(tracker._uri, tracker._experiment_name)
    assert read is not None and mlflow_state.has_record(read.runs["c" * 64], cell())
    assert read.runs["c" * 64].end_ms == 1_700_000_012_500


def test_descriptions_keep_what_somebody_wrote(tracker: Tracker) -> None:
    noted = cell(tags={NOTE: "ours"})
    run_id = tracker.log(noted)
    client = tracker._client()
    assert client.get_run(run_id).data.tags[NOTE] == "ours"
    client.set_tag(run_id, NOTE, "theirs")
    tracker.log(noted)
    assert client.get_run(run_id).data.tags[NOTE] == "theirs"
    for ours in ("first", "second"):
        tracker.describe({NOTE: ours})
        note = client.get_experiment(tracker.experiment()).tags[NOTE]
        assert note.endswith(ours) and ("theirs" in note) == (ours == "second")
        client.set_experiment_tag(tracker.experiment(), NOTE, f"theirs\n\n{note}")
        tracker._refresh(now=True)
    assert "first" not in note


def test_a_second_record_goes_on_with_the_same_run(tracker: Tracker) -> None:
    first = tracker.log(cell("running", steps=10, artifacts={}))
    assert runs_of(tracker)[0].info.status == "RUNNING"
    second = Tracker(tracker._uri, tracker._experiment_name).log(cell("finished", steps=30))
    assert second == first
    (run,) = runs_of(tracker)
    assert run.info.status == "FINISHED"
    assert points_of(tracker, first) == sorted(history(30))


def test_sending_again_adds_nothing(tracker: Tracker, database: Path) -> None:
    tracker.log(cell())
    rows = _rows(database)
    tracker.log(cell())
    Tracker(tracker._uri, tracker._experiment_name).log(cell())
    assert _rows(database) == rows


def _rows(database: Path) -> dict[str, int]:
    with sqlite3.connect(database) as connection:
        tables = ("runs", "metrics", "params", "tags", "latest_metrics")
        return {table: connection.execute(f"select count(*) from {table}").fetchone()[0] for table in tables}


def test_steps_trained_again_after_a_crash_are_not_told_twice(tracker: Tracker) -> None:
    run_id = tracker.log(cell("running", steps=20))
    again = tuple((key, value, step, timestamp + 60_000) for key, value, step, timestamp in history(30))
    tracker.log(cell("finished", history=again))
    steps = [step for key, _, step, _ in points_of(tracker, run_id) if key == "train/loss"]
    assert sorted(steps) == list(range(30))


def test_more_points_than_one_request_takes(tracker: Tracker) -> None:
    run_id = tracker.log(cell(steps=700))
    assert points_of(tracker, run_id) == sorted(history(700))


def test_numbers_that_are_none_are_left_out(tracker: Tracker) -> None:
    odd = (("train/loss", float("nan"), 0, 1), ("train/loss", 1.0, 1, 2), ("train/loss", float("inf"), 2, 3))
    run_id = tracker.log(cell(history=odd, summary={"eval/vqa/accuracy": float("nan"), "cost/train_tflops": 2.0}))
    assert points_of(tracker, run_id) == [("train/loss", 1.0, 1, 2)]
    metrics = runs_of(tracker)[0].data.metrics
    assert "eval/vqa/accuracy" not in metrics
    assert metrics["cost/train_tflops"] == 2.0


def test_a_summary_that_changes_is_replaced_even_by_a_smaller_value(tracker: Tracker) -> None:
    tracker.log(cell(summary={"cost/train_seconds": 20.0}))
    tracker.log(cell(summary={"cost/train_seconds": 10.0, "eval/new/accuracy": 0.5}))
    metrics = runs_of(tracker)[0].data.metrics
    assert metrics["cost/train_seconds"] == 10.0
    assert metrics["eval/new/accuracy"] == 0.5


def test_a_changed_param_is_noted_and_fails_nothing(tracker: Tracker) -> None:
    tracker.log(cell("running"))
    tracker.log(cell("finished", params={"seed": "1", "new": "x"}))
    (run,) = runs_of(tracker)
    assert run.data.params["seed"] == "0"
    assert run.data.params["new"] == "x"
    assert run.data.tags["changed_param.seed"] == "1"
    assert run.info.status == "FINISHED"


def test_names_that_mlflow_refuses_are_made_fit(tracker: Tracker) -> None:
    tracker.log(cell(summary={"eval/vqa@final,a/accuracy": 0.5}, params={"x" * 300: "y" * 7000}))
    (run,) = runs_of(tracker)
    assert run.data.metrics["eval/vqa_final_a/accuracy"] == 0.5
    assert len(run.data.params["x" * 250]) == 6000


def test_artifacts_lie_beside_the_database(
    tracker: Tracker, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figure = tmp_path / "source.png"
    figure.write_bytes(b"png")
    run_id = tracker.log(cell(artifacts={"cell.yaml": "seed: 0\n", "figures/a.png": figure}))
    folder = database.parent / "mlflow_artifacts" / run_id / "artifacts"
    assert (folder / "cell.yaml").read_text() == "seed: 0\n"
    assert (folder / "figures" / "a.png").read_bytes() == b"png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.png"]
    # Another user's file cannot be given times, as MLflow does, but it can be replaced.
    os.link(folder / "cell.yaml", theirs := tmp_path / "theirs")
    tracker.log(cell(artifacts={"cell.yaml": "seed: 1\n"}))
    assert theirs.read_text() == "seed: 0\n"
    assert (folder / "cell.yaml").read_text() == "seed: 1\n"


def test_a_failed_cell_says_so_and_one_left_behind_is_killed(tracker: Tracker) -> None:
    tracker.log(cell("failed", cell_id="a"))
    tracker.log(cell("running", cell_id="b"))
    tracker.close()
    assert {run.data.tags["cell_id"]: run.info.status for run in runs_of(tracker)} == {"a": "FAILED", "b": "KILLED"}
    tracker.log(cell("running", cell_id="b"))
    assert {run.data.tags["cell_id"]: run.info.status for run in runs_of(tracker)}["b"] == "RUNNING"


def test_a_deleted_run_is_ignored_and_a_deleted_experiment_restored(tracker: Tracker) -> None:
    first = tracker.log(cell())
    client = tracker._client()
    client.delete_run(first)
    second = tracker.log(cell())
    assert second != first
    client.delete_experiment(tracker.experiment())
    assert Tracker(tracker._uri, tracker._experiment_name).log(cell()) is not None
    assert client.get_experiment_by_name(tracker._experiment_name).lifecycle_stage == "active"


def test_a_locked_database_is_told_in_bounded_time(
    tracker: Tracker, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.log(cell("running", steps=5))
    monkeypatch.setattr(mlflow_tracker, "SQLITE_LOCK_SECONDS", 1)
    other = Tracker(tracker._uri, tracker._experiment_name)
    lock = sqlite3.connect(database, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    try:
        with pytest.raises(TrackingError, match="locked"):
            other.log(cell())
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    assert time.monotonic() - begun < 60
    run_id = other.log(cell())
    assert points_of(tracker, run_id) == sorted(history(30))


def test_the_first_use_of_a_database_prints_nothing(tmp_path: Path) -> None:
    code = (
        "from orchestrator.tracking.mlflow_tracker import CellTracker\n"
        "from orchestrator.plan.cell_record import CellRecord\n"
        f"CellTracker('sqlite:///{tmp_path}/storage/mlflow.db', 'x').log_some(CellRecord('a', 'b', 'finished'), 9)\n"
    )
    folder = tmp_path / "cwd"
    folder.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert list(folder.iterdir()) == []


def test_a_server_that_is_down_costs_seconds_and_loses_nothing(server: str) -> None:
    port = free_port()
    tracker = Tracker(f"http://127.0.0.1:{port}", "down-and-up")
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=f"127.0.0.1:{port}"):
        tracker.log(cell())
    assert time.monotonic() - begun < 60
    with closing(Gate(server, port)):
        run_id = tracker.log(cell("running", steps=10))
    with pytest.raises(TrackingError):
        tracker.log(cell("finished", steps=30))
    with closing(Gate(server, port)):
        assert tracker.log(cell("finished", steps=30)) == run_id
        (run,) = runs_of(tracker)
        assert points_of(tracker, run_id) == sorted(history(30))
        assert run.info.status == "FINISHED"


def test_scores_along_the_way_may_come_late_and_once_and_the_last_one_is_the_end(tracker: Tracker) -> None:
    name = "eval/vqa/accuracy"
    along = tuple((name, value, step, 1_700_000_000_000 + 250 * step) for value, step in ((0.3, 9), (0.81, 19)))
    tracker.log(cell(status="running", along=along[:1]))
    run_id = tracker.log(cell(along=along, last_step=29))

    def points() -> dict[int, float]:
        found = tracker._client().get_metric_history(run_id, name)
        assert len(found) == len({point.step for point in found})
        return {point.step: point.value for point in found}

    assert points() == {9: 0.3, 19: 0.81, 29: 0.81}, "a final score that equals the one before is there too"
    later = (*along, (name, 0.5, 24, 1_700_000_006_000))
    for _ in range(2):
        tracker.log(cell(along=later, last_step=29))
    assert points() == {9: 0.3, 19: 0.81, 24: 0.5, 29: 0.81}
    state = mlflow_tracker.read_state(tracker._uri, tracker._experiment_name)
    assert state is not None and mlflow_state.has_record(state.runs["c" * 64], cell(along=later, last_step=29))
    assert not mlflow_state.has_record(state.runs["c" * 64], cell(along=later[1:], last_step=29))
