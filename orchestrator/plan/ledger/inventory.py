"""Inventory of a storage: recorded experiments and what each reaches, what is stored, what is damaged, what can go.

Every function raises StorageError where the storage cannot be read or written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

from orchestrator.errors import StorageError, UsageError
from orchestrator.plan.jobs import Keep
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.backends.base import PARTS, PARTS_OF, Backend, Leftover, Part, files_of, most
from orchestrator.plan.ledger.backends.folder import remove
from orchestrator.plan.ledger.backends.s3 import copies, copies_folder
from orchestrator.plan.ledger.files import is_there, parse_json, parse_note
from orchestrator.plan.ledger.leases import Holder, Leases, owner_key, process_of

FOLDER = "experiments"
LEFTOVER_SECONDS = 600.0
PATIENCE_SECONDS = 30.0
CLOCK_SECONDS = 86400.0
"""No two clocks differ by more: a file's time and the start of a driver come from different ones."""
COPY_SECONDS = 30 * CLOCK_SECONDS
_UNREACHED = "no recorded experiment reaches it"


@dataclass(frozen=True)
class Recorded:
    """One experiment: the newest plan of a file under its `--set` settings.

    Attributes:
        key: Where it lies in the store.
        file: Its file, for people.
        when: When it was recorded, in seconds since the epoch.
        states: State to what is to be kept of it: `full`, `weights` or `none`.
        evaluations: Ids.
        cells: Name of a cell to the states it stands on.
    """

    key: str
    name: str
    file: str
    when: float
    states: dict[str, Keep]
    evaluations: frozenset[str]
    cells: dict[str, list[str]]


def recorded_experiments(store: Backend) -> list[Recorded]:
    """Return all recorded experiments, by key.

    Raises:
        StorageError: a record cannot be read, or is damaged: without it `gc` would delete its states.
    """
    keys = [f"{FOLDER}/{entry}" for entry in store.names(FOLDER)]
    return [_parsed(store.url, key, data) for key in keys if (data := store.read(key)) is not None]


@lru_cache(maxsize=64)
def _parsed(url: str, key: str, data: bytes) -> Recorded:
    """Return a parsed file, kept for as long as it does not change: `gc` asks again before each step."""
    note = parse_note(key, data)
    try:
        assert note is not None
        evaluations = frozenset(note.pop("evaluations"))
        return Recorded(key=key, evaluations=evaluations, **note)
    except (AssertionError, KeyError, TypeError) as error:
        raise StorageError(f"{url}/{key} is damaged; run its experiment again, or take the file away") from error


def ledger_document(ledger: Ledger) -> dict[str, Any]:
    """Return what `ledger ls --json` prints: sizes in bytes, times in seconds since the epoch."""
    store, experiments, holders = ledger.store, recorded_experiments(ledger.store), ledger.living_holders()
    reached: dict[str, list[tuple[str, str]]] = {}
    for each in experiments:
        for cell, known in each.cells.items():
            for state in known:
                reached.setdefault(state, []).append((each.name, cell))
    states = [_state(ledger, state, reached.get(state, [])) for state in store.states()]
    work = [
        {"id": job, "bytes": size, "steps": sorted(store.steps(job)), "running": job in holders}
        for job, size in store.work().items()
        if ledger.evaluation(job) is None  # the log of a finished evaluation lies there
    ]
    return {
        "storage": ledger.url,
        "bytes": sum(entry["bytes"] for entry in (*states, *work)),
        "experiments": [_experiment(each) for each in experiments],
        "states": states,
        "work": work,
        "evaluations": [_evaluation(ledger, name, experiments) for name in _notes(ledger, "evaluations")],
        "failures": [{"id": name, "error": _first_line(ledger, name)} for name in _notes(ledger, "failures")],
        "leases": [{"id": name, **asdict(holder)} for name, holder in holders.items()],
        "searches": [{"id": name, **_trial_counts(store, name)} for name in store.names("searches")],
    }


def damage(ledger: Ledger) -> list[dict[str, Any]]:
    """Return `kind`, `id`, `step` and `files` of damaged states, in-stage checkpoints and evaluations; every byte is
    read.
    """
    store = ledger.store
    found: list[dict[str, Any]] = []
    for state in store.states():
        if files := store.damaged(state) or _cut_curve(ledger, state):
            found.append({"kind": "state", "id": state, "files": files})
    for job in store.work():
        for step in sorted(store.steps(job)):
            if files := store.damaged_step(job, step):
                found.append({"kind": "checkpoint", "id": job, "step": step, "files": files})
    for name in _notes(ledger, "evaluations"):
        if files := ledger.damaged_evaluation(name):
            found.append({"kind": "evaluation", "id": name, "files": files})
    return found


