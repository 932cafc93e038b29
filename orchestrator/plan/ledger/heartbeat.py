"""Heartbeats: each owner of leases writes one, and others judge by it whether that owner still lives."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.plan.ledger.backends.base import Backend
from orchestrator.plan.ledger.files import parse_json
from orchestrator.plan.ledger.process import Process

# For looks that trust wall clocks a little: clocks of machines differ by less than the first, and none by the second.
_SKEW_SECONDS = 300.0
_DAY_SECONDS = 86400.0
_WATCH_SECONDS = 12.0
"""Two beats and some: a look that decides nothing waits no longer for an owner whose clock says nothing."""
_LOOK_SECONDS = 0.25


def owner_key(owner: str) -> str:
    """Return where an owner's beat lies in the store."""
    return f"owners/{owner}.json"


class Beat:
    """Rewrites an owner's file every few seconds, in a thread, for as long as the owner lives.

    Args:
        process: Whose death is the owner's death.
        every_seconds: Between two beats.
    """

    def __init__(self, store: Backend, owner: str, process: Process, every_seconds: float) -> None:
        self._store, self._owner, self._process, self._every = store, owner, process, every_seconds
        self._count = 0
        self._session = secrets.token_hex(4)  # a new process of the same owner counts from 0 again, and is seen
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write the first beat, so that a lease is never seen before its owner; once.

        Raises:
            StorageError: the store cannot be written.
        """
        if self._thread is None:
            self._write()
            self._thread = threading.Thread(target=self._run, name=f"beat of {self._owner}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread and take the owner's file away."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._store.delete(owner_key(self._owner))

    def _run(self) -> None:
        while not self._end.wait(self._every):
            # A store that is away for a moment: the next beat may reach it; if none does, the token decides.
            with contextlib.suppress(StorageError):
                self._write()

    def _write(self) -> None:
        self._count += 1
        about = {"beat": f"{self._session}-{self._count}", "wall_seconds": time.time(), **asdict(self._process)}
        self._store.write(owner_key(self._owner), json.dumps(about).encode())


class Observer:
    """Judges whether other owners live.

    An owner is dead when its process is gone from this machine, or when its beat did not change for
    `patience_seconds` of this process's own clock: clocks of different machines are never compared.

    Args:
        clock: Monotonic seconds; it may stand still while this machine sleeps.
        pause: Lets some seconds of that clock pass.
    """

    def __init__(
        self,
        store: Backend,
        patience_seconds: float,
        clock: Callable[[], float],
        pause: Callable[[float], Any] = time.sleep,
    ) -> None:
        self._store, self._patience, self._clock, self._pause = store, patience_seconds, clock, pause
        self._seen: dict[str, tuple[str | None, float]] = {}
        self._moved: set[str] = set()

    def process(self, owner: str) -> Process | None:
        """Return the owner's process by its last beat."""
        return _process(self._read(owner))

    def lives(self, owner: str) -> bool:
        """Return False once an owner is known to be dead; one that was never looked at before gets all the patience."""
        return self._judge(owner, self._read(owner))

    def living(self, owners: Iterable[str], sure: bool) -> set[str]:
        """Return those of the owners that live, decided now: it waits where an owner has to be seen beating first.

        Args:
            sure: No wall clock counts, and each gets all the patience: for who takes things away. False is for
                display: a beat whose time fits this clock counts, one older than a day does not, and only for the
                rest it waits, a few seconds.
        """
        living, unsure = set(), set()
        patience = self._patience if sure else min(self._patience, _WATCH_SECONDS)
        for owner in set(owners):
            about = self._read(owner)
            process = _process(about)
            if not self._judge(owner, about):
                continue
            written = (about or {}).get("wall_seconds")
            age = time.time() - written if isinstance(written, int | float) else _DAY_SECONDS
            if owner in self._moved or (process is not None and process.is_gone() is False):
                living.add(owner)
            elif sure or not (age >= _DAY_SECONDS or abs(age) < _SKEW_SECONDS):
                unsure.add(owner)
            elif age < _DAY_SECONDS:
                living.add(owner)
        while unsure:
            for owner in list(unsure):
                if not self.lives(owner) or self._clock() - self._seen[owner][1] >= patience:
                    unsure.discard(owner)
                elif owner in self._moved:
                    unsure.discard(owner)
                    living.add(owner)
            if unsure:
                self._pause(_LOOK_SECONDS)
        return living

    def _judge(self, owner: str, about: dict[str, Any] | None) -> bool:
        process = _process(about)
        if process is not None and process.is_gone():
            return False
        beat, now = None if about is None else str(about.get("beat")), self._clock()
        known = self._seen.get(owner)
        if known is None or known[0] != beat:
            self._seen[owner] = (beat, now)
            if known is not None and beat is not None:
                self._moved.add(owner)
            return True
        if now - known[1] < self._patience:
            return True
        self._moved.discard(owner)
        return False

    def _read(self, owner: str) -> dict[str, Any] | None:
        return parse_json(self._store.read(owner_key(owner)))


def _process(about: dict[str, Any] | None) -> Process | None:
    try:
        return Process(*(about[name] for name in ("machine", "host", "pid", "started", "began"))) if about else None
    except KeyError:
        return None
