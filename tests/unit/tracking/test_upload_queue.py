"""The recorder's thread: one record that is not taken holds no other up, and nothing that fails goes untold."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from orchestrator.errors import TrackingError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.tracking import upload_queue
from orchestrator.tracking.upload_queue import UploadQueue


class Server:
    """Refuses some records; of the others it takes one part a turn."""

    def __init__(
        self, refuses: Callable[[str], bool] = lambda name: False, parts: dict[str, int] | None = None
    ) -> None:
        self.refuses, self.parts = refuses, parts or {}
        self.asked: list[str] = []
        self.took: list[str] = []
        self.opened: list[list[str]] = []
        self.notes: list[str] = []
        self.pause = 0.0

    def open_runs(self, records: Sequence[CellRecord]) -> None:
        self.opened.append([record.cell_id for record in records])

    def log_some(self, record: CellRecord, points: int) -> bool:
        self.asked.append(record.cell_id)
        if self.refuses(record.cell_id):
            raise TrackingError("the server did not take it")
        time.sleep(self.pause)  # what a slow server does, not a wait for something
        self.parts[record.cell_id] = self.parts.get(record.cell_id, 1) - 1
        if self.parts[record.cell_id] > 0:
            return False
        self.took.append(record.cell_id)
        return True

    def close(self) -> None:
        """Nothing is open."""


def send(server: Server, names: str, **options: object) -> UploadQueue:
    recorder = UploadQueue(lambda: server, **options)
    for name in names:  # before the thread begins: all are there at its first look
        recorder.put(name, lambda name=name: CellRecord(name, name, "finished"))
    with recorder:
        pass
    return recorder


def test_a_record_that_is_never_taken_holds_no_other_up() -> None:
    server = Server(lambda name: name == "a")
    recorder = send(server, "abcd")
    assert server.took == ["b", "c", "d"]
    assert list(recorder.unsent) == ["a"] and recorder.problem == "the server did not take it"


def test_a_server_that_is_away_is_not_asked_for_every_record() -> None:
    server = Server(lambda name: True)
    recorder = send(server, "abcdefgh")
    assert set(recorder.unsent) == set("abcdefgh") and len(server.asked) <= 4


def test_a_record_that_cannot_be_read_counts_as_unsent_and_ends_nothing() -> None:
    server = Server()
    recorder = UploadQueue(lambda: server)

    def unreadable() -> CellRecord:
        raise OSError("input/output error")

    recorder.put("a", unreadable)
    recorder.put("b", lambda: CellRecord("b", "b", "finished"))
    with recorder:
        pass
    assert server.took == ["b"] and set(recorder.unsent) == {"a"}
    assert recorder.problem == "OSError: input/output error"


def test_a_long_history_lets_every_other_cell_have_its_turn() -> None:
    server = Server(parts={"a": 5, "c": 3})
    recorder = send(server, "abcd")
    assert server.asked == [*"abcd", *"ac", *"ac", "a", "a"] and not recorder.unsent
    assert server.opened[0] == list("abcd"), "runs are made all at once"


def test_two_hundred_running_cells_are_all_shown_in_each_round_and_read_in_the_thread() -> None:
    server, threads = Server(), set()
    names = [f"cell-{number}" for number in range(200)]

    def make(name: str) -> CellRecord:
        threads.add(threading.current_thread().name)
        return CellRecord(name, name, "running")

    with UploadQueue(lambda: server) as recorder:
        for _ in range(3):
            for name in names:
                recorder.put(name, lambda name=name: make(name))
    assert set(server.took) == set(names) and not recorder.unsent
    assert server.took[-200:] == names or len(server.took) >= 200
    assert threads == {"tracking"}


def test_a_cell_waits_until_its_newest_record_is_sent() -> None:
    """Also while an earlier one is on its way, which MLflow may get after it was read."""
    server, begun, go_on = Server(), threading.Event(), threading.Event()

    def slow() -> CellRecord:
        begun.set()
        assert go_on.wait(60)
        return CellRecord("a", "a", "finished")

    with UploadQueue(lambda: server) as recorder:
        assert recorder.waiting() == set()
        recorder.put("a", slow)
        assert begun.wait(60) and recorder.waiting() == {"a"}
        recorder.put("a", lambda: CellRecord("a", "a", "finished"))
        go_on.set()
    assert server.took == ["a", "a"] and recorder.waiting() == set()


def test_the_end_waits_as_long_as_something_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_queue, "PATIENCE_SECONDS", 1.5)
    monkeypatch.setattr(upload_queue, "_QUIET_SECONDS", 0.1)
    server, said = Server(parts={"a": 20}), []
    server.pause = 0.1  # two seconds in all
    recorder = send(server, "a", say=said.append)
    assert server.took == ["a"] and not recorder.unsent and recorder.problem is None
    assert len(said) == 1 and "Ctrl-C" in said[0]


def test_records_that_take_long_to_make_are_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of cells whose figures are drawn before the first of them is sent."""
    monkeypatch.setattr(upload_queue, "PATIENCE_SECONDS", 1.0)
    server = Server()
    recorder = UploadQueue(lambda: server)

    def drawn(name: str) -> CellRecord:
        time.sleep(0.1)  # what drawing takes
        return CellRecord(name, name, "finished")

    names = [f"cell-{number}" for number in range(20)]
    for name in names:
        recorder.put(name, lambda name=name: drawn(name))
    with recorder:
        pass
    assert server.took == names and recorder.problem is None


def test_the_end_gives_up_where_nothing_is_taken_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_queue, "PATIENCE_SECONDS", 0.3)
    server, gone = Server(), threading.Event()
    server.log_some = lambda record, points: gone.wait(30)  # type: ignore[method-assign]
    recorder = send(server, "a")
    gone.set()
    assert set(recorder.unsent) == {"a"} and "no upload succeeded" in str(recorder.problem)
