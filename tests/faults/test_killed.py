"""Processes that are killed: a worker, all of a lane, the conductor, the driver, and a worker amid a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
from fault_runs import LOST_AT_MOST, Program, assert_like_undisturbed, note

# Eight updates are past the first checkpoint of the first stage run; its second is the second file that is saved.
KILLED = {
    "SIGKILL of a worker": "kill optimizer 8",
    "SIGKILL amid the write of a checkpoint": "kill checkpoint 2",
    "SIGKILL of the lane's Train controller": "kill:ray::TrainController optimizer 8",
    "SIGKILL of the conductor": "kill:ray::Conductor optimizer 8",
}
SLOW = {*KILLED} - {"SIGKILL of a worker"}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow if what in SLOW else ()) for what in KILLED]
)
def test_the_same_run_goes_on_and_ends_like_one_left_alone(
    what: str, program: Program, reference: dict[str, Any]
) -> None:
    ended = program.run(fault=KILLED[what])
    assert program.fault_happened
    assert ended.code == 0 and "Traceback" not in ended.told, ended.told
    assert_like_undisturbed(program, reference)
    assert all(steps <= LOST_AT_MOST for steps in program.repeated_steps().values()), program.repeated_steps()
    note(what, "itself", program, ended.seconds)


def test_a_killed_driver_takes_all_with_it_and_the_next_run_goes_on(
    program: Program, reference: dict[str, Any]
) -> None:
    killed = program.run(fault="kill:orchestrator optimizer 8")
    assert program.fault_happened and killed.code == -9
    again = program.run()
    assert again.code == 0 and "Traceback" not in again.told, again.told
    assert_like_undisturbed(program, reference)
    assert all(steps <= LOST_AT_MOST for steps in program.repeated_steps().values()), program.repeated_steps()
    note("SIGKILL of the driver", "the next `run`", program, killed.seconds + again.seconds)
