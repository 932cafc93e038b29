"""Checkpoints that are cut short or changed on disk: the one before is taken, or the state is trained again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from fault_runs import CHECKPOINT_EVERY, LOST_AT_MOST, STEPS, Program, assert_like_undisturbed, note


def truncate(path: Path) -> None:
    """Loses the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file, whose size and time stay."""
    content, times = bytearray(path.read_bytes()), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)


DAMAGE = {"truncated": truncate, "bit-flipped": flip}
HOW = [pytest.param("truncated", marks=pytest.mark.slow), "bit-flipped"]


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_in_a_stage_run_falls_back_to_the_one_before(
    how: str, program: Program, reference: dict[str, Any]
) -> None:
    killed = program.run("--local", fault="kill optimizer 18")
    assert killed.code == -9 and program.fault_happened
    _, newest = program.sealed_checkpoints()
    DAMAGE[how](largest_file(newest))
    again = program.run("--local")
    assert again.code == 0 and "Traceback" not in again.told, again.told
    assert_like_undisturbed(program, reference)
    # From the checkpoint before: what a kill costs, and the interval whose checkpoint is damaged.
    (repeated,) = set(program.repeated_steps().values()) - {0}
    assert CHECKPOINT_EVERY < repeated <= LOST_AT_MOST + CHECKPOINT_EVERY
    note(f"{how} checkpoint in a stage run", "the one before, `run`", program, killed.seconds + again.seconds)


@pytest.mark.parametrize("how", HOW)
def test_a_parent_whose_checkpoint_is_damaged_is_trained_again(
    how: str, program: Program, reference: dict[str, Any]
) -> None:
    killed = program.run("--local", fault=f"kill optimizer {STEPS // 2 + 8}")
    assert killed.code == -9 and program.fault_happened
    (checkpoint,) = program.storage.glob("stage_runs/*/checkpoint")
    DAMAGE[how](largest_file(checkpoint))
    again = program.run("--local")
    assert again.code == 0 and "Traceback" not in again.told, again.told
    # A file cut short is seen when the run is planned, a changed one when it is loaded.
    assert ("is damaged and is made again" in again.output) == (how == "bit-flipped")
    assert_like_undisturbed(program, reference)
    told = f"{how} checkpoint of a parent"
    note(told, "its stage run again, `run`", program, killed.seconds + again.seconds, lost_steps=STEPS // 2)
