"""The hooks of a driver that tests need: events in a list, a stop when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.dispatch.driver import Hooks


class Recorded(Hooks):
    """Keeps the events; `stop` says whether to stop. A checkpoint is said to have a gigabyte."""

    def __init__(self, events: list[dict[str, Any]] | None = None, stop: Callable[[], int] = lambda: 0) -> None:
        self.events = [] if events is None else events
        self._stop = stop

    def on_event(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))

    def stop_asked(self) -> int:
        return int(self._stop())

    def checkpoint_bytes(self) -> float:
        return 1e9
