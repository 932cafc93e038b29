"""A clock that is set back and forth by an hour, and looks at the storage that fail once: the run ends as ever."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fault_runs import HERE, Program, assert_like_undisturbed, note

pytestmark = pytest.mark.slow
EVERY = (40, 41, 43, 47)  # of so many looks one fails: dozens in a run, never two of one try, in each run others


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`disturb.c`, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or os.uname().sysname != "Linux":
        pytest.skip("needs Linux and a C compiler")
    made = tmp_path_factory.mktemp("shim") / "disturb.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", made, HERE / "disturb.c", "-ldl"], check=True)
    return made


@pytest.mark.parametrize("how", [("--local",), ()], ids=["local", "ray"])
def test_a_clock_set_back_and_forth_by_an_hour(
    how: tuple[str, ...], shim: Path, program: Program, reference: dict[str, Any]
) -> None:
    clock, part = program.folder / "clock", program.folder / "clock.part"
    clock.write_text("0")
    begun, sets = time.monotonic(), 0
    process = program.start(*how, LD_PRELOAD=str(shim), DISTURB_CLOCK=str(clock))
    ended = threading.Event()

    def set_clock() -> None:
        nonlocal sets
        while not ended.wait(1.0):
            part.write_text(("3600", "-3600")[sets % 2])
            part.replace(clock)
            sets += 1

    setter = threading.Thread(target=set_clock)
    setter.start()
    try:
        end = program.wait(process, begun)
    finally:
        ended.set()
        setter.join()
    assert end.code == 0 and "Traceback" not in end.told and sets >= 4, end.told
    assert_like_undisturbed(program, reference)
    assert set(program.repeated_steps().values()) == {0}
    note(f"clock set by an hour {sets} times {' '.join(how)}".strip(), "itself", program, end.seconds)


def test_looks_at_the_storage_that_fail_once(shim: Path, program: Program, reference: dict[str, Any]) -> None:
    tale = program.folder / "tale"
    reads = {"LD_PRELOAD": str(shim), "DISTURB_TALE": str(tale)}
    seconds = 0.0
    for every in EVERY:  # what is not done again ends the run, and is told
        end = program.run("--local", **reads, DISTURB_READS=f"{every} {program.storage}/")
        seconds += end.seconds
        assert "Traceback" not in end.told, end.told
        if end.code == 0 and "has not recorded" not in end.told:  # what MLflow lacks is sent by the next run
            break
        assert end.code == 0 or "Input/output error" in end.told or "Stale file handle" in end.told, end.told
    failed = tale.read_text().splitlines()
    assert end.code == 0 and len(failed) > 20, (failed, end.told)
    if "has not recorded" in end.told:  # sqlite gives up at the first failed read: MLflow's record comes late
        end = program.run("--local")
        assert end.code == 0 and "has not recorded" not in end.told, end.told
    assert_like_undisturbed(program, reference)
    assert set(program.repeated_steps().values()) == {0}
    note(f"EIO or ESTALE from {len(failed)} single looks", "itself or `run`", program, seconds)
