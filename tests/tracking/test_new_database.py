"""An MLflow database appears whole: after a kill amid its tables, and where several processes make it at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from mlflow import MlflowClient

from orchestrator.tracking.mlflow_tracker import make_database

CODE = "import sys; from pathlib import Path; from orchestrator.tracking.mlflow_tracker import make_database\n"
CODE += "make_database(Path(sys.argv[1]))"


def start(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CODE, path], stderr=subprocess.DEVNULL)


def test_killed_amid_its_tables_it_is_not_there_and_is_made_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "storage" / "mlflow.db"
    process = start(path)
    while not any(part.stat().st_size for part in tmp_path.glob("storage/.mlflow-*/made.db")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not path.exists()
    make_database(path)
    assert MlflowClient(f"sqlite:///{path}").create_experiment("first") == "1"


def test_several_processes_make_one_and_a_later_one_leaves_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    assert [process.wait() for process in [start(path) for _ in range(3)]] == [0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["mlflow.db"]
    MlflowClient(f"sqlite:///{path}").create_experiment("kept")
    make_database(path)
    assert MlflowClient(f"sqlite:///{path}").get_experiment_by_name("kept") is not None
