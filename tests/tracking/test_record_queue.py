"""The recorder's thread: one record that is not taken holds no other up, and nothing that fails goes untold."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.errors import TrackingError
from orchestrator.plan.record import CellRecord
from orchestrator.tracking.recorder import Recorder


def record(name: str) -> CellRecord:
    return CellRecord(name, name, "finished")


class Server:
    """Refuses some records."""

    def __init__(self, refuses: Callable[[str], bool]) -> None:
        self.refuses, self.asked, self.took = refuses, [], []

    def log(self, record: CellRecord) -> str:
        self.asked.append(record.cell_id)
        if self.refuses(record.cell_id):
            raise TrackingError("the server did not take it")
        self.took.append(record.cell_id)
        return "run"

    def close(self) -> None:
        """Nothing is open."""


def send(server: Server, names: str, on_sent: Callable[..., None] = lambda record, run: None) -> Recorder:
    recorder = Recorder(lambda: server, on_sent)
    for name in names:  # before the thread begins: all are there at its first look
        recorder.put(record(name))
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


def test_what_cannot_be_noted_as_sent_counts_as_unsent_and_ends_nothing() -> None:
    def on_sent(record: CellRecord, run: str) -> None:
        if record.cell_id == "a":
            raise OSError("no space left")

    server = Server(lambda name: False)
    recorder = send(server, "abc", on_sent)
    assert set(server.took) == set("abc") and set(recorder.unsent) == {"a"}
    assert recorder.problem == "OSError: no space left"
