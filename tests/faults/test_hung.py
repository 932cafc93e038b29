"""A rank that stands still: after `stall_minutes` its lane is killed, says where it was, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_runs import LOST_AT_MOST, Program, assert_like_undisturbed, note, state_of

LANE = "cluster: {stall_minutes: 0.5, num_workers: 2, resources_per_worker: {CPU: 0.5}, "


@pytest.mark.slow
def test_a_stopped_rank_is_killed_and_the_lane_goes_on(tmp_path: Path, text: str) -> None:
    text = text.replace("cluster: {", LANE).replace("deepspeed: zero0", "deepspeed: zero2")
    undisturbed, program = (Program(tmp_path / name, text) for name in ("undisturbed", "disturbed"))
    alone = undisturbed.run()
    assert alone.code == 0, alone.told
    ended = program.run(fault="stop optimizer 8")
    assert program.fault_happened
    assert ended.code == 0 and "Traceback" not in ended.told, ended.told
    assert_like_undisturbed(program, state_of(undisturbed))
    assert all(steps <= LOST_AT_MOST for steps in program.repeated_steps().values()), program.repeated_steps()
    logs = "".join(path.read_text() for path in program.storage.glob("stage_runs/*/log*.txt"))
    assert "is killed" in logs and "State:\tT" in logs
    note("SIGSTOP of a rank of two", "itself, after stall_minutes", program, ended.seconds)
