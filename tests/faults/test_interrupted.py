"""Ctrl-C, a terminal that closes: a step, a checkpoint, the end; Ctrl-C twice stops now. The next run goes on."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from fault_runs import LOST_AT_MOST, Program, assert_like_undisturbed, note, press_control_c
from program import wait_until


@pytest.mark.parametrize(
    ("what", "signal_number", "unread", "code"),
    [
        ("Ctrl-C once", signal.SIGINT, False, 130),
        ("Ctrl-C, which also ends the `tee` that reads what is printed", signal.SIGINT, True, 130),
        ("terminal closed", signal.SIGHUP, True, 75),
    ],
    ids=["ctrl-c", "tee", "terminal"],
)
def test_stopped_once_it_writes_a_checkpoint_and_repeats_nothing(
    program: Program, reference: dict[str, Any], what: str, signal_number: int, unread: bool, code: int
) -> None:
    begun = time.monotonic()
    process = program.start(unread=unread)
    wait_until(program.sealed_checkpoints, process)
    os.killpg(process.pid, signal_number)  # to the whole foreground group, as a terminal does
    stopped = program.wait(process, begun)
    assert stopped.code == code and ("run the same command to resume" in stopped.errors) != unread, stopped.told
    assert not program.processes() and "Traceback" not in stopped.told
    again = program.run()
    assert again.code == 0, again.told
    assert_like_undisturbed(program, reference)
    assert set(program.repeated_steps().values()) == {0}
    note(what, "the next `run`", program, stopped.seconds + again.seconds)


@pytest.mark.slow
def test_control_c_twice_stops_now_and_repeats_what_no_checkpoint_has(
    program: Program, reference: dict[str, Any]
) -> None:
    begun = time.monotonic()
    process = program.start(fault="stop optimizer 8")  # a worker that stands still hears no polite request
    wait_until(lambda: program.fault_happened, process)
    press_control_c(process)
    wait_until(lambda: "stop at once" in program.printed(), process)
    press_control_c(process)
    stopped = program.wait(process, begun)
    assert stopped.code == 130 and "Traceback" not in stopped.told, stopped.told
    assert not program.processes()
    again = program.run()
    assert again.code == 0, again.told
    assert_like_undisturbed(program, reference)
    assert all(steps <= LOST_AT_MOST for steps in program.repeated_steps().values())
    note("Ctrl-C twice", "the next `run`", program, stopped.seconds + again.seconds)
