"""MLflow that cannot be reached or written during the whole run: nothing waits, and the record comes later, whole."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Program, assert_like_undisturbed, mlflow_record, note, state_of
from mlflow import MlflowClient
from program import wait_until


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """A real server with a file of its own."""
    listen = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "art")]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *store, *listen],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        return False

    try:
        wait_until(answers, seconds=180)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_server_that_is_down_gets_the_whole_record_when_it_is_up(
    program: Program, reference: dict[str, Any], tmp_path: Path
) -> None:
    port = free_port()
    program.environment["MLFLOW_TRACKING_URI"] = uri = f"http://127.0.0.1:{port}"
    down = program.run("--local")
    assert down.code == 0 and "MLflow has not recorded" in down.errors and str(port) in down.errors, down.told
    with mlflow_server(tmp_path, port):
        again = program.run()
        assert again.code == 0 and "nothing to do" in again.output and not again.errors.strip(), again.told
        record = mlflow_record(program.storage, uri)
    found = state_of(program, record)
    assert found == reference
    assert not program.processes()
    note("MLflow's server down", "the next `run` sends all", program, down.seconds + again.seconds)


@pytest.mark.slow
def test_a_locked_sqlite_file_delays_the_record_and_loses_nothing(program: Program, reference: dict[str, Any]) -> None:
    program.storage.mkdir()
    MlflowClient(f"sqlite:///{program.storage / 'mlflow.db'}").search_experiments()  # makes the tables
    with contextlib.closing(sqlite3.connect(program.storage / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        locked = program.run("--local")
        assert locked.code == 0 and "MLflow has not recorded" in locked.errors, locked.told
        other.execute("ROLLBACK")
    again = program.run()
    assert again.code == 0 and "nothing to do" in again.output, again.told
    assert_like_undisturbed(program, reference)
    note("sqlite locked", "the next `run` sends all", program, locked.seconds + again.seconds)
