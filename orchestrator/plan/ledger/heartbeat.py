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
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from orchestrator.errors import StorageError
from orchestrator.plan.ledger.files import parse_json

if TYPE_CHECKING:
    from orchestrator.plan.ledger.store import Store

# For looks that trust wall clocks a little: clocks of machines differ by less than the first, and none by the second.
_SKEW_SECONDS = 300.0
_DAY_SECONDS = 86400.0
_WATCH_SECONDS = 12.0
"""Two beats and some: who looks without deciding anything waits no longer for an owner whose clock tells nothing."""
_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Process:
    """A process as it is told from all others: where it runs, its number there and when it began.

    Attributes:
        machine: Boot and namespaces; equal only where process numbers and starts mean the same.
        host: Name of the machine, for people.
        started: Clock ticks from the machine's boot to its start, which no setting of the clock moves; -1 where the
            system does not tell them.
        began: When it began by its machine's clock, in seconds since the epoch: never to tell processes apart.
    """

    machine: str
    host: str
    pid: int
    started: int
    began: float = 0.0

    def is_gone(self) -> bool | None:
        """Return True or False for a process of this machine; None for one of another, or where the system does not
        tell.
        """
        if self.machine != machine_id():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # another user's: it is there
            pass
        found = _stat(str(self.pid))
        if found is None or self.started < 0:
            return None  # the number is in use, by this process or a later one
        state, started = found
        return state in "ZX" or started != self.started


@functools.cache
def machine_id() -> str:
    """Return one text for all processes that see the same process numbers and start ticks until the next boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink("/proc/self/ns/pid")]
    except OSError:  # not Linux: where the boot time moves with the clock, processes before are another machine's
        boot, spaces = f"{psutil.boot_time():.0f}-{uuid.getnode():012x}", []
    with contextlib.suppress(OSError):  # a time namespace of its own counts from another start; old kernels have none
        spaces.append(os.readlink("/proc/self/ns/time"))
    return " ".join([boot, *spaces, socket.gethostname()])


def start_ticks(pid: int | None = None) -> int:
    """Return the clock ticks from boot to the start of a process (None: the calling one); -1 where the system does
    not tell.
    """
    found = _stat("self" if pid is None else str(pid))
    return found[1] if found is not None else -1


def _stat(name: str) -> tuple[str, int] | None:
    """Return the state and start ticks of a process (`man 5 proc`, fields 3 and 22 of `stat`); None where they cannot
    be read.
    """
    try:
        # Another namespace's /proc, as in a container that mounts its host's, has other processes under these numbers.
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def this_process() -> Process:
    """Return the calling process."""
    began = psutil.Process().create_time()
    return Process(machine_id(), socket.gethostname(), os.getpid(), start_ticks(), began)


def owner_key(owner: str) -> str:
    """Return where an owner's beat lies in the store."""
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
        pause: Lets some seconds of that clock pass.
    """

    def __init__(
        self,
        store: Store,
        patience_seconds: float,
        clock: Callable[[], float],
        pause: Callable[[float], Any] = time.sleep,
    ) -> None:
        self._store, self._patience, self._clock, self._pause = store, patience_seconds, clock, pause
        self._seen: dict[str, tuple[str | None, float]] = {}
        self._moved: set[str] = set()

    def process(self, owner: str) -> Process | None:
        """Return the owner's process as its last beat tells it."""
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
            told = (about or {}).get("wall_seconds")
            age = time.time() - told if isinstance(told, int | float) else _DAY_SECONDS
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
