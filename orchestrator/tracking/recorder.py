"""Sends cell records to the tracker from a thread of its own, so that a slow or dead server never holds training up."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from orchestrator.errors import LlavoltaError, TrackingError
from orchestrator.plan.record import CellRecord


class Tracker(Protocol):
    """What a tracking back end offers."""

    def log(self, record: CellRecord) -> str:
        """Brings the back end's record of a cell up to date and returns the run's id."""

    def close(self) -> None:
        """Lets go of the back end."""


class Recorder:
    """A queue of records in front of a tracker.

    A record that cannot be sent is kept (the newest one a cell) and tried again at the end; what still cannot be
    sent then stands in `unsent`, and the next submission of the experiment sends it from the ledger.

    Args:
        open_tracker: Makes the tracker; called in the thread, since importing MLflow takes seconds.
        on_sent: Called with each record that arrived and its run id.
    """

    def __init__(self, open_tracker: Callable[[], Tracker], on_sent: Callable[[CellRecord, str], None]) -> None:
        self._open_tracker = open_tracker
        self._on_sent = on_sent
        self._queue: queue.Queue[CellRecord | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self.unsent: dict[str, CellRecord] = {}
        self.problem: str | None = None

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def put(self, record: CellRecord) -> None:
        """Takes a record; returns at once."""
        self._queue.put(record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join(timeout=120)

    def _work(self) -> None:
        tracker: Tracker | None = None
        while True:
            record = self._queue.get()
            last = record is None
            if record is not None:
                self.unsent[record.cell_id] = record
                if not self._queue.empty():
                    continue
            failed = 0
            for waiting in list(self.unsent.values()):
                try:
                    tracker = tracker or self._open_tracker()
                    self._on_sent(waiting, tracker.log(waiting))
                except Exception as error:
                    # Tracking never fails training: whatever MLflow or the disk raises is told at the end.
                    plain = isinstance(error, LlavoltaError)
                    self.problem = str(error) if plain else f"{type(error).__name__}: {error}"
                    # One that is never taken must not keep the others back; a second says that the server is away.
                    self.unsent[waiting.cell_id] = self.unsent.pop(waiting.cell_id)
                    failed += 1
                    if failed == 2:
                        break
                else:
                    del self.unsent[waiting.cell_id]
            if last:
                break
        if tracker is not None:
            with contextlib.suppress(TrackingError):  # told already of the record that could not be sent
                tracker.close()
