"""Everything a ledger does, broken off or refused at each of its steps in turn: nothing finished is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3  # noqa: F401 - where it is not installed, the program of the faults does not start
import pytest

FAULTS = Path(__file__).with_name("ledger_faults.py")
MEMORY = Path("/dev/shm")

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="steps are told apart by /proc")


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, in memory where that can be: thousands of files are made to last there."""
    made = Path(tempfile.mkdtemp(prefix="llavolta-faults-", dir=MEMORY if MEMORY.is_dir() else None))
    yield made
    shutil.rmtree(made)


def each_point(mode: str, url: str, folder: Path, every: int = 1) -> dict[str, Any]:
    """What `ledger_faults.py` found at each point, or at every few."""
    command = [sys.executable, str(FAULTS), mode, url, str(folder), str(every), str(every)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{mode}: {found['points']} points, ends {found['ends']}")
    assert not found["bad"], "\n".join(found["bad"])
    return found


# `make test` tries one point of twenty, `make test-all` each.
sampled = pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])


@sampled
def test_killed_at_each_step_the_next_run_ends_like_an_undisturbed_one(folder: Path, every: int) -> None:
    found = each_point("kill", f"{folder}/runs", folder, every)
    assert found["points"] > 200 / every and found["ends"] == {"-9": found["points"], "0": 1}


@pytest.mark.slow
def test_killed_at_each_request_to_a_bucket_and_each_rename_in_its_copy(bucket: str, folder: Path) -> None:
    found = each_point("kill", bucket, folder)
    assert found["points"] > 100 and found["ends"] == {"-9": found["points"], "0": 1}


@pytest.mark.slow
def test_a_disk_that_is_full_from_a_step_on_loses_nothing(folder: Path) -> None:
    found = each_point("full", f"{folder}/runs", folder)
    assert found["points"] > 200 and found["ends"].get("1", 0) > found["points"] / 2


# What passes is asked again; a right that lacks is told. In neither case is anything done twice.
@sampled
@pytest.mark.parametrize("mode", ["EIO", pytest.param("ESTALE", marks=pytest.mark.slow)])
def test_a_look_that_fails_once_is_done_again(mode: str, folder: Path, every: int) -> None:
    found = each_point(f"again {mode}", f"{folder}/runs", folder, every)
    assert found["points"] > 100 / every and set(found["ends"]) == {"0"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["EIO", "ESTALE", "EACCES", "again EACCES"])
def test_a_look_that_fails_is_no_sign_that_something_is_missing(mode: str, folder: Path) -> None:
    found = each_point(mode, f"{folder}/runs", folder)
    assert found["points"] > 100 and set(found["ends"]) <= {"0", "1"}
    assert "EACCES" in mode or found["ends"]["0"] > 0.9 * found["points"]
