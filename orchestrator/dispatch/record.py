"""Passes the conductor's events on and writes what failed to the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.dispatch.worker_log import LOG_FILE
from orchestrator.errors import StorageError

if TYPE_CHECKING:
    from orchestrator.plan.ledger import Ledger


class Teller:
    """Forwards events, each once, in order.

    Attributes:
        seen: Number of events forwarded.
    """

    def __init__(self, ledger: Ledger, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        self._ledger = ledger
        self._on_event = on_event
        self.seen = 0

    def tell(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Forwards events; a failure is in the ledger before anybody hears of it."""
        for event in events:
            self.seen += 1
            identity = event["id"]
            # A full or broken disk is no fault of the cell: once it is mended, the same command goes on.
            if event["event"] == "failed" and event.get("kind") != StorageError.__name__:
                self._ledger.write_failure(
                    identity,
                    {
                        "id": identity,
                        "type": event["type"],
                        "error": event["error"],
                        "attempts": event["attempt"],
                        "log": str(self._ledger.work_folder(identity) / LOG_FILE),
                    },
                )
            elif event["event"] == "finished":
                self._ledger.clear_failure(identity)
            self._on_event(event)
