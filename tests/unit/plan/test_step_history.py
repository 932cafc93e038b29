"""A cell's step history, read from the ledger's files from a step on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.plan import step_history
from orchestrator.plan.step_history import StepHistory, Stretch


def write(path: Path, steps: range, end: str = "") -> Path:
    # Lines of very unequal length: the halving must not rest on their size.
    lines = [
        {"step": step, "loss": 1 / (step + 1), "timestamp_ms": step, "note": "x" * (step * 37 % 400)} for step in steps
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small file is halved too."""
    monkeypatch.setattr(step_history, "_READ_THROUGH_BYTES", 256)


def test_from_every_step_on_it_is_the_rest(tmp_path: Path) -> None:
    first = Stretch(write(tmp_path / "a", range(90)), 0, 80, 0)  # its file holds more than counts
    second = Stretch(write(tmp_path / "b", range(80, 130)), 80, 130, 0)
    third = Stretch(write(tmp_path / "c", range(15), end='{"step": 15, "lo'), 0, 25, 130)
    history = StepHistory([first, second, third])
    whole = list(history)
    assert [step for _, _, step, _ in whole] == [*range(145)]
    for step in range(150):
        assert list(history.since(step)) == [point for point in whole if point[2] >= step], step


@pytest.mark.parametrize("gap", ["begin", "middle", "end", "file"])
def test_nothing_is_told_beyond_a_gap(tmp_path: Path, gap: str) -> None:
    steps = {"begin": [12, 13], "middle": [10, 12, 13], "end": [10, 11], "file": []}[gap]
    first, third = write(tmp_path / "a", range(10)), write(tmp_path / "c", range(14, 20))
    second = tmp_path / "b"
    if steps:
        second.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps))
    history = StepHistory([Stretch(first, 0, 10, 0), Stretch(second, 10, 14, 0), Stretch(third, 14, 20, 0)])
    last = {"begin": 9, "middle": 10, "end": 11, "file": 9}[gap]
    assert [step for _, _, step, _ in history] == [*range(last + 1)]


def test_a_few_new_steps_read_a_small_part_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", range(5000))
    read = []
    parse = step_history._line
    monkeypatch.setattr(step_history, "_line", lambda text: read.append(text) or parse(text))
    assert len(list(StepHistory([Stretch(path, 0, 5000, 0)]).since(4990))) == 10
    assert len(read) < 60


def test_a_file_that_is_not_there_holds_nothing_and_one_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert list(StepHistory([Stretch(tmp_path / "none", 0, 5, 0)])) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"):
        list(StepHistory([Stretch(tmp_path / "folder", 0, 5, 0), Stretch(write(tmp_path / "b", range(5)), 0, 5, 5)]))
