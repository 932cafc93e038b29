"""Leases: which driver works on what, so that several share one storage; numbered files are the fencing tokens.

A lease is a file `leases/NAME/000007.json` that only one can create. The highest number holds, and its number is the
token under which its work is written: a writer that sees a higher one has lost its lease. Of a name's files the
highest always stays until `forget`, so tokens never go down while someone may still write under one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.plan.ledger.backends.base import ID, Backend, checked
from orchestrator.plan.ledger.files import parse_json
from orchestrator.plan.ledger.heartbeat import Beat, Observer, owner_key
from orchestrator.plan.ledger.process import Process, this_process

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
        processes = {owner: self._observer.process(owner) for owner in living}
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
