"""A KeyboardInterrupt waits for a safe point, and is never lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from orchestrator.dispatch.signals import DeferredInterrupt, StopRequest


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Ctrl-C is heard: a shell starts what runs in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_is_raised_where_it_is_asked_for() -> None:
    before = signal.getsignal(signal.SIGINT)
    with DeferredInterrupt() as interrupt:
        press()
        reached = True
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        interrupt.check()
    assert reached
    assert signal.getsignal(signal.SIGINT) is before


def test_it_is_raised_at_the_end_where_nobody_asked() -> None:
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt():
        press()


def test_the_first_of_two_is_a_request_and_the_second_waits() -> None:
    asked: list[str] = []
    with StopRequest(asked.append) as stop, DeferredInterrupt() as interrupt:
        press()
        interrupt.check()
        assert stop() and asked == ["SIGINT"]
        press()
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
