"""UploadQueue: records that are sent in a thread of their own, so that a slow or dead server never delays training."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType

from orchestrator.errors import LlavoltaError, TrackingError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.redaction import redacted
from orchestrator.tracking.protocol import Recorder

POINTS_PER_TURN = 20_000
PATIENCE_SECONDS = 120.0
_QUIET_SECONDS = 5.0
_POLL_SECONDS = 0.2
_FAILURES_OF_A_SERVER = 2
MakeRecord = Callable[[], CellRecord]


class UploadQueue:
    """Cells whose records wait to be uploaded.

    A cell waits once: its record is read from the ledger when its turn comes. A turn is bounded, so that a long history
    does not delay other curves. A record that fails is retried when the next ones arrive and at the end; what fails
    then stays in `unsent`, and the next submission uploads it.

    Args:
        open_tracker: Opens the tracker; called in the thread, since importing MLflow takes seconds.
        say: Prints a line for the user where closing takes long.
        name: The tracker's, for that line.

    Attributes:
        unsent: By cell id, what reads the record of a cell that waits.
        problem: The last error; None where there was none.
    """

    def __init__(
        self,
        open_tracker: Callable[[], Recorder],
        say: Callable[[str], None] = lambda text: None,
        name: str = "MLflow",
    ) -> None:
        self.name = name
        self._open_tracker = open_tracker
        self._say = say
        self._queue: queue.Queue[tuple[str, MakeRecord] | None] = queue.Queue()
        self._must_open = False
        self._tracker: Recorder | None = None
        self._turns = 0
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self.unsent: dict[str, MakeRecord] = {}
        self.problem: str | None = None
        self._tags: Mapping[str, str] = {}
        # The newest reader that was queued of each cell, and the last whose record was sent.
        self._queued: dict[str, MakeRecord] = {}
        self._sent: dict[str, MakeRecord] = {}

    @property
    def notes(self) -> Sequence[str]:
        """The tracker's messages for the user."""
        return self._tracker.notes if self._tracker is not None else []

    @property
    def experiment_id(self) -> str | None:
        """MLflow's number of the experiment, where the tracker was opened and knows it."""
        return self._tracker.experiment_id if self._tracker is not None else None

    def __enter__(self) -> UploadQueue:
        self._thread.start()
        return self

    def put(self, cell_id: str, make: MakeRecord) -> None:
        """Queue a cell whose record is to be updated; return at once.

        Args:
            cell_id: Its id.
            make: Reads its record from the ledger; called in the thread.
        """
        self._queued[cell_id] = make
        self._queue.put((cell_id, make))

    def describe(self, tags: Mapping[str, str]) -> None:
        """Have tags written to the experiment as a whole, after the cells of the next round; return at once."""
        self._tags = tags
        self._must_open = True

    def waiting(self) -> set[str]:
        """Return the cells of which a record is queued or on its way: what MLflow has of them may still change."""
        return {cell_id for cell_id, make in self._queued.items() if self._sent.get(cell_id) is not make}

    def end_abandoned(self) -> None:
        """End the runs that dead drivers left behind: open the tracker even if no record is queued."""
        self._must_open = True  # read when the queue has ended

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until the queue is empty or stalls for two minutes; after an interrupt, for two minutes in all."""
        self._queue.put(None)
        began = moved = time.monotonic()
        turns, is_announced = self._turns, False
        while self._thread.is_alive():
            self._thread.join(timeout=_POLL_SECONDS)
            now = time.monotonic()
            if self._turns != turns and kind is None:
                turns, moved = self._turns, now
            if now - moved > PATIENCE_SECONDS:
                self.problem = self.problem or f"no upload succeeded for {PATIENCE_SECONDS:g} seconds"
                break
            if now - began > _QUIET_SECONDS and self.unsent and not is_announced:
                is_announced = True
                cells = f"{len(self.unsent)} cell{'s' if len(self.unsent) != 1 else ''}"
                self._say(f"uploading the records of {cells} to {self.name}; Ctrl-C leaves them to the next run")

    def _work(self) -> None:
        last = False
        while not last:
            last, failed = self._take(wait=True), set[str]()
            while len(failed) < _FAILURES_OF_A_SERVER and (turn := [c for c in self.unsent if c not in failed]):
                failed |= self._round(turn)
                if not last and not self._queue.empty() and self._take(wait=False):
                    last, failed = True, set()  # the end: what failed is tried once more
        if self._must_open and self._tracker is None:
            self._open_runs([])
        self._send_tags()
        if self._tracker is not None:
            with contextlib.suppress(TrackingError):  # reported with the record that could not be sent
                self._tracker.close()

    def _take(self, *, wait: bool) -> bool:
        """Take what has arrived; return True if nothing more will."""
        with contextlib.suppress(queue.Empty):
            while True:
                came = self._queue.get(block=wait)
                if came is None:
                    return True
                wait = False
                # A waiting cell keeps its place: those that come often must not delay others.
                self.unsent[came[0]] = came[1]
        return False

    def _round(self, turn: Sequence[str]) -> set[str]:
        """Give each of these cells one turn; return those that failed."""
        failed: set[str] = set()
        records: dict[str, CellRecord] = {}
        for cell_id in turn:
            with self._noted(cell_id, failed):
                records[cell_id] = self.unsent[cell_id]()
                self._turns += 1  # hundreds of figures to draw are no stall
        self._open_runs(list(records.values()))
        for cell_id, record in records.items():
            make = self.unsent.pop(cell_id)
            self.unsent[cell_id] = make  # to the end; kept until it is sent
            with self._noted(cell_id, failed):
                if self._opened().log_some(record, POINTS_PER_TURN):
                    del self.unsent[cell_id]
                    self._sent[cell_id] = make
                self._turns += 1
            if len(failed) >= _FAILURES_OF_A_SERVER:
                break
        if not failed:
            self._send_tags()
        return failed

    def _send_tags(self) -> None:
        """Send the experiment's tags once; where that fails the end of this session or the next one does it."""
        if tags := self._tags:
            with contextlib.suppress(Exception):
                self._opened().describe(tags)
                self._tags = self._tags if self._tags is not tags else {}

    def _open_runs(self, records: Sequence[CellRecord]) -> None:
        with contextlib.suppress(Exception):  # reported by each of these cells
            self._opened().open_runs(records)

    def _opened(self) -> Recorder:
        self._tracker = self._tracker or self._open_tracker()
        return self._tracker

    @contextlib.contextmanager
    def _noted(self, cell_id: str, failed: set[str]) -> Iterator[None]:
        """Note whatever the tracker or the disk raises, for the end of the run: tracking never fails training."""
        try:
            yield
        except Exception as error:
            plain = isinstance(error, LlavoltaError)
            self.problem = redacted(str(error) if plain else f"{type(error).__name__}: {error}")
            # A record that always fails must not block the others; a second failure means that the server is down.
            failed.add(cell_id)
