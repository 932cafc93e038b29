"""What `ledger ls` and `ledger verify` report of a storage: states and who reaches them, work under way, damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.experiments import Recorded, searches_of
from orchestrator.plan.ledger.gc import recorded


def ledger_document(ledger: Ledger) -> dict[str, Any]:
    """Return what `ledger ls --json` prints: sizes in bytes, times in seconds since the epoch.

    Raises:
        StorageError: the storage cannot be read.
    """
    store, experiments, holders = ledger.store, recorded(ledger), ledger.living_holders()
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
    searches = {
        name: {state: sum(note.get("state") == state for note in notes) for state in ("proposed", "finished", "failed")}
        for name, notes in searches_of(ledger.store).items()
    }
    return {
        "storage": ledger.url,
        "bytes": sum(entry["bytes"] for entry in (*states, *work)),
        "experiments": [_experiment(each) for each in experiments],
        "states": states,
        "work": work,
        "evaluations": [_evaluation(ledger, name, experiments) for name in _notes(ledger, "evaluations")],
        "failures": [{"id": name, "error": _first_line(ledger, name)} for name in _notes(ledger, "failures")],
        "leases": [{"id": name, **asdict(holder)} for name, holder in holders.items()],
        "searches": [{"id": name, **counts} for name, counts in searches.items()],
    }


def damage(ledger: Ledger) -> list[dict[str, Any]]:
    """Return the damaged states and in-stage checkpoints, every byte read: `kind`, `id`, `step` of a checkpoint,
    `files`.

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
        "kept": [part for part in ("weights", "checkpoint") if any(n.startswith(f"{part}/") for n in files or {})],
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


def _notes(ledger: Ledger, kind: str) -> list[str]:
    return [name.removesuffix(".json") for name in ledger.store.names(kind)]


def _first_line(ledger: Ledger, job: str) -> str:
    lines = str((ledger.failure(job) or {}).get("error", "")).strip().splitlines()
    return lines[0] if lines else ""
