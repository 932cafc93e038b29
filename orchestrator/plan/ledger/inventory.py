"""Inventory of a storage: recorded experiments and what each reaches, states, work under way, and what is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.plan.jobs import Keep
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.backends.base import PARTS, Backend, files_of
from orchestrator.plan.ledger.files import parse_json

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
    """Return all recorded experiments, by key.

    Raises:
        StorageError: a record cannot be read, or is damaged: without it `gc` would delete its states.
    """
    keys = [f"{FOLDER}/{entry}" for entry in store.names(FOLDER)]
    return [_parsed(store.url, key, data) for key in keys if (data := store.read(key)) is not None]


@lru_cache(maxsize=64)
def _parsed(url: str, key: str, data: bytes) -> Recorded:
    """Return a parsed file, kept for as long as it does not change: `gc` asks again before each step."""
    note = parse_json(data)
    try:
        assert note is not None
        evaluations = frozenset(note.pop("evaluations"))
        return Recorded(key=key, evaluations=evaluations, **note)
    except (AssertionError, KeyError, TypeError) as error:
        raise StorageError(f"{url}/{key} is damaged; run its experiment again, or take the file away") from error


def ledger_document(ledger: Ledger) -> dict[str, Any]:
    """Return what `ledger ls --json` prints: sizes in bytes, times in seconds since the epoch.

    Raises:
        StorageError: the storage cannot be read.
    """
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
    """Return `kind`, `id`, `step` and `files` of damaged states and in-stage checkpoints; every byte is read.

    Raises:
        StorageError: the storage cannot be read.
    """
    store = ledger.store
    found: list[dict[str, Any]] = []
    for state in store.states():
        if files := store.damaged(state):
            found.append({"kind": "state", "id": state, "files": files})
    for job in store.work():
        for step in sorted(store.steps(job)):
            if files := store.damaged_step(job, step):
                found.append({"kind": "checkpoint", "id": job, "step": step, "files": files})
    return found


def discard_damage(ledger: Ledger, found: Sequence[dict[str, Any]]) -> None:
    """Take damaged states and in-stage checkpoints out, so that `run` trains them again.

    Raises:
        StorageError: the storage cannot be written.
    """
    for entry in found:
        if entry["kind"] == "state":
            ledger.discard(entry["id"])
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
