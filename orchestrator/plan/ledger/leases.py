"""Leases and the heartbeats of their owners: which driver works on what, so that several share one storage.

A lease is a file `leases/NAME/000007.json` that only one can create. The highest number holds, and is the fencing
token under which its work is written: a writer that sees a higher one has lost its lease. Of a name's files the
highest always stays until `forget`, so tokens never go down while someone may still write under one.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.plan.ledger.backends.base import ID, Backend, checked
from orchestrator.plan.ledger.files import parse_json
from orchestrator.plan.ledger.process import Process, this_process

# For looks that trust wall clocks a little: clocks of machines differ by less than the first, and none by the second.
_SKEW_SECONDS = 300.0
_DAY_SECONDS = 86400.0
_WATCH_SECONDS = 12.0
"""Two beats and some: a look that decides nothing waits no longer for an owner whose clock says nothing."""
_LOOK_SECONDS = 0.25
_LOOKS = 100  # each is lost to another owner who was quicker


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    owner: str
    lane: str
    host: str
    pid: int


@dataclass(frozen=True)
class _Lease:
    """Content of a lease file; `tries` is 0, and in the file for drivers that were written when it was not."""

    owner: str
    lane: str = ""
    tries: int = 0
    released: bool = False


class Leases:
    """The leases of one owner: one driver, or a later process of it.

    Every method raises StorageError where the store cannot be read or written.

    Args:
        store: Where they lie.
        owner: The driver's id: letters, digits, `_`, `-`.
        patience_seconds: How long a beat may stay unchanged before its owner counts as dead.
        beat_seconds: Between two beats of this owner; they begin with the first `acquire`.
        clock: Monotonic seconds of this observer.
        process: Whose death is the owner's death; None takes the calling process. A conductor that its driver
            starts again names the driver's, or other drivers take over while it is away.
        pause: Lets seconds of that clock pass.
    """

    def __init__(
        self,
        store: Backend,
        owner: str,
        patience_seconds: float = 30.0,
        beat_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        process: Process | None = None,
        pause: Callable[[float], Any] = time.sleep,
    ) -> None:
        self._store, self._owner = store, checked(owner)
        self._beat = Beat(store, owner, process or this_process(), beat_seconds)
        self._observer = Observer(store, patience_seconds, clock, pause)
        self._tokens: dict[str, int] | None = None

    def acquire(self, name: str, lane: str = "") -> int | None:
        """Take a lease that is free, released or a dead owner's; look into the ledger only after it is yours.

        Args:
            name: What it is for: a job's id.
            lane: Who of this owner works on it.

        Returns:
            The token; the same one again for an own lease; None while another living owner holds it.
        """
        mine = self._mine()
        self._beat.start()
        number = self._store.token_of(name)
        for _ in range(_LOOKS):
            lease = self._read(name, number)
            if lease is None and number and number != (newest := self._store.token_of(name)):
                number = newest  # it was cleaned up since the listing, and its numbers may begin anew
                continue
            # None still: there is none, or it is damaged; the next number settles that.
            if lease is not None and not lease.released:
                if lease.owner == self._owner:
                    return self._keep(name, number, replace(lease, lane=lane))
                if self._observer.lives(lease.owner):
                    mine.pop(name, None)
                    return None
            if self._create(name, number + 1, _Lease(self._owner, lane)):
                mine[name] = number + 1
                return number + 1
            number = max(number + 1, self._store.token_of(name))
        return None

    def _create(self, name: str, number: int, lease: _Lease) -> bool:
        if not self._store.create(_key(name, number), _dump(lease)):
            return False
        numbers = self._store.lease_numbers(name)
        # The number may have been used and cleaned up since the look: then a higher one is there and holds.
        if numbers and numbers[-1] > number:
            self._store.delete(_key(name, number))
            return False
        for old in numbers:
            if old < number:
                self._store.delete(_key(name, old))
        return True

    def _keep(self, name: str, token: int, lease: _Lease) -> int:
        if lease != self._read(name, token):
            self._store.write(_key(name, token), _dump(lease))
        self._mine()[name] = token
        return token

    def release(self, name: str) -> None:
        """Let go of an own lease; one that was lost or never held stays as it is."""
        if (lease := self._own(name)) is not None:
            # Lost in this very moment: the file comes back below the new holder's, and its next change cleans it up.
            self._store.write(_key(name, self._mine()[name]), _dump(replace(lease, released=True)))
        self._mine().pop(name, None)

    def forget(self, name: str) -> None:
        """Take an own lease away with its number: only for a job that is stored, where a late writer finds it done."""
        if self._own(name) is not None:
            for number in self._store.lease_numbers(name):
                self._store.delete(_key(name, number))
        self._mine().pop(name, None)

    def holds(self, name: str) -> bool:
        """Return True while the lease is this owner's; false once another took it, as after a long suspension."""
        return self._own(name) is not None

    def held(self) -> dict[str, str]:
        """Return the name to lane of all that this owner holds, taken by earlier processes of it too."""
        if self._mine():
            self._beat.start()  # its work may take hours before the next `acquire`
        found = {name: self._own(name) for name in sorted(self._mine())}
        return {name: lease.lane for name, lease in found.items() if lease is not None}

    def holder(self, name: str) -> Holder | None:
        """Return the living owner of a lease, for people; None where it is free."""
        return self.holders([name]).get(name)

    def holders(self, names: Iterable[str] | None = None, sure: bool = False) -> dict[str, Holder]:
        """Return the leases that living owners hold: all there are, by one listing, or those named.

        Args:
            sure: For who takes things away (`Observer.living`): owners of other machines are watched until they beat.
        """
        if names is None:
            names = [name for name in self._store.names("leases") if ID.fullmatch(name)]
        leases = {name: self._read(name, self._store.token_of(name)) for name in names}
        held = {name: lease for name, lease in leases.items() if lease is not None and not lease.released}
        living = self._observer.living({lease.owner for lease in held.values()}, sure)
        processes = {owner: process_of(self._store, owner) for owner in living}
        return {
            name: Holder(lease.owner, lease.lane, process.host, process.pid)
            for name, lease in held.items()
            if (process := processes.get(lease.owner)) is not None
        }

    def close(self) -> None:
        """Release all leases and end the beat."""
        try:
            for name in list(self._tokens or {}):
                self.release(name)
        finally:
            self._beat.stop()

    def _mine(self) -> dict[str, int]:
        """Return the tokens this owner was given; an earlier process's are looked for once."""
        if self._tokens is None:
            self._tokens = {}
            later = self._store.read(owner_key(self._owner)) is not None  # most owners have one process only
            for name in self._store.names("leases") if later else ():
                number = self._store.token_of(name) if ID.fullmatch(name) else 0
                lease = self._read(name, number)
                if lease is not None and lease.owner == self._owner and not lease.released:
                    self._tokens[name] = number
        return self._tokens

    def _own(self, name: str) -> _Lease | None:
        token = self._mine().get(name)
        if token is None or self._store.token_of(name) != token:
            return None
        lease = self._read(name, token)
        return lease if lease is not None and lease.owner == self._owner and not lease.released else None

    def _read(self, name: str, number: int) -> _Lease | None:
        found = parse_json(self._store.read(_key(name, number))) if number else None
        try:
            return _Lease(**found) if found is not None else None
        except TypeError:
            return None


def _key(name: str, number: int) -> str:
    return f"leases/{checked(name)}/{number:06d}.json"


def _dump(lease: _Lease) -> bytes:
    return json.dumps(asdict(lease)).encode()


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
        """Write the first beat, so that a lease is never seen before its owner; once."""
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


def process_of(store: Backend, owner: str) -> Process | None:
    """Return an owner's process by its last beat."""
    return _process(parse_json(store.read(owner_key(owner))))


def _process(about: dict[str, Any] | None) -> Process | None:
    try:
        return Process(*(about[name] for name in ("machine", "host", "pid", "started", "began"))) if about else None
    except KeyError:
        return None
