"""Stopping a run: the first Ctrl-C, SIGTERM or SIGUSR1 asks for a checkpoint and an end, a second Ctrl-C ends now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Catches stop signals while it is entered; call it to know whether a stop was asked for.

    Args:
        on_first: Called with the signal's name at the first one.
    """

    def __init__(self, on_first: Callable[[str], None]) -> None:
        self._on_first = on_first
        self._previous: dict[int, Any] = {}
        self.signal_name: str | None = None

    def __call__(self) -> bool:
        """True once a stop was asked for."""
        return self.signal_name is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; 75 (try again later) after SIGTERM or SIGUSR1."""
        return 130 if self.signal_name == "SIGINT" else 75

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._on_first(self.signal_name)
