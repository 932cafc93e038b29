"""Runs one job on one worker: writes initial weights, trains a stage, rehearses, or evaluates a state.

Only workers import this module, and with it torch and DeepSpeed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from orchestrator import registry
from orchestrator.compression.features import SharedFeatures
from orchestrator.data.train_data import TrainData
from orchestrator.dispatch.failures import one_line
from orchestrator.errors import StageRunError, StorageError
from orchestrator.evaluation.evaluate import answer_one, evaluate_state, fetch_weights, lacks_modules, load_model
from orchestrator.evaluation.protocol import Workers
from orchestrator.models.build import WEIGHTS_FILE, compute_dtype
from orchestrator.models.initial_weights import write_initial_weights, write_start_weights
from orchestrator.models.weight_files import open_weights
from orchestrator.plan.identity import digest, share_caches
from orchestrator.plan.jobs import Action, EvaluationJob, Job, RehearsalJob, RootJob, StageJob, StartJob, job_to_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import dump_json, parse_json, write_json
from orchestrator.spec.deepspeed import zero_stage
from orchestrator.spec.model import ModelSpec
from orchestrator.training import distributed
from orchestrator.training.batches import MicroBatch
from orchestrator.training.checkpoint import load_checkpoint, save_checkpoint
from orchestrator.training.engine import Session, TrainingMemory, open_divided, open_session
from orchestrator.training.metrics_log import LOGGER, stage_log
from orchestrator.training.micro_batch import longest_samples, open_with_sizes, set_accumulation, smaller_size
from orchestrator.training.stage_run import train_stage
from orchestrator.training.step import run_step

Ending = Literal["finished", "interrupted"]


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
    training: TrainingMemory = memory.setdefault("training", TrainingMemory())
    if not isinstance(job, EvaluationJob):
        _forget_tested(memory)
        memory.pop(_FEATURES, None)
    if isinstance(job, RootJob | StartJob):
        distributed.decide(partial(_write_weights, job, ledger))
    elif isinstance(job, RehearsalJob):
        rehearse(job, ledger, training)
    elif isinstance(job, StageJob):
        check_rehearsed(job, ledger)
        if train_stage(replace(job, rehearsed=None), ledger, training, should_stop) == "stopped":
            return "interrupted"
    else:
        if registry.spec_class(registry.EVALUATIONS, job.spec["kind"]).is_measurement:
            training.release()
        model = model_for_evaluation(training, job.points, job.state)
        if model is None:
            model = _tested_model(job, ledger, memory)
        features = _features_of(job, memory)
        if evaluate_state(job, ledger, model=model, should_stop=should_stop, features=features) is None:
            return "interrupted"
    return "finished"


def _write_weights(job: RootJob | StartJob, ledger: Ledger) -> None:
    """Write a state that consists of weights alone; one rank calls it."""
    if ledger.is_done(job.id) and ledger.has(job.id, "weights"):
        return
    ledger.begin(job.id)
    folder = ledger.writing_folder(job.id)
    if isinstance(job, RootJob):
        write_initial_weights(job, folder)
    else:
        base, source = (
            None if state is None else ledger.fetch(state, "weights") / Path(WEIGHTS_FILE).name
            for state in (job.base, job.source)
        )
        write_start_weights(job, base, source, folder)
    write_json(folder / "job.json", job_to_json(job))
    ledger.commit(job.id)


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


_TESTED, _FEATURES = "tested", "features"


def _features_of(job: EvaluationJob, memory: dict[str, Any]) -> SharedFeatures:
    """Return the features of images that evaluations of this state have computed; another state's are forgotten."""
    key = (job.state, digest(job.model))
    if memory.get(_FEATURES, (None,))[0] != key:
        memory[_FEATURES] = key, SharedFeatures()
    found: SharedFeatures = memory[_FEATURES][1]
    return found


def _tested_model(job: EvaluationJob, ledger: Ledger, memory: dict[str, Any]) -> Any:
    """Return the model of an evaluation's state; evaluations of one state that follow each other load it once."""
    key = (job.state, digest(job.model))
    if memory.get(_TESTED, (None,))[0] != key:
        _forget_tested(memory)  # before the next one is loaded
        memory[_TESTED] = key, *_loaded(job, fetch_weights(job, ledger))
    return memory[_TESTED][1]


