"""`train_stage`: train one stage run on one worker, from the parent's state to its own; it can stop at any step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from orchestrator.errors import StageRunError, StorageError
from orchestrator.machine import reset_peak_memory
from orchestrator.models.build import WEIGHTS_FILE
from orchestrator.plan.jobs import StageJob, job_to_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import Files, write_json
from orchestrator.training import distributed
from orchestrator.training.batches import BatchFeed
from orchestrator.training.checkpoint import load_checkpoint, other_workers, read_cursor, save_checkpoint
from orchestrator.training.checkpoint_writer import CheckpointWriter
from orchestrator.training.engine import Session, TrainingMemory, open_session, session_key
from orchestrator.training.metrics_log import (
    LOGGER,
    MetricsLog,
    fingerprint,
    peak_memory_gib,
    stage_log,
    stage_result,
)
from orchestrator.training.micro_batch import MicroBatchTooLarge, halve, open_with_sizes, set_accumulation
from orchestrator.training.step import StepFigures, run_step
from orchestrator.training.weights import write_weights

StageOutcome = Literal["done", "stopped"]


def train_stage(job: StageJob, ledger: Ledger, memory: TrainingMemory, should_stop: Callable[[], bool]) -> StageOutcome:
    """Train one stage run; every rank of an initialised process group calls it.

    It starts from the first of these that exists: the newest complete checkpoint of an earlier attempt, the parent's
    state in memory, the parent's checkpoint (where a phase starts, the parent's weights). It ends with the state in the
    ledger.

    Args:
        job: The stage run.
        ledger: Holds the parents and takes the state.
        memory: Keeps the engine for the next stage run.
        should_stop: Asked after every step; when true on any rank, a checkpoint is written and training stops.

    Returns:
        `done` when the state is committed, `stopped` when `should_stop` was true and the work can be resumed.

    Raises:
        StageRunError: the loss diverged, or a checkpoint belongs to another run.
        DamagedStateError: the parent's weights or checkpoint are missing or damaged.
        StaleWriterError: another driver has taken the job over.
        StorageError: a checkpoint cannot be read or written.
        UsageError: the job does not fit the model or the workers.
        DataError: rows or images cannot be used.
    """
    if distributed.decide(lambda: ledger.is_stored(job.id, job.keep)):
        return "done"
    distributed.decide(lambda: ledger.begin(job.id))
    work = ledger.work_folder(job.id)
    with stage_log(work):
        try:
            return _train(job, ledger, memory, should_stop, work)
        except BaseException as error:
            memory.release()  # the engine no longer holds a state of the ledger
            if isinstance(error, StorageError):
                ledger.check_fence(job.id)  # a driver that took the job over removes what this process was writing
            raise


def _train(
    job: StageJob, ledger: Ledger, memory: TrainingMemory, should_stop: Callable[[], bool], work: Path
) -> StageOutcome:
    reset_peak_memory()
    data = memory.data(job)
    session, step = open_with_sizes(job, memory, data, work, lambda: _start(job, ledger, memory))
    spools: list[MetricsLog] = []
    distributed.decide(lambda: spools.append(MetricsLog(work / "metrics.jsonl", job.first_step, step)))
    spool = spools[0] if spools else None
    batch, grouped = job.recipe["global_batch_size"], job.recipe["group_by_modality_length"]
    feed = BatchFeed(
        lambda step: data.batch_indices(job.seed, step, batch, grouped),
        data.collate,
        lambda step: session.micro_batches.at(job.action_at(step)),
        job.last_step,
    )
    writer = CheckpointWriter(session, job, ledger, spool)
    try:
        while step < job.last_step:
            action = job.action_at(step)
            size = session.micro_batches.at(action)
            set_accumulation(session.engine, batch, size, len(action.trained_passes))
            session.switch(action.points)
            try:
                figures = run_step(session, job, step, feed.get(step), should_stop(), writer.busy)
            except (torch.OutOfMemoryError, MemoryError) as error:
                if message := halve(job, work, action, size):
                    raise MicroBatchTooLarge(message) from error
                raise
            if not figures.is_finite:
                raise StageRunError(
                    f"diverged at step {step} of {job.phase}: the loss is {figures.loss}; nothing was stored; "
                    "lower learning_rate, raise warmup_ratio, or set max_grad_norm"
                )
            if spool is not None:
                spool.append(_metrics_line(job, session, step, figures))
                _log(job, step, figures)
                if figures.skipped:
                    LOGGER.warning("%s step %d changed no weight: gradients overflowed", job.phase, step + 1)
            step += 1
            if not figures.writing:
                writer.advance()
            due = step % job.checkpoint_every == 0
            if step < job.last_step and (due or figures.stop):
                writer.begin(step)
                if figures.stop:
                    writer.finish()
                    memory.release()
                    return "stopped"
        writer.finish()
    finally:
        feed.close()
        writer.close()
        if spool is not None:
            spool.sync()
            spool.close()
    _finish(session, job, ledger, work)
    session.learned.show()
    memory.state = job.id
    return "done"


def _start(job: StageJob, ledger: Ledger, memory: TrainingMemory) -> tuple[Session, int]:
    """Return the session, ready to train, and the number of steps its state has trained."""
    session, step = _opened(job, ledger, memory)
    memory.state = None
    session.prepare(job)
    return session, step


def _opened(job: StageJob, ledger: Ledger, memory: TrainingMemory) -> tuple[Session, int]:
    newest = distributed.decide(lambda: getattr(ledger.last_checkpoint(job.id), "name", None))
    if newest is None and not job.starts_phase and all(distributed.gather(memory.holds(job.parent, session_key(job)))):
        assert memory.session is not None
        return memory.session, job.first_step
    memory.release()
    weights = _fetched(ledger, job.parent, "weights") / Path(WEIGHTS_FILE).name
    if job.starts_phase and newest is None:
        memory.session = open_session(job, weights)
        memory.session.phase_start = job.parent
        return memory.session, job.first_step
    if newest is None:
        source = _fetched(ledger, job.parent, "checkpoint")
    else:
        distributed.on_each_node(lambda: ledger.download_checkpoint(job.id, newest))
        source = ledger.work_folder(job.id) / newest
    universal = distributed.decide(lambda: other_workers(read_cursor(source)))
    memory.session = open_session(job, weights, universal)
    state = job.parent if newest is None else job.id
    return memory.session, load_checkpoint(memory.session, source, job, state, ledger.writing_folder(job.id))


def _fetched(ledger: Ledger, state: str, part: Literal["weights", "checkpoint"]) -> Path:
    """Return the folder of a complete part of a finished state, downloaded to this node; every rank calls it."""
    distributed.on_each_node(lambda: ledger.fetch(state, part))
    return ledger.state_folder(state) / part


def _metrics_line(job: StageJob, session: Session, step: int, figures: StepFigures) -> dict[str, Any]:
    num_layers = len(session.attachment.visual_tokens_per_layer)
    return {
        "step": step,
        "timestamp_ms": int(time.time() * 1000),
        "loss": figures.loss,
        "learning_rate": figures.learning_rate,
        "step_seconds": figures.step_seconds,
        "visual_tokens": figures.visual_layer_tokens / num_layers / figures.samples,
        "text_tokens": figures.text_tokens / figures.samples,
        "label_tokens": figures.label_tokens / figures.samples,
        "samples_per_second": figures.samples / figures.step_seconds,
        "variant": job.action_at(step).variant,
        **({} if figures.distill_loss is None else {"distill_loss": figures.distill_loss}),
    }


def _log(job: StageJob, step: int, figures: StepFigures) -> None:
    """Log the first step, the last one and about forty between."""
    every = max(1, (job.last_step - job.first_step) // 40)
    if (step - job.first_step) % every == 0 or step == job.last_step - 1:
        LOGGER.info(
            "%s step %d/%d under %s: loss %.4f, learning rate %.3g, %.3f s",
            job.phase, step + 1, job.total_steps, job.action_at(step).variant, figures.loss, figures.learning_rate,
            figures.step_seconds,
        )  # fmt: skip


def _finish(session: Session, job: StageJob, ledger: Ledger, work: Path) -> None:
    """Write weights, checkpoint and result and commit them; no rank returns before."""
    folder = ledger.writing_folder(job.id)
    write_weights(session, folder / WEIGHTS_FILE, _exact_weights(session, job, ledger))
    known: Files = {}
    if job.keep == "full":
        known = save_checkpoint(session, folder / "checkpoint", job, job.last_step)
        known = {f"checkpoint/{name}": entry for name, entry in known.items()}
    if job.keep == "none":  # writing them checked that they are finite
        distributed.decide(lambda: shutil.rmtree(folder / Path(WEIGHTS_FILE).parent))
    distributed.on_each_node(lambda: ledger.share(folder, known))
    peak_gib = peak_memory_gib()
    marks = fingerprint(job, session)

    def commit() -> None:
        write_json(folder / "result.json", stage_result(job, work / "metrics.jsonl", peak_gib, marks))
        write_json(folder / "job.json", job_to_json(job))
        ledger.commit(job.id, known)

    distributed.decide(commit)


def _exact_weights(session: Session, job: StageJob, ledger: Ledger) -> Path | None:
    """Return the file that holds the frozen weights unrounded, where the engine rounds them; None where it is gone.

    Where LoRA trains, the parent's weights are merged with its adapters: only those the phase started from are exact.
    """
    if session.compute_dtype == torch.float32:
        return None
    states = [session.phase_start, None if job.recipe["lora"] else job.parent]

    def fetch() -> Path | None:
        state = next((one for one in states if one is not None and ledger.has(one, "weights")), None)
        return None if state is None else ledger.fetch(state, "weights")

    folder = distributed.decide(fetch)
    return folder and folder / Path(WEIGHTS_FILE).name
