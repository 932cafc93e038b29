"""MLflow is asked, not a note of our own: whatever is gone there is noticed and filled again, by few questions."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cell_tracker import Tracker
from mlflow_servers import Gate

from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.ledger.backends.folder import FolderBackend
from orchestrator.plan.ledger.process import Process
from orchestrator.tracking import mlflow_tracker
from orchestrator.tracking.mlflow_state import (
    TrackedRun,
    abandoned,
    file_contents,
    has_record,
    one_at_a_time,
    read_state,
    read_state_with_client,
)

KEYS = ("train/loss", "train/learning_rate")
STEPS = 40


def record(name: str = "a", status: str = "finished", steps: int = STEPS, **changes: Any) -> CellRecord:
    made = CellRecord(
        cell_id=name * 8,
        cell_name=f"schedule={name}",
        status=status,
        params={"seed": "0"},
        tags={"hardware": "cpu"},
        history=tuple((key, 1.0 / (step + 1), step, 1_700_000_000_000 + step) for step in range(steps) for key in KEYS),
        summary={"eval/vqa/accuracy": 0.5} if status == "finished" else {},
        artifacts={"cell.yaml": "seed: 0\n"},
    )
    return dataclasses.replace(made, **changes)


def again(tracker: Tracker) -> Tracker:
    """As the next `run` has it."""
    return Tracker(tracker._uri, tracker._experiment_name)


def is_there(tracker: Tracker, wanted: CellRecord) -> bool:
    seen = read_state(tracker._uri, tracker._experiment_name)
    return seen is not None and has_record(seen.runs.get(wanted.cell_id), wanted)


def points(tracker: Tracker, run_id: str) -> list[tuple[str, float, int, int]]:
    client = tracker._client()
    return [(p.key, p.value, p.step, p.timestamp) for key in KEYS for p in client.get_metric_history(run_id, key)]


def sql(tracker: Tracker, *statements: str) -> None:
    with sqlite3.connect(tracker._uri.removeprefix("sqlite:///")) as opened:
        for statement in statements:
            opened.execute(statement)


def take_out(tracker: Tracker, run: str, keys: str) -> None:
    sql(tracker, *(f"DELETE FROM {table} WHERE run_uuid = '{run}' AND key {keys}" for table in TABLES))


TABLES = ("metrics", "latest_metrics")
DAMAGE: dict[str, Callable[[Tracker, str], Any]] = {
    "run deleted": lambda tracker, run: tracker._client().delete_run(run),
    "experiment deleted": lambda tracker, run: tracker._client().delete_experiment(tracker.experiment()),
    "experiment renamed": lambda tracker, run: tracker._client().rename_experiment(tracker.experiment(), run),
    "renamed by hand": lambda tracker, run: tracker._client().update_run(run, name="mine"),
    "status changed": lambda tracker, run: tracker._client().set_terminated(run, "KILLED"),
    "tag deleted": lambda tracker, run: tracker._client().delete_tag(run, "hardware"),
    "param gone": lambda tracker, run: sql(tracker, f"DELETE FROM params WHERE run_uuid = '{run}'"),
    "score changed": lambda tracker, run: tracker._client().log_metric(run, "eval/vqa/accuracy", 0.9, step=99),
    "score gone": lambda tracker, run: take_out(tracker, run, "LIKE 'eval/%'"),
    "one metric gone": lambda tracker, run: take_out(tracker, run, "= 'train/loss'"),
    "end cut off": lambda tracker, run: sql(
        tracker,
        f"DELETE FROM metrics WHERE run_uuid = '{run}' AND step > 20",
        f"UPDATE latest_metrics SET step = 20 WHERE run_uuid = '{run}' AND key LIKE 'train/%'",
    ),
    "middle cut out": lambda tracker, run: sql(
        tracker, f"DELETE FROM metrics WHERE run_uuid = '{run}' AND step BETWEEN 10 AND 20 AND key = 'train/loss'"
    ),
    "all points gone": lambda tracker, run: sql(tracker, f"DELETE FROM metrics WHERE run_uuid = '{run}'"),
    "artifacts gone": lambda tracker, run: shutil.rmtree(
        Path(tracker._uri.removeprefix("sqlite:///")).parent / "mlflow_artifacts" / run
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_gone_is_noticed_and_filled_again(tracker: Tracker, damage: str) -> None:
    wanted = record()
    first = tracker.log(wanted)
    assert is_there(tracker, wanted)
    DAMAGE[damage](tracker, first)
    assert not is_there(tracker, wanted)
    later = again(tracker)
    run_id = later.log(wanted)
    assert is_there(later, wanted)
    assert sorted(points(later, run_id)) == sorted(wanted.history)
    assert (run_id == first) == (damage not in ("run deleted", "experiment renamed"))
    assert bool(later.notes) == (damage == "experiment deleted")


def test_another_file_and_a_file_that_is_no_database_are_told_apart(tmp_path: Path, tracker: Tracker) -> None:
    tracker.log(record())
    other = read_state(f"sqlite:///{tmp_path}/other.db", tracker._experiment_name)
    assert other is not None and other.experiment_id is None and not other.runs
    (tmp_path / "text.db").write_text("no database" * 100)
    assert read_state(f"sqlite:///{tmp_path}/text.db", tracker._experiment_name) is None


def test_both_ways_to_look_see_the_same(tracker: Tracker) -> None:
    for name in "ab":
        tracker.log(record(name))
    quick = read_state(tracker._uri, tracker._experiment_name, count=False)
    assert quick == read_state_with_client(tracker._client(), tracker._experiment_name)


class Counted:
    """A client that notes what is asked of it."""

    def __init__(self, client: Any) -> None:
        self.client, self.asked = client, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += 1
        return getattr(self.client, name)


def test_an_empty_store_is_filled_by_one_request_a_run_and_one_a_batch(tracker: Tracker) -> None:
    records = [record(name, artifacts={}) for name in "abcdefghij"]
    tracker._connection = counted = Counted(tracker._client())
    tracker.open_runs(records)
    assert all(tracker.log_some(each, 10_000) for each in records)
    assert counted.asked["create_run"] == 10 and counted.asked["create_experiment"] == 1
    assert not counted.asked["search_runs"] and not counted.asked["get_metric_history"]
    counted.asked.clear()
    live = record("z", "running", artifacts={})
    tracker.log_some(live, 10_000)
    counted.asked.clear()
    tracker.log_some(record("z", "running", steps=STEPS + 5, artifacts={}), 10_000)
    assert counted.asked == {"log_batch": 1}, "a running cell costs one request a turn"


def test_a_repeat_with_nothing_new_sends_nothing_and_a_tail_only_the_tail(tracker: Tracker) -> None:
    wanted = record()
    tracker.log(wanted)
    later = again(tracker)
    later._connection = counted = Counted(later._client())
    later.log(wanted)
    assert not counted.asked
    sent = []
    counted.log_batch = lambda run, metrics=(), **rest: sent.extend(metrics)  # type: ignore[attr-defined]
    later.log_some(record(steps=STEPS + 3), 10_000)
    assert sorted({metric.step for metric in sent}) == [STEPS, STEPS + 1, STEPS + 2] and len(sent) == 3 * len(KEYS)


def test_a_turn_sends_a_bounded_part(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracker, "METRICS_PER_REQUEST", 10)
    wanted, turns = record(), 1
    while not tracker.log_some(wanted, points=30):
        turns += 1
    assert turns == 3  # 80 points
    assert is_there(tracker, wanted)


def test_a_send_that_broke_off_within_a_step_goes_on_there(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracker, "METRICS_PER_REQUEST", 7)
    wanted = record()
    assert not tracker.log_some(wanted, points=21)  # ends between the two points of a step
    later = again(tracker)
    run_id = later.log(wanted)
    assert sorted(points(later, run_id)) == sorted(wanted.history)


def test_a_run_follows_its_cell_through_every_state(tracker: Tracker) -> None:
    """A cell that is interrupted, fails (as one that diverges does), is taken up and finished."""
    steps = 0
    shown = []
    for status in ("running", "interrupted", "running", "failed", "running", "finished"):
        steps += 5
        wanted = record(status=status, steps=steps)
        run_id = again(tracker).log(wanted)
        assert is_there(tracker, wanted) and len(points(tracker, run_id)) == steps * len(KEYS)
        info = tracker._client().get_run(run_id).info
        shown.append(info.status)
        assert status == "running" or info.end_time == 1_700_000_000_000 + steps - 1
    assert shown == ["RUNNING", "KILLED", "RUNNING", "FAILED", "RUNNING", "FINISHED"]


# Says who it is, and lives until its input ends.
DRIVER = (
    "import dataclasses, json; from orchestrator.plan.ledger.process import this_process; "
    "print(json.dumps({**dataclasses.asdict(this_process()), 'storage': '/s'}), flush=True); input()"
)


def test_runs_of_a_dead_driver_are_ended_and_those_of_a_living_one_are_not(tracker: Tracker) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def lives(driver: Process, storage: str) -> bool:
        return driver.is_gone() is not True

    with start() as living, start() as killed:
        told = json.loads(living.stdout.readline()), json.loads(killed.stdout.readline())
        killed.kill()
        killed.wait()
        drivers = {"a": told[0], "b": told[1], "c": {**told[0], "machine": "another", "host": "elsewhere"}}
        for name, driver in drivers.items():
            run_id = tracker.log(record(name, "running"))
            tracker._client().set_tag(run_id, "storage_driver", json.dumps(driver))
        tracker._client().create_run(tracker.experiment(), tags={"cell_id": "x" * 8})  # no driver of ours made it
        seen = read_state(tracker._uri, tracker._experiment_name)
        assert [run.name for run in abandoned(seen, lives)] == ["schedule=b"]
        Tracker(tracker._uri, tracker._experiment_name, lives=lives).open_runs([])
        living.stdin.close()
    found = read_state_with_client(tracker._client(), tracker._experiment_name)
    ended = {cell[0]: run.status for cell, run in found.runs.items()}
    assert ended == {"a": "RUNNING", "b": "KILLED", "c": "RUNNING", "x": "RUNNING"}
    run_id = found.runs["b" * 8].run_id
    assert tracker._client().get_run(run_id).info.end_time == 1_700_000_000_000 + STEPS - 1
    # Whoever works on such a cell after all says so with its next record.
    tracker.log(record("b", "running"))
    assert tracker._client().get_run(run_id).info.status == "RUNNING"


def test_a_session_leaves_the_runs_of_another_driver_running(tracker: Tracker) -> None:
    run_id = tracker.log(record("a", "running"))
    tracker._client().set_tag(run_id, "storage_driver", '{"somebody": "else"}')
    tracker.close()
    assert tracker._client().get_run(run_id).info.status == "RUNNING"


def test_two_drivers_on_one_storage_make_no_twins(tracker: Tracker, tmp_path: Path) -> None:
    store, together = FolderBackend(tmp_path), threading.Barrier(2)
    records = [record(name) for name in "abcde"]

    def drive(_: int) -> None:
        driver = Tracker(tracker._uri, tracker._experiment_name, lambda: one_at_a_time(store, tracker._experiment_name))
        driver.open_runs([])  # both have seen that there is nothing
        together.wait(timeout=60)
        driver.open_runs(records)
        for each in records:
            driver.log(each)

    with ThreadPoolExecutor(2) as both:
        list(both.map(drive, range(2)))
    runs = tracker._client().search_runs([tracker.experiment()])
    assert sorted(run.data.tags["cell_id"][0] for run in runs) == list("abcde")
    assert all(is_there(tracker, each) for each in records)
    assert store.names("leases") == [] or not any(store.names(f"leases/{name}") for name in store.names("leases"))


def test_a_parameter_that_another_driver_writes_at_the_same_moment_is_no_error(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.tracking import sqlalchemy_store

    wanted, made = record(), sqlalchemy_store.SqlParam
    tracker.open_runs([wanted])
    (run,) = tracker._client().search_runs([tracker.experiment()])
    written: list[str] = []

    def while_another_writes_it(**columns: Any) -> Any:  # MLflow has looked by now, and found none
        if not written:
            sql(tracker, f"INSERT INTO params (key, value, run_uuid) VALUES ('seed', '0', '{run.info.run_id}')")
            written.append(columns["key"])
        return made(**columns)

    monkeypatch.setattr(sqlalchemy_store, "SqlParam", while_another_writes_it)
    tracker.log(wanted)
    assert written == ["seed"] and is_there(tracker, wanted)


def test_a_server_is_asked_twice_for_twenty_cells_with_nothing_new(gate: Gate) -> None:
    tracker = Tracker(f"http://{gate.place}", "twenty")
    records = [record(chr(ord("a") + number)) for number in range(20)]
    tracker.open_runs(records)
    assert all(tracker.log_some(each, 10_000) for each in records)
    gate.asked.clear()
    assert all(is_there(tracker, each) for each in records[:1])
    assert gate.asked == ["GET experiments/get-by-name", "POST runs/search"]
    seen = read_state(tracker._uri, "twenty")
    assert all(has_record(seen.runs.get(each.cell_id), each) for each in records)
    client = tracker._client()
    client.delete_run(seen.runs[records[0].cell_id].run_id)
    gate.asked.clear()
    later = again(tracker)
    later.open_runs(records)
    assert all(later.log_some(each, 10_000) for each in records)
    asked = Counter(gate.asked)
    assert asked["POST runs/create"] == 1 and asked["POST runs/search"] == 2
    assert all(is_there(later, each) for each in records[:1])
    client.delete_experiment(later.experiment())
    assert read_state(later._uri, "twenty").is_deleted
    again(later).log(records[0])
    assert is_there(later, records[1]), "its runs come back with it"


@pytest.mark.parametrize("way", ["variables", "address", "netrc"])
def test_a_password_opens_a_server_whichever_way_it_comes(
    gate: Gate, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate.wants = ("me", "a-secret-of-tests")
    address = f"http://{gate.place}"
    for name in [name for name in os.environ if name.startswith("MLFLOW_TRACKING")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    if way == "variables":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-secret-of-tests")
    elif way == "address":
        address = f"http://me:a-secret-of-tests@{gate.place}"
    else:
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password a-secret-of-tests\n")
        (tmp_path / ".netrc").chmod(0o600)
    tracker = Tracker(address, f"password-{way}")
    tracker.log(record())
    assert is_there(tracker, record())
    gate.wants = ("me", "another")
    assert read_state(address, f"password-{way}") is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_artifacts_whose_look_fails_once_are_neither_gone_nor_an_end(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "training.png"
    file.write_bytes(b"drawn")
    failed: list[str] = []

    def failing_once(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path) == str(file) and name not in failed:
                failed.append(name)
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **options)

        return look

    monkeypatch.setattr(os, "stat", failing_once("stat", os.stat))
    monkeypatch.setattr(Path, "read_bytes", failing_once("read", Path.read_bytes))
    run = TrackedRun("id", "name", "FINISHED", 0, tmp_path.as_uri())
    assert not run.lacks_artifacts([file.name]) and run.lacks_artifacts(["another.png"])
    assert file_contents({file.name: file}) == {file.name: b"drawn"}
    assert failed == ["stat", "read"]
