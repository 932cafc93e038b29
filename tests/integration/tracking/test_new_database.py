"""An MLflow database appears complete or not at all: after a kill amid its tables, and made by several processes."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from mlflow import MlflowClient

from orchestrator.tracking.mlflow_state import make_database

# The import takes seconds: one server imports MLflow, and each process is forked from it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store"])


def start(path: Path) -> ForkServerProcess:
    process = _context.Process(target=make_database, args=(path,))
    process.start()
    return process


def test_killed_amid_its_tables_it_is_not_there_and_is_made_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "storage" / "mlflow.db"
    process = start(path)
    while not any(part.stat().st_size for part in tmp_path.glob("storage/.mlflow-*/made.db")):
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert not path.exists()
    make_database(path)
    assert MlflowClient(f"sqlite:///{path}").create_experiment("first") == "1"


def test_several_processes_make_one_and_a_later_one_leaves_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    processes = [start(path) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["mlflow.db"]
    MlflowClient(f"sqlite:///{path}").create_experiment("kept")
    make_database(path)
    assert MlflowClient(f"sqlite:///{path}").get_experiment_by_name("kept") is not None
