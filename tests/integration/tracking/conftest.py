"""What tests of tracking share: one migrated database a module, and one real server behind a gate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cell_tracker import Tracker
from mlflow_servers import Gate, free_port, mlflow_server


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One migrated database for the module: each test has an experiment of its own in it."""
    return tmp_path_factory.mktemp("storage") / "deep" / "mlflow.db"


@pytest.fixture
def tracker(database: Path, request: pytest.FixtureRequest) -> Tracker:
    return Tracker(f"sqlite:///{database}", request.node.name)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one server for all tests: it takes ten seconds to start."""
    with mlflow_server(tmp_path_factory.mktemp("server"), free_port()) as address:
        yield address


@pytest.fixture
def gate(server: str) -> Iterator[Gate]:
    gate = Gate(server)
    yield gate
    gate.close()
