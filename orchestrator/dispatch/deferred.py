"""Holds a KeyboardInterrupt back until a safe point: raised inside Ray's C++ calls it can crash the process."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class DeferredInterrupt:
    """While entered, whatever SIGINT's handler does is done at once, but a KeyboardInterrupt it raises waits.

    Seen with Ray 2.60: a KeyboardInterrupt out of `ray.get` while another thread waits in Ray ended the driver with
    SIGSEGV in about one of four runs.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._installed = False
        self.pending = False

    def check(self) -> None:
        """Raise what was held back.

        Raises:
            KeyboardInterrupt: SIGINT's handler asked for it.
        """
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt

    def __enter__(self) -> DeferredInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            if callable(self._previous):
                signal.signal(signal.SIGINT, self._handle)
                self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
        if error is None:
            self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        try:
            self._previous(number, frame)
        except KeyboardInterrupt:
            self.pending = True
