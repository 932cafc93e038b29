"""Experiments as `run` and `search` record them in a storage: what of the ledger each of them reaches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from orchestrator.plan.jobs import Keep
from orchestrator.plan.ledger.backends.base import Backend, most
from orchestrator.plan.ledger.files import parse_json

if TYPE_CHECKING:
    pass

FOLDER = "experiments"


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
    """Return all recorded experiments, by key; a damaged record is an error: without it `gc` would take its states
    away.

    Raises:
        ValueError: a record cannot be read.
    """
    found = []
    for entry in store.names(FOLDER):
        key = f"{FOLDER}/{entry}"
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


def wanted_states(experiments: Iterable[Recorded]) -> dict[str, Keep]:
    """Return the state to the most that any experiment keeps of it."""
    wanted: dict[str, Keep] = {}
    for experiment in experiments:
        for state, keep in experiment.states.items():
            wanted[state] = most(keep, wanted.get(state, "none"))
    return wanted


def searches_of(store: Backend) -> dict[str, list[dict[str, Any]]]:
    """Return the search to the notes of its trials."""
    found: dict[str, list[dict[str, Any]]] = {}
    for search in store.names("searches"):
        names = [name for name in store.names(f"searches/{search}") if name.startswith("trial_")]
        notes = [parse_json(store.read(f"searches/{search}/{name}")) for name in names]
        found[search] = [note for note in notes if note is not None]
    return found
