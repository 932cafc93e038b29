"""Who owns leases and whether that owner still lives: a beat each owner writes, and how others judge it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from orchestrator.errors import StorageError
from orchestrator.plan.ledger.storage import parse_json

if TYPE_CHECKING:
    from orchestrator.plan.ledger.store import Store

_START_GRAIN_SECONDS = 0.05  # process start times are counted in ticks of 10 ms
_QUIET_FACTOR = 10


@dataclass(frozen=True)
class Process:
    """A process as it is told from all others: where it runs, its number there and when it began.

    Attributes:
        machine: Boot and process namespace; equal only where process numbers mean the same.
        host: Name of the machine, for people.
        started: Seconds since the epoch, by that machine's clock.
    """

    machine: str
    host: str
    pid: int
    started: float

    def is_gone(self) -> bool | None:
        """True or False for a process of this machine; None for one of another, of which nothing is known."""
        if self.machine != machine_id():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < _START_GRAIN_SECONDS
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return None


@functools.cache
def machine_id() -> str:
    """One text for all processes that see the same process numbers until the next boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        boot, namespace = f"{psutil.boot_time():.0f}", ""
    return f"{boot} {namespace} {socket.gethostname()}"


def this_process() -> Process:
    """The calling process."""
    return Process(machine_id(), socket.gethostname(), os.getpid(), psutil.Process().create_time())


def owner_key(owner: str) -> str:
    """Where an owner's beat lies in the store."""
    return f"owners/{owner}.json"


class Beat:
    """Rewrites an owner's file every few seconds, in a thread, for as long as the owner lives.

    Args:
        process: Whose death is the owner's death.
        every_seconds: Between two beats.
    """

    def __init__(self, store: Store, owner: str, process: Process, every_seconds: float) -> None:
        self._store, self._owner, self._process, self._every = store, owner, process, every_seconds
        self._count = 0
        self._session = secrets.token_hex(4)  # a new process of the same owner counts from 0 again, and is seen
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Writes the first beat, so that a lease is never seen before its owner; once.

        Raises:
            StorageError: the store cannot be written.
        """
        if self._thread is None:
            self._write()
            self._thread = threading.Thread(target=self._run, name=f"beat of {self._owner}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread and takes the owner's file away."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._store.delete(owner_key(self._owner))

    def _run(self) -> None:
        while not self._end.wait(self._every):
            # A store that is away for a moment: the next beat may reach it; if none does, the token tells.
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
    """

    def __init__(self, store: Store, patience_seconds: float, clock: Callable[[], float]) -> None:
        self._store, self._patience, self._clock = store, patience_seconds, clock
        self._seen: dict[str, tuple[str | None, float]] = {}

    def process(self, owner: str) -> Process | None:
        """The owner's process as its last beat tells it."""
        return _process(self._read(owner))

    def lives(self, owner: str) -> bool:
        """False once an owner is known to be dead; one that was never looked at before gets all the patience."""
        about = self._read(owner)
        process = _process(about)
        if process is not None and process.is_gone():
            return False
        beat, now = None if about is None else str(about.get("beat")), self._clock()
        known = self._seen.get(owner)
        if known is None or known[0] != beat:
            self._seen[owner] = (beat, now)
            return True
        return now - known[1] < self._patience

    def is_quiet(self, owner: str) -> bool:
        """For display only, where no one waits to see a beat change: the wall clocks say that it is long over."""
        about = self._read(owner) or {}
        last = about.get("wall_seconds")
        return not isinstance(last, int | float) or time.time() - last > _QUIET_FACTOR * self._patience

    def _read(self, owner: str) -> dict[str, Any] | None:
        return parse_json(self._store.read(owner_key(owner)))


def _process(about: dict[str, Any] | None) -> Process | None:
    try:
        return Process(*(about[name] for name in ("machine", "host", "pid", "started"))) if about else None
    except KeyError:
        return None
