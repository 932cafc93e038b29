"""The rehearsal of a phase on one worker: a step on each action's longest samples, a save and a load, one answer.

Its training is discarded. Learning rates are zero, so that no step changes a weight and each action is tried from the
same state; gradients, optimizer states and learned compressors take the same memory as in training.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from orchestrator.data.train_data import TrainData
from orchestrator.errors import StageRunError, StorageError
from orchestrator.evaluation.evaluate import answer_one, lacks_modules
from orchestrator.models.build import WEIGHTS_FILE
from orchestrator.plan.jobs import Action, EvaluationJob, RehearsalJob, StageJob
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import dump_json, parse_json
from orchestrator.training import distributed
from orchestrator.training.batches import MicroBatch
from orchestrator.training.checkpoint import load_checkpoint, save_checkpoint
from orchestrator.training.deepspeed_config import zero_stage
from orchestrator.training.engine import Session, TrainingMemory, open_session
from orchestrator.training.metrics_log import LOGGER, stage_log
from orchestrator.training.micro_batch import (
    MicroBatchTooLarge,
    choose,
    longest_samples,
    measure_trial,
    set_accumulation,
    smaller_size,
)
from orchestrator.training.step import run_step


def rehearse(job: RehearsalJob, ledger: Ledger, memory: TrainingMemory) -> None:
    """Try what has not passed yet on this kind of device and record the results; every rank calls it.

    An error found is no failure of the rehearsal: the stage runs that need it fail (`check_rehearsed`), others
    continue.

    Raises:
        StorageError: the storage cannot be read or written.
    """
    if job.only_on_gpu and distributed.device().type != "cuda":
        return
    keys = (*job.keys, *job.evaluation_keys)

    def open_keys() -> set[str]:
        return {key for key in keys if (_note(ledger, key) or {"error": ""})["error"] is not None}

    wanted = distributed.decide(open_keys)
    if not wanted:
        return
    try:
        found = _rehearse_training(job, ledger, memory, wanted)
        for key, test in zip(job.evaluation_keys, job.evaluations, strict=True):
            if key in wanted:
                found[key] = _answer(test, job, ledger, memory)
    finally:
        memory.release()

    def write() -> None:
        for key, error in found.items():
            ledger.store.write(_note_key(key), dump_json({"error": error}))
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
        errors = {key: (_note(ledger, key) or {}).get("error") for key in sorted(keys)}
        met = [next((errors[key] for key in cell if errors[key]), None) for cell in job.rehearsed.cells]
        if met and all(met):
            raise StageRunError(str(met[0]))

    if job.rehearsed is not None:
        distributed.decide(check)


def _note(ledger: Ledger, key: str) -> dict[str, Any] | None:
    return parse_json(ledger.store.read(_note_key(key)))


def _note_key(key: str) -> str:
    """Return the ledger's name for the outcome of a trial on this kind of device."""
    device = distributed.device()
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"rehearsals/{key}/{''.join(letter if letter.isalnum() else '-' for letter in kind)}.json"


def model_for_evaluation(
    memory: TrainingMemory, points: tuple[dict[str, Any], ...], state: str | None = None
) -> Any | None:
    """Return the model in memory where an evaluation under these points can use it; else free it and return None.

    Args:
        memory: The worker's.
        points: The evaluation's.
        state: State that the model must be in; None takes any.
    """
    session = memory.session
    if session is not None and state in (None, memory.state):
        model = session.engine.module
        # ZeRO-3 gathers a layer whenever any rank runs it: ranks with unequal numbers of answers would wait for ever.
        # LoRA beside its base gives other last bits than the merged weights in the ledger, which are the state.
        # Learned compressors of an earlier phase are in the ledger's weights only.
        if zero_stage(session.config) != 3 and not hasattr(model, "peft_config") and not lacks_modules(model, points):
            return model
    memory.release()
    return None


def _answer(test: EvaluationJob, job: RehearsalJob, ledger: Ledger, memory: TrainingMemory) -> str | None:
    """Return why an evaluation cannot be done; None where it can."""
    model = model_for_evaluation(memory, test.points)
    try:
        answer_one(test, ledger, job.parent, model)
    except (StorageError, OSError):
        raise
    except Exception as error:
        what = f"the rehearsal of evaluate.{test.name} under {test.under}"
        return f"{what} failed with {_one_line(error)}; nothing was trained"
    return None


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _rehearse_training(
    job: RehearsalJob, ledger: Ledger, memory: TrainingMemory, keys: set[str]
) -> dict[str, str | None]:
    """Try the actions of a rehearsal; every rank calls it. The session stays in memory for its evaluations.

    Args:
        job: The rehearsal.
        ledger: Holds the weights; a checkpoint is written to the job's writing folder and removed again.
        memory: Keeps the data for the stage runs that follow.
        keys: The actions to try.

    Returns:
        By key, why the action cannot be trained; None where it can.

    Raises:
        StorageError: weights or a checkpoint cannot be read or written.
        OSError: a failure of the system that may be temporary.
    """
    memory.release()
    distributed.on_each_node(lambda: ledger.fetch(job.parent, "weights"))
    distributed.decide(lambda: ledger.begin(job.id))
    work = ledger.work_folder(job.id)
    with stage_log(work / ("log.txt" if distributed.rank() == 0 else f"log_rank{distributed.rank()}.txt")):
        try:
            rehearsal = _Rehearsal(job, ledger, memory)
            errors = {
                key: rehearsal.error_in(
                    f"{job.stage.phase} under {action.variant}", partial(rehearsal.act, action), action
                )
                for key, action in zip(job.keys, job.stage.table, strict=True)
                if key in keys
            }
            if None in errors.values():
                what = f"{job.stage.phase}: saving and loading a checkpoint"
                saving = rehearsal.error_in(what, rehearsal.save_and_load)
                errors = {key: error or saving for key, error in errors.items()}
            return errors
        finally:
            shutil.rmtree(ledger.writing_folder(job.id), ignore_errors=True)


