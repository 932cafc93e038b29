"""Of processes that create the same keys, one succeeds each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.plan.ledger.backends.folder import FolderBackend


@pytest.fixture
def store(tmp_path: Path) -> FolderBackend:
    return FolderBackend(tmp_path / "runs")


RACE = """
import sys
from orchestrator.plan.ledger.backends.folder import FolderBackend
store = FolderBackend(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
won = [n for n in range(200) if store.create(f"leases/{n}.json", sys.argv[2].encode())]
print(*won, flush=True)
"""


def test_of_processes_that_create_the_same_keys_one_succeeds_each_time(store: FolderBackend) -> None:
    command = [sys.executable, "-c", RACE, store.url]
    racers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in "abc"
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {name: [int(n) for n in racer.communicate()[0].split()] for name, racer in zip("abc", racers, strict=True)}
    assert sorted(n for numbers in won.values() for n in numbers) == list(range(200))
    for name, numbers in won.items():
        assert all(store.read(f"leases/{n}.json") == name.encode() for n in numbers)
