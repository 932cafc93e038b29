"""Experiments as `run` and `search` record them in a storage: what of the ledger each of them reaches."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from orchestrator.plan.identity import digest
from orchestrator.plan.ledger.ledger import as_name
from orchestrator.plan.ledger.storage import dump_json, parse_json
from orchestrator.plan.ledger.store import Store

if TYPE_CHECKING:
    from orchestrator.plan.walk import Walk

KEPT = ("none", "weights", "full")
_FOLDER = "experiments"


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
    states: dict[str, str]
    evaluations: frozenset[str]
    cells: dict[str, list[str]]


def reach_of(walk: Walk) -> Recorded:
    """Return what an experiment reaches as it is planned now."""
    name, file, tree = walk.loaded.spec.name, str(walk.loaded.path.absolute()), walk.tree
    key = f"{_FOLDER}/{as_name(name)}-{digest([file, sorted(walk.loaded.overrides)])[:12]}.json"
    states = dict.fromkeys((*tree.roots, *tree.starts), "weights")
    states |= {state: job.keep for state, job in tree.stage_runs.items()}
    jobs = {cell.name: walk.jobs_of(cell) for cell in walk.cells}
    cells = {cell: [job for job in found if job in states] for cell, found in jobs.items()}
    return Recorded(key, name, file, time.time(), states, frozenset(tree.evaluations), cells)


def record_experiment(walk: Walk) -> None:
    """Note what an experiment reaches; call it before looking at what is stored, so that `gc` sees it in time.

    Raises:
        StorageError: the storage cannot be written.
    """
    found = reach_of(walk)
    fields = {name: getattr(found, name) for name in ("name", "file", "when", "states", "cells")}
    walk.ledger.store.write(found.key, dump_json({**fields, "evaluations": sorted(found.evaluations)}))


def recorded_experiments(store: Store) -> list[Recorded]:
    """Return all recorded experiments, by key; a damaged record is an error: without it `gc` would take its states
    away.

    Raises:
        ValueError: a record cannot be read.
    """
    found = []
    for entry in store.names(_FOLDER):
        key = f"{_FOLDER}/{entry}"
        data = store.read(key)
        if data is None:
            continue  # taken away meanwhile
        found.append(_parsed(store.url, key, data))
    return found


@lru_cache(maxsize=64)
def _parsed(url: str, key: str, data: bytes) -> Recorded:
    """Return a parsed file, kept for as long as it does not change: `gc` asks again before each step."""
    note = parse_json(data)
    try:
        assert note is not None
        evaluations = frozenset(note.pop("evaluations"))
        return Recorded(key=key, evaluations=evaluations, **note)
    except (AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{url}/{key} is damaged; run its experiment again, or take the file away") from error


def wanted_states(experiments: Iterable[Recorded]) -> dict[str, str]:
    """Return the state to the most that any experiment keeps of it."""
    wanted: dict[str, str] = {}
    for experiment in experiments:
        for state, keep in experiment.states.items():
            wanted[state] = max(keep, wanted.get(state, "none"), key=KEPT.index)
    return wanted


def searches_of(store: Store) -> dict[str, list[dict[str, Any]]]:
    """Return the search to the notes of its trials."""
    found: dict[str, list[dict[str, Any]]] = {}
    for search in store.names("searches"):
        names = [name for name in store.names(f"searches/{search}") if name.startswith("trial_")]
        notes = [parse_json(store.read(f"searches/{search}/{name}")) for name in names]
        found[search] = [note for note in notes if note is not None]
    return found
