"""Stopping a run: the first Ctrl-C, SIGTERM, SIGUSR1, SIGHUP or a time limit asks for a checkpoint and an end."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from orchestrator.errors import Interrupted


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


MAX_HOURS = "--max-hours"
TRY_AGAIN = 75
"""Exit code of a run that was asked to make room (sysexits.h: EX_TEMPFAIL): the same command resumes."""


def deadline_after(max_hours: float | None) -> float:
    """Return the reading of `time.monotonic` so many hours from now; infinity for None."""
    return math.inf if max_hours is None else time.monotonic() + 3600 * max_hours


class StopRequest:
    """Knows whether a stop was asked for: it catches stop signals while it is entered, and watches the clock.

    A second Ctrl-C ends at once.

    Args:
        on_first: Called with the signal's name, or `--max-hours`, when a stop is first asked for.
        deadline: Reading of `time.monotonic` at which a stop is asked for.
    """

    def __init__(self, on_first: Callable[[str], None], deadline: float = math.inf) -> None:
        self._on_first, self._deadline = on_first, deadline
        self._previous: dict[int, Any] = {}
        self.signal_name: str | None = None

    def __call__(self) -> bool:
        """Return True once a stop was asked for."""
        if self.signal_name is None and time.monotonic() >= self._deadline:
            self._ask(MAX_HOURS)
        return self.signal_name is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; 75 (try again later) after another signal or the last hour."""
        return 130 if self.signal_name == "SIGINT" else TRY_AGAIN

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *_ending_signals()):
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
            self._ask(signal.Signals(number).name)

    def _ask(self, name: str) -> None:
        self.signal_name = name
        self._on_first(name)


def _ending_signals() -> list[signal.Signals]:
    """Return what asks for an end; a terminal that closes does not where `nohup` said so."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGUSR1, *hung_up]


@contextlib.contextmanager
def children_ignore_hang_up() -> Iterator[None]:
    """Let processes that start in the block outlive their terminal: it sends SIGHUP to them too, and who started them
    ends them in order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Signalled(BaseException):
    """A signal came; no `except Exception` on its way takes it for an error of what it interrupted."""


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGHUP end what stands in the block at once and in order, where no `StopRequest` takes them.

    Raises:
        Interrupted: one came; exit code 75.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise _Signalled(signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in _ending_signals()}
    try:
        yield
    except _Signalled as signalled:
        raise Interrupted(f"stopped by {signalled}; run the same command to resume", TRY_AGAIN) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
