"""A rehearsal on one worker, from the ledger's notes of what was tried to its notes of how it went."""

from __future__ import annotations

from typing import Any

from orchestrator.errors import StageRunError, StorageError
from orchestrator.plan.jobs import EvaluationJob, RehearsalJob, StageJob
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.storage import dump_json, parse_json


def rehearse(job: RehearsalJob, ledger: Ledger, training: Any) -> None:
    """Tries what has not passed yet on this kind of device and notes how it went; every rank calls it.

    What does not work is no failure of the rehearsal: the stage runs that need it fail (`check_rehearsed`), others
    go on.

    Args:
        training: The worker's `TrainingMemory`.

    Raises:
        StorageError: the storage cannot be read or written.
    """
    from orchestrator.training import group
    from orchestrator.training.rehearsal import note_key, rehearse_training

    if job.only_on_gpu and group.device().type != "cuda":
        return
    keys = (*job.keys, *job.evaluation_keys)

    def open_keys() -> set[str]:
        return {key for key in keys if (_note(ledger, note_key(key)) or {"error": ""})["error"] is not None}

    wanted = group.decide(open_keys)
    if not wanted:
        return
    try:
        found = rehearse_training(job, ledger, training, wanted)
        for key, test in zip(job.evaluation_keys, job.evaluations, strict=True):
            if key in wanted:
                found[key] = _answer(test, job, ledger, training)
    finally:
        training.release()

    def write() -> None:
        for key, error in found.items():
            ledger.store.write(note_key(key), dump_json({"error": error}))
        if not any(found.values()):
            ledger.end_work(job.id)  # where something does not work, the log stays

    group.decide(write)


def check_rehearsed(job: StageJob, ledger: Ledger) -> None:
    """Refuses a stage run that no cell needs any more; rank 0's word counts.

    Raises:
        StageRunError: its rehearsals found for each of its cells something that cannot be done.
    """
    from orchestrator.training import group
    from orchestrator.training.rehearsal import note_key

    def check() -> None:
        assert job.rehearsed is not None
        keys = {key for cell in job.rehearsed.cells for key in cell}
        errors = {key: (_note(ledger, note_key(key)) or {}).get("error") for key in sorted(keys)}
        met = [next((errors[key] for key in cell if errors[key]), None) for cell in job.rehearsed.cells]
        if met and all(met):
            raise StageRunError(str(met[0]))

    if job.rehearsed is not None:
        group.decide(check)


def _note(ledger: Ledger, name: str) -> dict[str, Any] | None:
    return parse_json(ledger.store.read(name))


def _answer(test: EvaluationJob, job: RehearsalJob, ledger: Ledger, training: Any) -> str | None:
    """Why an evaluation cannot be done; None where it can."""
    from orchestrator.dispatch.execute import usable_model
    from orchestrator.evaluation.rehearsal import answer_one

    model = None if training.session is None else training.session.engine.module
    model = usable_model(model, training, test.points)
    if model is None:
        training.release()
    try:
        answer_one(test, ledger, job.parent, model)
    except (StorageError, OSError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        told = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return f"the rehearsal of evaluate.{test.name} under {test.under} failed with {told}; nothing was trained"
    return None
