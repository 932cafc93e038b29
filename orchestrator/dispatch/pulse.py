"""Pulse: a rank's sign of life to the conductor, and what it hears back: that it should stop, or write its stacks."""

from __future__ import annotations

import contextlib
import faulthandler
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.dispatch.worker_log import now

PULSE_SECONDS = 0.3


class Pulse:
    """Beats in a thread of its own; called, it tells whether to stop and counts as a sign that the rank gets on.

    So a stage run asks it at every step without a call to the conductor, and goes on while there is none.

    Args:
        conductor: The actor's handle.
        who: The rank, as the conductor's `pulse` takes it.
    """

    def __init__(self, conductor: Any, who: Mapping[str, Any]) -> None:
        self._conductor = conductor
        self._who = who
        self._progress = 0
        self._stop = threading.Event()
        self._leave = threading.Event()
        self._has_dumped = False
        self.log: Path | None = None
        """Where the stacks go: the log of the job in hand."""
        self.at: tuple[int, str | None] | None = None
        """Number of the item in hand and the job before it."""
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def __call__(self) -> bool:
        """Whether this rank should leave at the next checkpoint."""
        self._progress += 1
        return self._stop.is_set()

    def close(self) -> None:
        """Ends the beating."""
        self._leave.set()

    def _beat(self) -> None:
        import ray

        while not self._leave.wait(PULSE_SECONDS):
            try:
                heard = ray.get(self._conductor.pulse.remote(self._who, self._progress, self._has_dumped, self.at))
            except ray.exceptions.RayError:
                return  # it is gone for good, and with it the driver; the next call for an item says so
            if heard["stop"]:
                self._stop.set()
            if heard["dump"]:
                self._dump()

    def _dump(self) -> None:
        self._has_dumped = True
        if self.log is not None:
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as log:
                log.write(f"[{now()}] rank {self._who['rank']} hangs; where its threads are:\n")
                log.flush()
                faulthandler.dump_traceback(file=log, all_threads=True)
