"""Makes states, in-stage checkpoints and records in a storage, and collects its garbage, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.inventory import Collector, GcStep, Recorded, recorded_experiments


def finish(ledger: Ledger, state: str, keep: str = "weights", **job: Any) -> None:
    writing = ledger.writing_folder(state)
    for part in {"full": ("weights", "checkpoint"), "weights": ("weights",), "none": ()}[keep]:
        (writing / part).mkdir()
        (writing / part / ("model.safetensors" if part == "weights" else "optim.pt")).write_bytes(b"x" * 1000)
    (writing / "job.json").write_text(json.dumps({"type": "stage", "id": state, **job}))
    (writing / "result.json").write_text("{}")
    ledger.commit(state)


def seal(ledger: Ledger, job: str, step: int) -> Path:
    folder = ledger.writing_folder(job) / f"step_{step:06d}"
    folder.mkdir()
    (folder / "optim.pt").write_bytes(b"y" * 500)
    return ledger.seal_checkpoint(job, step, folder)


def note(ledger: Ledger, name: str, **states: str) -> Recorded:
    fields = {"name": name, "file": f"{name}.yaml", "when": 1.0, "states": states, "evaluations": [], "cells": {}}
    ledger.store.write(f"experiments/{name}.json", json.dumps(fields).encode())
    return next(each for each in recorded_experiments(ledger.store) if each.name == name)


def kinds(steps: list[GcStep]) -> set[tuple[str, str]]:
    return {(step.kind, step.name) for step in steps}


def collect(ledger: Ledger, **options: Any) -> list[GcStep]:
    steps = Collector(ledger, **{"leftover_seconds": 0.0, "pause": lambda _: None, **options}).steps()
    for step in steps:
        step.remove()
    return steps
