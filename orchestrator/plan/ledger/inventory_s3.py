"""What lies in a bucket: states by their manifests, work under way, objects that nothing names (`states_s3.py`)."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.plan.identity import digest, file_sha256
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import MANIFEST
from orchestrator.plan.ledger.inventory import Leftover
from orchestrator.plan.ledger.leases import token_of
from orchestrator.plan.ledger.states import Files
from orchestrator.plan.ledger.states_s3 import object_key, whole_manifest
from orchestrator.plan.ledger.store_s3 import S3Store

_STEP = re.compile(r"step_([0-9]+)\.json")


class S3Inventory:
    """The inventory of a storage in a bucket; this machine's copy of it is not looked at."""

    def __init__(self, ledger: Ledger) -> None:
        assert isinstance(ledger.store, S3Store)
        self._store = ledger.store

    def states(self) -> list[str]:
        """Return all states, whole or not, sorted."""
        return [name.removesuffix(".json") for name in self._store.names("manifests")]

    def files(self, state: str) -> Files | None:
        """Return the name to size in bytes and SHA-256; None where the manifest is missing or damaged."""
        return self._named(f"manifests/{state}.json")

    def when(self, state: str) -> float | None:
        """Not known: a listing of the bucket does not tell it here."""
        return None

    def damaged(self, state: str) -> list[str]:
        """Return the files of a state that are missing, cut short or changed: every object is downloaded and read."""
        return self._damaged(state, f"manifests/{state}.json")

    def work(self) -> dict[str, int]:
        """Return the stage runs under way to the bytes of their in-stage checkpoints and of what they told."""
        found = {}
        for job in self._store.names("work"):
            sizes = self._store.sizes(f"objects/{job}")
            steps = {object_key(job, e): 0 for step in self._steps(job) for e in (self._named(step) or {}).values()}
            state = {object_key(job, entry) for entry in (self.files(job) or {}).values()}
            own = sum(size for key, size in sizes.items() if key in steps and key not in state)
            found[job] = own + sum(self._store.sizes(f"work/{job}").values())
        return found

    def steps(self, job: str) -> dict[int, Callable[[], list[str]]]:
        """Return the sealed in-stage checkpoints, each with what reads every byte of it and tells the damaged files."""
        return {_step_of(key): partial(self._damaged, job, key) for key in self._steps(job)}

    def take_out(self, state: str, is_wanted: Callable[[], bool]) -> bool:
        """Delete the manifest, ask once more, and writes it back or delete the objects."""
        key, aside = f"manifests/{state}.json", f"aside/{state}.json"
        data, newest = self._store.read(key), token_of(self._store, state)
        if data is None:
            return False
        self._store.write(aside, data)
        self._store.delete(key)
        if is_wanted():
            self._store.create(key, data)  # trained again meanwhile: then that one counts
            self._store.delete(aside)
            return False
        self._store.delete(aside)
        self._sweep(state, newest)
        return True

    def aside(self) -> list[str]:
        """Return the states that a gc had taken aside when it was killed: `Ledger.recover` puts one back."""
        return [name.removesuffix(".json") for name in self._store.names("aside")]

    def drop(self, state: str, part: str) -> None:
        """Return the manifest forgets the part before its objects go."""
        key = f"manifests/{state}.json"
        found = whole_manifest(self._store.read(key))
        if found is None:
            return
        kept = {name: entry for name, entry in found["files"].items() if not name.startswith(f"{part}/")}
        newest = token_of(self._store, state)
        self._store.write(key, json.dumps({**found, "files": kept, "sha256": digest(kept)}).encode())
        self._sweep(state, newest)

    def end_work(self, job: str) -> None:
        """Take a stage run's sealed and unsealed files away; of a finished one the log that it told stays."""
        told, kept, newest = f"work/{job}/log.txt", f"logs/{job}/log.txt", token_of(self._store, job)
        if self.files(job) is not None and not self._store.names(f"logs/{job}") and (log := self._store.read(told)):
            self._store.write(kept, log)
        self._store.delete_all(f"work/{job}")
        self._sweep(job, newest)

    def drop_step(self, job: str, step: int) -> None:
        """Take one in-stage checkpoint away."""
        newest = token_of(self._store, job)
        self._store.delete(f"work/{job}/step_{step:06d}.json")
        self._sweep(job, newest)

    def leftovers(self, is_held: Callable[[str], bool], older_seconds: float) -> Iterator[Leftover]:
        """Return the objects that neither a state nor an in-stage checkpoint names; who writes them holds a lease."""
        for state in self.aside():  # of a gc that was killed; who wants one has had it put back
            if not is_held(state):
                yield Leftover(f"aside/{state}.json", 0, partial(self._settle, state, token_of(self._store, state)))
        for job in self._store.names("objects"):
            if not is_held(job) and (size := sum(self._unnamed(job).values())):
                yield Leftover(f"objects/{job}", size, partial(self._sweep, job, token_of(self._store, job)))

    def _named(self, key: str) -> Files | None:
        found = whole_manifest(self._store.read(key))
        return found["files"] if found is not None else None

    def _steps(self, job: str) -> list[str]:
        return [f"work/{job}/{name}" for name in self._store.names(f"work/{job}") if _STEP.fullmatch(name)]

    def _unnamed(self, job: str) -> dict[str, int]:
        stored = self._store.sizes(f"objects/{job}")  # first: what is uploaded after that is not taken for unnamed
        named = [self._named(key) or {} for key in (f"manifests/{job}.json", f"aside/{job}.json", *self._steps(job))]
        known = {object_key(job, entry) for files in named for entry in files.values()}
        return {key: size for key, size in stored.items() if key not in known}

    def _settle(self, state: str, newest: int) -> None:
        self._store.delete(f"aside/{state}.json")
        self._sweep(state, newest)

    def _sweep(self, job: str, newest: int) -> None:
        """Take away what nothing names, unless a driver was given a token since the `newest` was seen."""
        unnamed = self._unnamed(job)
        if token_of(self._store, job) == newest:
            self._store.delete_keys(unnamed)

    def _damaged(self, job: str, key: str) -> list[str]:
        files = self._named(key)
        if files is None:
            return [MANIFEST]
        bad: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "object"
            for name, entry in files.items():  # one at a time: the largest decides what disk it takes
                copy.unlink(missing_ok=True)
                self._store.download({copy: object_key(job, entry)})
                if not _is(copy, entry):
                    bad.append(name)
        return bad


def _step_of(key: str) -> int:
    return int(key.rpartition("step_")[2].removesuffix(".json"))


def _is(file: Path, entry: dict[str, Any]) -> bool:
    return file.exists() and file.stat().st_size == entry["size"] and file_sha256(file) == entry["sha256"]
