"""Sends cell records to the tracker from a thread of its own, so that a slow or dead server never holds training up."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol

from orchestrator.errors import LlavoltaError, TrackingError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.redaction import redacted

POINTS_PER_TURN = 20_000
PATIENCE_SECONDS = 120.0
_QUIET_SECONDS = 5.0
_POLL_SECONDS = 0.2
_FAILURES_OF_A_SERVER = 2
MakeRecord = Callable[[], CellRecord]


class Tracker(Protocol):
    """What a tracking back end offers."""

    notes: list[str]

    def open_runs(self, records: Sequence[CellRecord]) -> None:
        """Make the records of cells that the back end does not know, all at once."""

    def log_some(self, record: CellRecord, points: int) -> bool:
        """Bring the back end's record of a cell up to date, by so many points; True where it is whole then."""

    def close(self) -> None:
        """Let go of the back end."""


class UploadQueue:
    """The cells that wait to be recorded, in front of a tracker.

    Of a cell only its newest record waits, which is read from the ledger when its turn comes; and each cell's turn is
    bounded, so that no long history keeps other curves back. A record that cannot be sent is tried again when the next
    ones come and at the end; what still cannot be sent then stands in `unsent`, and the next submission sends it.

    Args:
        open_tracker: Makes the tracker; called in the thread, since importing MLflow takes seconds.
        say: Takes a line for the user where the end takes long.
    """

    def __init__(self, open_tracker: Callable[[], Tracker], say: Callable[[str], None] = lambda text: None) -> None:
        self._open_tracker = open_tracker
        self._say = say
        self._queue: queue.Queue[tuple[str, MakeRecord | None] | None] = queue.Queue()
        self._asked_to_look = False
        self._tracker: Tracker | None = None
        self._turns = 0
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self.unsent: dict[str, MakeRecord] = {}
        self.problem: str | None = None

    @property
    def notes(self) -> list[str]:
        """What the tracker has to say to the user."""
        return self._tracker.notes if self._tracker is not None else []

    def __enter__(self) -> UploadQueue:
        self._thread.start()
        return self

    def put(self, cell_id: str, make: MakeRecord) -> None:
        """Take a cell whose record is to be brought up to date; returns at once.

        Args:
            cell_id: Its id.
            make: Reads its record from the ledger; called in the thread.
        """
        self._queue.put((cell_id, make))

    def look(self) -> None:
        """Open the tracker before the end, which ends the runs that dead drivers left behind."""
        self._queue.put(("", None))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is still to be sent for as long as some of it is; who was interrupted waits two minutes."""
        self._queue.put(None)
        began = moved = time.monotonic()
        turns, told = self._turns, False
        while self._thread.is_alive():
            self._thread.join(timeout=_POLL_SECONDS)
            now = time.monotonic()
            if self._turns != turns and kind is None:
                turns, moved = self._turns, now
            if now - moved > PATIENCE_SECONDS:
                self.problem = self.problem or f"nothing was taken for {PATIENCE_SECONDS:g} seconds"
                break
            if now - began > _QUIET_SECONDS and self.unsent and not told:
                told = True
                cells = f"{len(self.unsent)} cell{'s' if len(self.unsent) != 1 else ''}"
                self._say(f"sending MLflow what it lacks of {cells}; Ctrl-C leaves it to the next run")

    def _work(self) -> None:
        last = False
        while not last:
            last, failed = self._take(wait=True), set[str]()
            while len(failed) < _FAILURES_OF_A_SERVER and (turn := [c for c in self.unsent if c not in failed]):
                failed |= self._round(turn)
                if not last and not self._queue.empty() and self._take(wait=False):
                    last, failed = True, set()  # the end: what failed is tried once more
        if self._asked_to_look and self._tracker is None:
            self._open_runs([])
        if self._tracker is not None:
            with contextlib.suppress(TrackingError):  # told already of the record that could not be sent
                self._tracker.close()

    def _take(self, *, wait: bool) -> bool:
        """Take what has come; True where nothing more will."""
        with contextlib.suppress(queue.Empty):
            while True:
                came = self._queue.get(block=wait)
                if came is None:
                    return True
                wait = False
                if came[1] is None:
                    self._asked_to_look = True
                else:  # a cell that waits keeps its place: those that come often must not keep others back
                    self.unsent[came[0]] = came[1]
        return False

    def _round(self, turn: Sequence[str]) -> set[str]:
        """Return one turn for each of these cells; those that failed."""
        failed: set[str] = set()
        records: dict[str, CellRecord] = {}
        for cell_id in turn:
            with self._told(cell_id, failed):
                records[cell_id] = self.unsent[cell_id]()
        self._open_runs(list(records.values()))
        for cell_id, record in records.items():
            make = self.unsent.pop(cell_id)
            self.unsent[cell_id] = make  # to the end; kept until it is sent
            with self._told(cell_id, failed):
                if self._opened().log_some(record, POINTS_PER_TURN):
                    del self.unsent[cell_id]
                self._turns += 1
            if len(failed) >= _FAILURES_OF_A_SERVER:
                break
        return failed

    def _open_runs(self, records: Sequence[CellRecord]) -> None:
        with contextlib.suppress(Exception):  # each cell of them tells it
            self._opened().open_runs(records)

    def _opened(self) -> Tracker:
        self._tracker = self._tracker or self._open_tracker()
        return self._tracker

    @contextlib.contextmanager
    def _told(self, cell_id: str, failed: set[str]) -> Iterator[None]:
        """Tracking never fails training: whatever MLflow or the disk raises is told at the end."""
        try:
            yield
        except Exception as error:
            plain = isinstance(error, LlavoltaError)
            self.problem = redacted(str(error) if plain else f"{type(error).__name__}: {error}")
            # One that is never taken must not keep the others back; a second says that the server is away.
            failed.add(cell_id)
