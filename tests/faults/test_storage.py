"""The storage: a disk that is full, and two drivers that work in it at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_runs import LOST_AT_MOST, STAGE_RUNS, Program, assert_like_undisturbed, note


@pytest.fixture
def small_disk(program: Program) -> Iterator[Path]:
    """The program's storage is a file system of its own that holds some of what it writes."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk can only be mounted by root")
    program.storage.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", program.storage], check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield program.storage
    # Lazily: this process's MLflow client has read the database and keeps it open.
    subprocess.run(["umount", "--lazy", program.storage], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_done_and_the_same_command_goes_on(
    small_disk: Path, program: Program, reference: dict[str, Any]
) -> None:
    full = program.run("--local")
    assert full.code == 1 and "No space left on device" in full.told and "Traceback" not in full.told, full.told
    finished = {path.name for path in small_disk.glob("stage_runs/*") if not path.name.startswith(".")}
    assert finished
    subprocess.run(["mount", "-o", "remount,size=256m", small_disk], check=True)
    again = program.run("--local")
    assert again.code == 0, again.told
    assert_like_undisturbed(program, reference)
    assert all(steps <= LOST_AT_MOST for steps in program.repeated_steps().values()), program.repeated_steps()
    note("full disk", "the next `run`", program, full.seconds + again.seconds)


def test_two_drivers_on_one_storage_share_the_work_and_do_none_of_it_twice(
    program: Program, text: str, reference: dict[str, Any]
) -> None:
    begun = time.monotonic()
    both = [program, Program(program.folder, text, number=2)]
    drivers = [both[0].start("--local"), both[1].start()]
    ends = [one.wait(driver, begun) for one, driver in zip(both, drivers, strict=True)]
    assert [end.code for end in ends] == [0, 0], ends
    tables = [[line.split() for line in end.output.splitlines() if "finished" in line] for end in ends]
    assert tables[0] == tables[1] and len(tables[0]) == len(reference["weights"])
    lines = [line for end in ends for line in end.output.splitlines() if "  done  " in line]
    assert sum("by another run" not in line for line in lines) == STAGE_RUNS + len(reference["evaluations"])
    assert_like_undisturbed(program, reference)
    assert set(program.repeated_steps().values()) == {0}
    note("two drivers together", "each takes what is free", program, max(end.seconds for end in ends))
