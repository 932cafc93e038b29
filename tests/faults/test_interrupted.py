"""Ctrl-C: once, it finishes the step, writes a checkpoint and stops; twice, it stops now. The next run goes on."""

from __future__ import annotations

import time
from typing import Any

import pytest
from fault_runs import LOST_AT_MOST, Program, assert_like_undisturbed, note, press_control_c
from program import wait_until


def test_control_c_once_writes_a_checkpoint_and_repeats_nothing(program: Program, reference: dict[str, Any]) -> None:
    begun = time.monotonic()
    process = program.start()
    wait_until(program.sealed_checkpoints, process)
    press_control_c(process)
    stopped = program.wait(process, begun)
    assert stopped.code == 130 and "run the same command to resume" in stopped.errors, stopped.told
    assert not program.processes() and "Traceback" not in stopped.told
    again = program.run()
    assert again.code == 0, again.told
    assert_like_undisturbed(program, reference)
    assert set(program.repeated_steps().values()) == {0}
    note("Ctrl-C once", "the next `run`", program, stopped.seconds + again.seconds)


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
