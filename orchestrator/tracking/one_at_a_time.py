"""OneAtATime: of several drivers on one storage, one at a time sends a cell's record."""

from __future__ import annotations

import contextlib
import time
import uuid

from orchestrator.errors import StorageError, TrackingError
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.ledger.store import Store
from orchestrator.plan.record import CellRecord
from orchestrator.tracking.recorder import Tracker

WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.2


class OneAtATime:
    """A tracker behind a short lease on each cell: two that find no run of a cell would both make one.

    Args:
        tracker: Sends the records.
        store: Where the leases lie.
    """

    def __init__(self, tracker: Tracker, store: Store) -> None:
        self._tracker = tracker
        self._leases = Leases(store, f"tracker-{uuid.uuid4().hex[:12]}")

    def log(self, record: CellRecord) -> str:
        """Sends a record.

        Raises:
            TrackingError: it cannot be sent, or another driver is at this cell for too long.
        """
        name = f"track-{record.cell_id}"
        try:
            self._wait_for(name)
            try:
                return self._tracker.log(record)
            finally:
                self._leases.forget(name)
        except StorageError as error:
            raise TrackingError(str(error)) from error

    def close(self) -> None:
        """Lets go of the leases and of the tracker."""
        try:
            self._tracker.close()
        finally:
            with contextlib.suppress(StorageError):  # it dies with this process
                self._leases.close()

    def _wait_for(self, name: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while self._leases.acquire(name) is None:
            if time.monotonic() > deadline:
                raise TrackingError(
                    f"another run is sending the record of {name[6:18]}; run again to send what it lacks"
                )
            time.sleep(_POLL_SECONDS)