def _forget_tested(memory: dict[str, Any]) -> None:
    *_, engine = memory.pop(_TESTED, (None,))
    if engine is not None:
        engine.destroy()


def _loaded(job: EvaluationJob, weights: Path) -> tuple[Any, Any]:
    """Return a model with these weights, and the engine that divides it over the ranks; None where each holds it all.

    They divide it where it does not fit on each of them: all then compute every answer, each for the price of one.
    """
    workers = Workers.here()
    if workers.count > 1 and not all(distributed.gather(_fits(job, weights))):
        engine = open_divided(ModelSpec.model_validate(job.model), weights)
        return engine.module, engine
    return load_model(job, weights, workers.device), None


# Weights may take this share of a worker's free memory: batches, and a cache of keys and values, need the rest.
_WEIGHTS_SHARE = 0.8


def _fits(job: EvaluationJob, weights: Path) -> bool:
    """Return whether a worker's memory holds all weights of a model, in the type that it computes in."""
    width = getattr(torch, compute_dtype(ModelSpec.model_validate(job.model))).itemsize
    with open_weights(weights) as file:
        num_bytes = width * sum(math.prod(shape) for shape in file.shapes().values())
    return num_bytes <= _WEIGHTS_SHARE * distributed.device_memory_bytes()


def _answer(test: EvaluationJob, job: RehearsalJob, ledger: Ledger, memory: TrainingMemory) -> str | None:
    """Return why an evaluation cannot be done; None where it can."""
    model, engine = model_for_evaluation(memory, test.points), None
    if model is None and any(registry.spec_class(registry.COMPRESSORS, point["kind"]).learns for point in test.points):
        return None  # no weights of it exist yet
    weights = ledger.state_folder(job.parent) / WEIGHTS_FILE
    try:
        if model is None:
            model, engine = _loaded(test, weights)
        answer_one(test, weights, model)
    except (StorageError, OSError):
        raise
    except Exception as error:
        what = f"the rehearsal of evaluate.{test.name} under {test.under}"
        return f"{what} failed with {one_line(error)}; nothing was trained"
    finally:
        if engine is not None:
            engine.destroy()
    return None


def _rehearse_training(
    job: RehearsalJob, ledger: Ledger, memory: TrainingMemory, keys: set[str]
) -> dict[str, str | None]:
    """Return by key why an action cannot be trained, None where it can; every rank calls it.

    The session stays in memory for the evaluations.
    """
    memory.release()
    distributed.on_each_node(lambda: ledger.fetch(job.parent, "weights"))
    distributed.decide(lambda: ledger.begin(job.id))
    with stage_log(ledger.work_folder(job.id)):
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
            error, no_memory = one_line(raised), _is_out_of_memory(raised)
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
        session, step = open_with_sizes(one, self._memory, data, self._work, lambda: (self._opened(), 0))
        size = session.micro_batches.at(action)
        indices = longest_samples(data, size)
        set_accumulation(session.engine, size * distributed.world_size(), size, len(action.trained_passes))
        session.switch(action.points)
        with session.attachment.largest():
            figures = run_step(session, one, step, [MicroBatch(indices, data.collate(indices))], should_stop=False)
        if not figures.is_finite:
            raise StageRunError(f"the loss of the first weights is {figures.loss}")

    def save_and_load(self) -> None:
        """Write a checkpoint from the session that trained, and load it into a new one."""
        session = self._opened()
        folder = self._ledger.writing_folder(self._stage.id)
        save_checkpoint(session, folder / "checkpoint", self._stage, self._stage.last_step)
        distributed.on_each_node(lambda: self._ledger.share(folder / "checkpoint"))
        self._memory.release()
        self._open(folder / "checkpoint").learned.show()

    def _opened(self) -> Session:
        return self._memory.session or self._open()

    def _open(self, checkpoint: Path | None = None) -> Session:
        weights = self._ledger.state_folder(self._stage.parent) / WEIGHTS_FILE
        session = self._memory.session = open_session(self._stage, weights)
        if checkpoint is not None:
            load_checkpoint(session, checkpoint, self._stage, self._stage.id, checkpoint.parent)
        session.base_rates = [0.0] * len(session.base_rates)
        session.learned.base_rate = 0.0
        session.prepare(self._stage)
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