class _Rehearsal:
    def __init__(self, job: RehearsalJob, ledger: Ledger, memory: TrainingMemory) -> None:
        self._stage, self._ledger, self._memory = job.stage, ledger, memory
        self._work = ledger.work_folder(job.id)
        self._data: TrainData | None = None

    def error_in(self, what: str, attempt: Callable[[], object], action: Action | None = None) -> str | None:
        """Return the error of an attempt on any rank, as a message; None where it succeeds.

        The ranks try the same samples, so that all of them fail where one does not fit.
        """
        error, no_memory = None, False
        try:
            attempt()
        except (StorageError, OSError):
            raise
        except Exception as raised:
            LOGGER.exception("rehearsal: %s", what)
            error, no_memory = _one_line(raised), _is_out_of_memory(raised)
        # Outside the `except`, so that no traceback keeps tensors alive.
        if error is not None:
            failure = f"out of memory{self._sizes(action)} ({error})" if no_memory else f"failed with {error}"
            error = f"the rehearsal of {what} {failure}; nothing was trained"
            self._memory.release()  # an engine that failed within a step is in an undefined state
        return next((one for one in distributed.gather(error) if one), None)

    def act(self, action: Action) -> None:
        """Run one optimizer step on the longest samples at the micro-batch size of an action."""
        data = self._data = self._data or self._memory.data(self._stage)
        one = replace(self._stage, table=(replace(action, first_step=0, last_step=1),), total_steps=1, last_step=1)
        while True:
            session = self._memory.session or self._open()
            trial = partial(measure_trial, session, one, data) if distributed.device().type == "cuda" else None
            try:
                session.micro_batches = choose(one, session, data, self._work, self._memory.allowed_bytes, trial)
                break
            except MicroBatchTooLarge:
                self._memory.release()
        size = session.micro_batches.at(action)
        indices = longest_samples(data, size)
        set_accumulation(session.engine, size * distributed.world_size(), size)
        session.switch(action.points)
        figures = run_step(session, one, 0, [MicroBatch(indices, data.collate(indices))], should_stop=False)
        if not math.isfinite(figures.loss + (figures.distill_loss or 0.0)):
            raise StageRunError(f"the loss of the first weights is {figures.loss}")

    def save_and_load(self) -> None:
        """Write a checkpoint from the session that trained, and load it into a new one."""
        session = self._memory.session or self._open()
        folder = self._ledger.writing_folder(self._stage.id)
        save_checkpoint(session, folder / "checkpoint", self._stage, self._stage.last_step)
        distributed.on_each_node(lambda: self._ledger.share(folder / "checkpoint"))
        self._memory.release()
        session = self._open(lambda fresh: load_checkpoint(
            fresh, folder / "checkpoint", self._stage, self._stage.id, folder
        ))  # fmt: skip
        session.learned.show()

    def _open(self, load: Callable[[Session], object] = lambda session: None) -> Session:
        weights = self._ledger.state_folder(self._stage.parent) / WEIGHTS_FILE
        session = self._memory.session = open_session(self._stage, weights)
        load(session)
        session.base_rates = [0.0] * len(session.base_rates)
        session.learned.base_rate = 0.0
        session.engine.train()
        points = (point for action in self._stage.table for point in action.all_points)
        session.attachment = session.learned.enter(session.attachment, points)
        session.learned.hide()
        return session

    def _sizes(self, action: Action | None) -> str:
        """Return, for a message, the micro-batch size that did not fit, and one that should."""
        session = self._memory.session
        if session is None or session.micro_batches is None or action is None or self._data is None:
            return ""
        size = session.micro_batches.at(action)
        smaller = smaller_size(self._stage, session, self._data, action, size)
        advice = (
            f"by the estimate per_device_train_batch_size: {smaller} fits"
            if smaller is not None
            else "it is the minimum: use more workers, zero3, gradient_checkpointing or LoRA"
        )
        return f" in micro-batches of {size}; {advice}"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