def _cut_curve(ledger: Ledger, state: str) -> list[str]:
    """Return the metrics of a stage run where a step is missing in them, though they are what was committed."""
    if "steps" not in (ledger.result(state) or {}):
        return []
    job, file = ledger.job(state) or {}, ledger.metrics_file(state)
    lines = file.read_bytes().splitlines() if is_there(file) else []
    steps = [(parse_json(line) or {}).get("step") for line in lines]
    return [] if steps == list(range(job["first_step"], job["last_step"])) else [file.name]


def discard_damage(ledger: Ledger, found: Sequence[dict[str, Any]]) -> None:
    """Take out what is damaged, so that `run` does it again."""
    for entry in found:
        if entry["kind"] == "state":
            ledger.discard(entry["id"])
        elif entry["kind"] == "evaluation":
            ledger.discard_evaluation(entry["id"])
        else:
            ledger.store.drop_step(entry["id"], entry["step"])


def _experiment(each: Recorded) -> dict[str, Any]:
    counts = {"cells": len(each.cells), "states": len(each.states), "evaluations": len(each.evaluations)}
    return {"name": each.name, "file": each.file, "when": each.when, **counts}


def _state(ledger: Ledger, state: str, reached: Sequence[tuple[str, str]]) -> dict[str, Any]:
    files = ledger.store.files(state)
    job = ledger.job(state) or {} if files is not None else {}
    return {
        "id": state,
        "type": job.get("type"),
        "phase": job.get("phase"),
        "first_step": job.get("first_step"),
        "last_step": job.get("last_step"),
        "kept": [part for part in PARTS if files_of(part, files or {})],
        "bytes": sum(int(entry["size"]) for entry in (files or {}).values()),
        "when": ledger.store.when(state),
        "whole": files is not None and ledger.is_done(state),
        "experiments": list(dict.fromkeys(experiment for experiment, _ in reached)),
        "cells": [cell for _, cell in reached],
    }


def _evaluation(ledger: Ledger, name: str, experiments: Sequence[Recorded]) -> dict[str, Any]:
    result = ledger.evaluation(name) or {}
    reached = [each.name for each in experiments if name in each.evaluations]
    return {"id": name, "metrics": result.get("metrics") or {}, "experiments": reached}


def _trial_counts(store: Backend, search: str) -> dict[str, int]:
    names = [name for name in store.names(f"searches/{search}") if name.startswith("trial_")]
    states = [(parse_json(store.read(f"searches/{search}/{name}")) or {}).get("state") for name in names]
    return {state: states.count(state) for state in ("proposed", "finished", "failed")}


def _notes(ledger: Ledger, kind: str) -> list[str]:
    return [name.removesuffix(".json") for name in ledger.store.names(kind)]


def _first_line(ledger: Ledger, job: str) -> str:
    lines = str((ledger.failure(job) or {}).get("error", "")).strip().splitlines()
    return lines[0] if lines else ""


@dataclass(frozen=True)
class GcStep:
    """One thing that can go.

    Attributes:
        kind: `state`, `part`, `work`, `leftover`, `failure`, `lease`, `owner`, `record` or `copy`.
        name: Which.
        why: Why it can go.
        size: Bytes that it frees.
        delete: Deletes it; returns False where it stays, since it is wanted by now.
    """

    kind: str
    name: str
    why: str
    size: int
    delete: Callable[[], bool | None]

    def remove(self) -> bool:
        """Delete it; False where it stayed."""
        return self.delete() is not False


