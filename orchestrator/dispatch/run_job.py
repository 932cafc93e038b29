"""Runs one job on one worker: writes initial weights, trains a stage, rehearses, or evaluates a state.

Only workers import this module, and with it torch and DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestrator import registry
from orchestrator.errors import StageRunError, StorageError
from orchestrator.evaluation.evaluate import answer_one, evaluate_state, lacks_modules
from orchestrator.models.initial_weights import write_initial_weights, write_start_weights
from orchestrator.plan.identity import share_caches
from orchestrator.plan.jobs import EvaluationJob, Job, RehearsalJob, RootJob, StageJob, StartJob, job_to_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import dump_json, parse_json, write_json
from orchestrator.training import distributed
from orchestrator.training.distributed import decide
from orchestrator.training.engine import TrainingMemory
from orchestrator.training.rehearsal import note_key, rehearse_training
from orchestrator.training.stage_run import train_stage


def rehearse(job: RehearsalJob, ledger: Ledger, training: TrainingMemory) -> None:
    """Try what has not passed yet on this kind of device and record the results; every rank calls it.

    An error found is no failure of the rehearsal: the stage runs that need it fail (`check_rehearsed`), others
    continue.

    Args:
        training: The worker's `TrainingMemory`.

    Raises:
        StorageError: the storage cannot be read or written.
    """
    if job.only_on_gpu and distributed.device().type != "cuda":
        return
    keys = (*job.keys, *job.evaluation_keys)

    def open_keys() -> set[str]:
        return {key for key in keys if (_note(ledger, note_key(key)) or {"error": ""})["error"] is not None}

    wanted = distributed.decide(open_keys)
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

    distributed.decide(write)


def check_rehearsed(job: StageJob, ledger: Ledger) -> None:
    """Refuse a stage run that no cell needs any more; rank 0 decides.

    Raises:
        StageRunError: its rehearsals found for each of its cells something that cannot be done.
    """

    def check() -> None:
        assert job.rehearsed is not None
        keys = {key for cell in job.rehearsed.cells for key in cell}
        errors = {key: (_note(ledger, note_key(key)) or {}).get("error") for key in sorted(keys)}
        met = [next((errors[key] for key in cell if errors[key]), None) for cell in job.rehearsed.cells]
        if met and all(met):
            raise StageRunError(str(met[0]))

    if job.rehearsed is not None:
        distributed.decide(check)


def _note(ledger: Ledger, name: str) -> dict[str, Any] | None:
    return parse_json(ledger.store.read(name))


def _answer(test: EvaluationJob, job: RehearsalJob, ledger: Ledger, training: TrainingMemory) -> str | None:
    """Return why an evaluation cannot be done; None where it can."""
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


Ending = Literal["finished", "interrupted"]


class Executor(Protocol):
    """What a lane runs its jobs with. Every rank calls it, inside an initialised process group."""

    def __call__(self, job: Job, ledger: Ledger, memory: dict[str, Any], should_stop: Callable[[], bool]) -> Ending:
        """Do one job, or leave it at a checkpoint when `should_stop` turns true."""


def execute(job: Job, ledger: Ledger, memory: dict[str, Any], should_stop: Callable[[], bool]) -> Ending:
    """Do one job on this rank.

    Args:
        memory: What this worker keeps from job to job; emptied when a job fails.
        should_stop: Asked at every step; ranks agree on the answer among themselves.

    Returns:
        `finished`, or `interrupted` when it left early: at an in-stage checkpoint, or with no result.

    Raises:
        LlavoltaError: the job cannot be done; trying again would not help.
    """
    share_caches(ledger.storage / "cache")
    for reference in job.plugins:
        registry.load_plugin(reference, Path.cwd())  # absolute already, or a module
    if isinstance(job, RootJob):
        _write_root(job, ledger)
        return "finished"
    if isinstance(job, StartJob):
        _write_start(job, ledger)
        return "finished"
    if isinstance(job, RehearsalJob):
        rehearse(job, ledger, _training_memory(memory))
        return "finished"
    if isinstance(job, StageJob):
        check_rehearsed(job, ledger)
        return _train(replace(job, rehearsed=None), ledger, memory, should_stop)
    return _evaluate(job, ledger, memory, should_stop)


def _write_root(job: RootJob, ledger: Ledger) -> None:
    _write_weights(job, ledger, lambda folder: write_initial_weights(job, folder))


def _write_start(job: StartJob, ledger: Ledger) -> None:
    def write(folder: Path) -> None:
        base, source = (
            None if state is None else ledger.fetch(state, "weights") / "model.safetensors"
            for state in (job.base, job.source)
        )
        write_start_weights(job, base, source, folder)

    _write_weights(job, ledger, write)


def _write_weights(job: RootJob | StartJob, ledger: Ledger, write: Callable[[Path], None]) -> None:
    """Write, from one rank, a state that consists of weights alone."""

    def commit() -> None:
        if ledger.is_done(job.id) and ledger.has(job.id, "weights"):
            return
        ledger.begin(job.id)
        folder = ledger.writing_folder(job.id)
        write(folder)
        write_json(folder / "job.json", job_to_json(job))
        ledger.commit(job.id)

    decide(commit)


def _train(job: StageJob, ledger: Ledger, memory: dict[str, Any], should_stop: Callable[[], bool]) -> Ending:
    outcome = train_stage(job, ledger, _training_memory(memory), should_stop)
    return "finished" if outcome == "done" else "interrupted"


def _evaluate(job: EvaluationJob, ledger: Ledger, memory: dict[str, Any], should_stop: Callable[[], bool]) -> Ending:
    training = _training_memory(memory)
    model = usable_model(training.model_of(job.state), training, job.points)
    if model is None:
        training.release()
    result = evaluate_state(job, ledger, model=model, should_stop=should_stop)
    return "interrupted" if result is None else "finished"


def usable_model(model: Any | None, training: TrainingMemory, points: tuple[dict[str, Any], ...]) -> Any | None:
    """Return the model in memory where an evaluation under these points can use it; None where it has to be loaded."""
    if model is None or _is_partitioned(training) or hasattr(model, "peft_config"):
        # ZeRO-3 gathers a layer whenever any rank runs it: ranks with unequal numbers of answers would wait for ever.
        # LoRA beside its base gives other last bits than the merged weights in the ledger, which are the state.
        return None
    return None if lacks_modules(model, points) else model  # the ledger's weights have them


def _training_memory(memory: dict[str, Any]) -> TrainingMemory:
    return memory.setdefault("training", TrainingMemory())


def _is_partitioned(training: TrainingMemory) -> bool:
    session = training.session
    return session is not None and bool(session.config.get("zero_optimization", {}).get("stage", 0) == 3)
