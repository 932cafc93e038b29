"""What fault tests share: an undisturbed run to compare with, and the table of all faults at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_runs import STAGE_RUNS, TABLE, Program, experiment, note, state_of


@pytest.fixture(scope="session")
def text(tiny_text: str) -> str:
    """The experiment that is disturbed."""
    return experiment(tiny_text)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, text: str) -> dict[str, Any]:
    """What an undisturbed run ends with."""
    program = Program(tmp_path_factory.mktemp("undisturbed"), text)
    ended = program.run()
    assert ended.code == 0, ended.told
    assert len(list(program.storage.glob("stage_runs/*/metrics.jsonl"))) == STAGE_RUNS
    note("none", "", program, ended.seconds)
    return state_of(program)


@pytest.fixture
def program(tmp_path: Path, text: str) -> Iterator[Program]:
    """The program in an empty folder; a test that fails leaves none of its processes behind."""
    program = Program(tmp_path / "disturbed", text)
    yield program
    for process in program.processes():
        process.kill()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of faults, as Markdown."""
    if not TABLE:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| fault | recovered by | steps trained again | seconds |\n|---|---|---|---|")
    for row in TABLE:
        terminalreporter.write_line(
            f"| {row['fault']} | {row['recovered']} | {row['steps_repeated']} | {row['seconds']} |"
        )