class Collector:
    """Finds what can go in a storage. Nothing is taken that a living driver works on.

    Args:
        ledger: The storage.
        also: Experiments that count as recorded: those named in the call.
        forget: Names of recorded experiments that do not count any more.
        leftover_seconds: Unsealed files that changed since are left alone.
        sure: For who takes things away: a driver on another machine counts as dead only when its beat did not change
            while it was watched. False looks at its clock first, and says what will probably go.
        clock: Monotonic seconds.
        pause: Lets some of them pass.

    Raises:
        UsageError: a name in `forget` is not recorded.
        StorageError: a record cannot be read.
    """

    def __init__(
        self,
        ledger: Ledger,
        also: Sequence[Recorded] = (),
        forget: Collection[str] = (),
        leftover_seconds: float = LEFTOVER_SECONDS,
        sure: bool = True,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Any] = time.sleep,
    ) -> None:
        self._ledger, self._also, self._forget = ledger, tuple(also), frozenset(forget)
        self._store = ledger.store
        self._leftover_seconds, self._sure = leftover_seconds, sure
        self._pause = pause
        self._onlooker = Leases(ledger.store, "onlooker", PATIENCE_SECONDS, clock=clock, pause=pause)
        known = {each.name for each in recorded_experiments(ledger.store)}
        if unknown := sorted(self._forget - known):
            names = ", ".join(sorted(known)) or "none"
            raise UsageError(f"forget {unknown[0]}: no such experiment is recorded in {ledger.url}; there are: {names}")

    def steps(self) -> list[GcStep]:
        """Return all that can go, in the order in which it should; what a killed gc took aside is back before that."""
        wanted = self._wanted()
        for state in self._store.aside() if self._sure else ():
            if not self.has_records or state in wanted.states:
                self._ledger.recover(state)
        states_too = self.has_records or not self._store.states()
        return [*(self._records() if states_too else ()), *self._unused(wanted, states_too)]

    @property
    def has_records(self) -> bool:
        """False where no experiment counts: then every finished state stays."""
        return bool(self._experiments())

    def _experiments(self) -> list[Recorded]:
        return [*(each for each in recorded_experiments(self._store) if each.name not in self._forget), *self._also]

    def _wanted(self) -> Wanted:
        return Wanted(self._experiments())

    def _records(self) -> Iterator[GcStep]:
        for each in recorded_experiments(self._store):
            if each.name in self._forget:
                yield GcStep("record", each.name, "to be forgotten", 0, partial(self._store.delete, each.key))

    def _unused(self, wanted: Wanted, states_too: bool) -> Iterator[GcStep]:
        holders = self._onlooker.holders(sure=self._sure)
        since = self._oldest_driver(holders)
        if states_too:
            yield from self._states(wanted, holders, since)
        yield from self._work(wanted, holders, states_too)
        for left in self._leftovers(holders):
            yield GcStep("leftover", left.what, "its writer is dead", left.size, left.remove)
        if states_too:
            yield from self._failures(wanted, holders)
        yield from self._leases(holders)
        yield from self._copies(wanted, holders, states_too)

    def _states(self, wanted: Wanted, holders: Collection[str], since: float | None) -> Iterator[GcStep]:
        for state in self._store.states():
            if state in holders:
                continue
            files = self._store.files(state) or {}
            keep = wanted.states.get(state)
            if keep is None:
                when = self._store.when(state)
                if since is None or (when is not None and when < since - CLOCK_SECONDS):
                    size = sum(int(entry["size"]) for entry in files.values())
                    yield GcStep("state", state, _UNREACHED, size, partial(self._take_out, state))
                continue
            for part in reversed(PARTS):
                sizes = [int(entry["size"]) for entry in files_of(part, files).values()]
                if sizes and part not in PARTS_OF[keep]:
                    why = f"its {part} is more than is to be kept: {keep}"
                    yield GcStep("part", state, why, sum(sizes), partial(self._drop, state, part))

    def _work(self, wanted: Wanted, holders: Collection[str], states_too: bool) -> Iterator[GcStep]:
        for job, size in self._store.work().items():
            if job in holders:
                continue
            done = self._ledger.is_done(job)
            if done or (states_too and not wanted.reaches(job)):
                why = "its stage run is finished" if done else "no recorded experiment reaches its stage run"
                yield GcStep("work", job, why, size, partial(self._end_work, job))

    def _leftovers(self, holders: Collection[str]) -> list[Leftover]:
        """Return what dead writers left; with `sure`, recent files count only if they do not change while watched."""
        found = list(self._store.leftovers(holders.__contains__, self._leftover_seconds))
        watched = {left.what: left.changed() for left in found if time.time() - left.changed() < CLOCK_SECONDS}
        if self._sure and watched:
            self._pause(PATIENCE_SECONDS)
            found = [left for left in found if left.what not in watched or left.changed() == watched[left.what]]
        return found

    def _failures(self, wanted: Wanted, holders: Collection[str]) -> Iterator[GcStep]:
        """Yield failures that nothing reaches; results of evaluations stay, since they are small and were shown."""
        for entry in self._store.names("failures"):
            job = entry.removesuffix(".json")
            if not wanted.reaches(job) and job not in holders:
                yield GcStep("failure", job, _UNREACHED, 0, partial(self._store.delete, f"failures/{entry}"))

    def _leases(self, holders: Collection[str]) -> Iterator[GcStep]:
        """Yield leases of finished jobs and files of dead owners; of other leases the numbers must never go down."""
        store, held = self._store, set(holders)
        for job in store.names("leases"):
            if job not in held and self._is_finished(job):
                for number in store.names(f"leases/{job}"):
                    key = f"leases/{job}/{number}"
                    yield GcStep("lease", key, "its job is finished", 0, partial(self._delete_lease, job, key))
        for entry in store.names("owners"):
            owner = entry.removesuffix(".json")
            process = process_of(store, owner)
            if process is not None and process.is_gone():
                yield GcStep("owner", owner, "its process is gone", 0, partial(self._store.delete, owner_key(owner)))

    def _copies(self, wanted: Wanted, holders: Collection[str], states_too: bool) -> Iterator[GcStep]:
        """Return what lies on this machine of buckets; the bucket itself loses nothing.

        Of this storage goes, once it was not used for a day, what the bucket has no more or no recorded experiment
        reaches; of any bucket what was not used for thirty days. Nothing goes that a living driver works on.
        """
        for copy in copies():
            unused = time.time() - copy.used
            own = copy.storage == self._ledger.storage and copy.kind in ("stage_runs", "work", "elsewhere")
            why = None
            if own and copy.name in holders:
                continue
            if unused > COPY_SECONDS:
                why = f"not used for {COPY_SECONDS / CLOCK_SECONDS:.0f} days"
            elif own and unused > CLOCK_SECONDS:
                is_there = self._ledger.is_done(copy.name)
                if copy.kind == "stage_runs" and not is_there:
                    why = "the bucket has it no more"
                elif copy.kind != "stage_runs" and is_there:
                    why = "its stage run is finished"
                elif states_too and not wanted.reaches(copy.name):
                    why = _UNREACHED
            if why is not None:
                name = copy.path.relative_to(copies_folder()).as_posix()
                yield GcStep("copy", name, f"a copy on this machine: {why}", copy.size, partial(remove, copy.path))

    def _oldest_driver(self, holders: dict[str, Holder]) -> float | None:
        """Return when the first living driver began: what was finished since may be its work under an older plan."""
        owners = {holder.owner for holder in holders.values()}
        about = [parse_json(self._store.read(owner_key(owner))) or {} for owner in owners]
        return min((float(each.get("began", 0.0)) for each in about), default=None)

    def _take_out(self, state: str) -> bool:
        return self._store.take_out(state, lambda: state in self._wanted().states or self._is_held(state))

    def _drop(self, state: str, part: Part) -> bool:
        if part in PARTS_OF[self._wanted().states.get(state, "none")]:
            return False
        self._store.drop(state, part)
        return True

    def _end_work(self, job: str) -> bool:
        # A run records what it reaches, then holds it: one that began since the look is seen by either.
        if (not self._ledger.is_done(job) and self._wanted().reaches(job)) or self._is_held(job):
            return False
        self._store.end_work(job)
        return True

    def _delete_lease(self, job: str, key: str) -> bool:
        if self._is_held(job) or not self._is_finished(job):  # it is done again, as after damage
            return False
        self._store.delete(key)
        return True

    def _is_held(self, job: str) -> bool:
        return bool(self._onlooker.holders([job], sure=True))

    def _is_finished(self, job: str) -> bool:
        return self._ledger.is_done(job) or self._ledger.evaluation(job) is not None


class Wanted:
    """What experiments reach: states, with the most that any of them keeps of each, and evaluations."""

    def __init__(self, experiments: Sequence[Recorded]) -> None:
        self.states: dict[str, Keep] = {}
        for state, keep in (item for each in experiments for item in each.states.items()):
            self.states[state] = most(keep, self.states.get(state, "none"))
        self.evaluations = frozenset[str]().union(*(each.evaluations for each in experiments))

    def reaches(self, job: str) -> bool:
        """Return whether any of them needs a job's result."""
        return job in self.states or job in self.evaluations
