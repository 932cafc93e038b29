"""`per_device_train_batch_size: auto`: the largest micro-batch that fits, for each action of a stage run.

Each action (variant and teacher; in a policy each of those it mixes) has a size of its own, so that compressed steps
take fewer accumulation steps: under ZeRO-3 each of them gathers all weights again. A size is the smallest with its
number of accumulation steps, as `deal` cuts a global batch evenly. On the CPU the memory formula (`plan/memory.py`)
decides; on a GPU it proposes a size, forward and backward of the longest samples are measured, and the result is cached
by kind of device. A size is part of the fingerprint, never of an identity: the update is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.train_data import TrainData
from orchestrator.errors import DataError, StageRunError, UsageError
from orchestrator.machine import reset_peak_memory
from orchestrator.plan.identity import cache_folder, digest
from orchestrator.plan.jobs import Action, StageJob, action_digest
from orchestrator.plan.ledger.files import read_json, write_json
from orchestrator.plan.memory import Longest, activation_bytes, state_bytes
from orchestrator.spec.model_facts import ModelFacts, model_facts
from orchestrator.training import distributed
from orchestrator.training.batches import MicroBatch, accumulation_steps, even_size
from orchestrator.training.engine import Session, TrainingMemory
from orchestrator.training.metrics_log import LOGGER, peak_memory_gib
from orchestrator.training.step import forward_losses


def longest_samples(data: TrainData, size: int) -> list[int]:
    """Return the longest samples, as many as a micro-batch has; they repeat where there are too few."""
    by_length = sorted(data.longest, key=lambda index: -len(data.sample(index)))
    return [by_length[i % len(by_length)] for i in range(size)]


def measure_trial(session: Session, job: StageJob, data: TrainData, action: Action, size: int) -> float:
    """Return the share of a GPU's memory at the peak of one micro-batch; every rank calls it. It changes no state.

    The loss is multiplied by zero, so that the first real micro-batch adds its gradients to zeros. Gradients are
    computed and reduced as in a step; from ZeRO 1 on Adam's states are in memory already.

    Args:
        session: Its engine, between two optimizer steps.
        job: The stage run.
        data: Its data, of which the longest samples are tried.
        action: The action to try.
        size: Samples of the micro-batch.

    Raises:
        torch.OutOfMemoryError: it does not fit; the engine must be opened again.
    """
    indices = longest_samples(data, size)
    # Two micro-batches per optimizer step: this one is not the last, so no weight is updated.
    set_accumulation(session.engine, 2 * size * distributed.world_size(), size, len(action.trained_passes))
    session.switch(action.points)
    session.attachment.set_step(step=job.first_step, seed=job.seed, sample_index=indices)
    session.draws.enter(job.seed, job.first_step, indices)
    reset_peak_memory()
    batch = MicroBatch(indices, data.collate(indices))
    with session.attachment.largest():
        for losses in forward_losses(session, action, batch, float(batch.label_tokens), seed=0):
            session.engine.backward(losses.total * 0.0, scale_wrt_gas=False)
            session.learned.collect()
    if not torch.cuda.is_available():
        return 0.0
    return peak_memory_gib() * 2**30 / torch.cuda.get_device_properties(distributed.device()).total_memory


NOTES_FILE = "micro_batches.json"
GPU_SHARE = 0.9
"""Usable share of a GPU's memory; the rest is for fragmentation and libraries."""
CPU_SHARE = 0.5
"""Usable share of the free memory of a machine; data, images and the system need the rest."""
CPU_CAP_BYTES = 2 * 2**30
"""Cap for activations: a larger micro-batch gains nothing on a CPU, and sizes rarely depend on what else runs there."""


class MicroBatchTooLarge(RuntimeError):
    """Out of memory at a size that `auto` chose; a smaller one is noted for the next attempt."""


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batch sizes of a stage run.

    Attributes:
        fixed: The recipe's number; None under `auto`.
        chosen: Under `auto`, the size by `action_key`.
    """

    fixed: int | None
    chosen: Mapping[str, int] = field(default_factory=dict)

    def at(self, action: Action) -> int:
        """Return the size under an action."""
        return self.chosen[action_key(action)] if self.fixed is None else self.fixed

    def shown(self) -> int | str:
        """Return the size for the fingerprint, or the sizes in ascending order where actions have several."""
        sizes = sorted({self.fixed} if self.fixed is not None else set(self.chosen.values()))
        return sizes[0] if len(sizes) == 1 else ", ".join(map(str, sizes))


def action_key(action: Action) -> str:
    """Return a key of what determines the memory of an action: the points of its passes."""
    return action_digest(action)[:16]


def choose(
    job: StageJob,
    session: Any,
    data: TrainData,
    work: Path,
    allowed_bytes: int | None = None,
    trial: Callable[[Action, int], float] | None = None,
) -> MicroBatches:
    """Return the sizes of a stage run's actions; every rank calls it and gets the same.

    Args:
        job: The stage run.
        session: Its engine, before the first step.
        data: Its data.
        work: Its work folder: sizes are noted there, so that a resumed attempt takes the same, or smaller ones after
            memory ran out.
        allowed_bytes: Memory for activations; None asks the machine.
        trial: Returns the share of the device's memory that an action takes at a size, or raises OutOfMemoryError. None
            relies on the formula.

    Raises:
        UsageError: the model's sizes are not known, so there is no formula.
        MicroBatchTooLarge: a trial ran out of memory; the engine must be opened again.
        StageRunError: the smallest size does not fit.
    """
    if job.recipe["per_device_train_batch_size"] != "auto":
        return MicroBatches(session.micro_batch_size)
    actions = {action_key(a): a for a in job.table if a.last_step > job.first_step}
    notes: dict[str, Any] = distributed.decide(lambda: _first_notes(job, session, data, work, actions, allowed_bytes))
    for key, action in actions.items():
        note = notes[key]
        if trial is not None and not note["measured"]:
            note["size"] = _measured(job, work, notes, key, partial(trial, action))
            note["measured"] = True
            distributed.decide(partial(write_json, _remembered(note), note))
    distributed.decide(lambda: write_json(work / NOTES_FILE, notes))
    for key, action in actions.items():
        _log(job, action, notes[key])
    return MicroBatches(None, {key: notes[key]["size"] for key in actions})


def open_with_sizes(
    job: StageJob, memory: TrainingMemory, data: TrainData, work: Path, open_session: Callable[[], tuple[Session, int]]
) -> tuple[Session, int]:
    """Return what `open_session` returns, a session and its step, with sizes that fit; on a GPU they are measured.

    Raises: as `choose`, but where a trial ran out of memory the session is opened again.
    """
    while True:
        session, step = open_session()
        on_gpu = distributed.device().type == "cuda"
        trial = partial(measure_trial, session, job, data) if on_gpu else None
        try:
            session.micro_batches = choose(job, session, data, work, memory.allowed_bytes, trial)
            return session, step
        except MicroBatchTooLarge as error:
            LOGGER.info("%s", error)
        memory.release()  # an engine that ran out of memory is in an undefined state


def halve(job: StageJob, work: Path, action: Action, size: int) -> str | None:
    """Note half of a size at which memory ran out; any rank may call it, and several at once.

    Returns:
        The message for the user; None where the size was not chosen here, or cannot be halved.
    """
    notes = read_json(work / NOTES_FILE) or {}
    note = notes.get(action_key(action))
    if job.recipe["per_device_train_batch_size"] != "auto" or note is None:
        return None
    half = even_size(job.recipe["global_batch_size"], distributed.world_size(), size // 2)
    if half >= size:
        return None
    message = f"{action.variant}: out of memory in micro-batches of {size} samples; the next attempt takes {half}"
    note["size"] = half
    write_json(work / NOTES_FILE, notes)
    if note["measured"]:
        write_json(_remembered(note), note)
    return message


def smaller_size(job: StageJob, session: Any, data: TrainData, action: Action, size: int) -> int | None:
    """Return a size to try below one that did not fit: the formula's, at most half; None where there is none.

    Args:
        job: The stage run.
        session: Its engine, which still holds its weights.
        data: Its data.
        action: The action that ran out of memory.
        size: Its micro-batch size.
    """
    most = size // 2
    facts = model_facts(job.model["model_name_or_path"], job.model.get("revision"))
    if facts is not None and not facts.decoder_layers:
        each = _sample_bytes(facts, job, session, longest_of(data), action)
        most = min(most, int(_allowed_bytes(facts, job, session) / each))
    smaller = even_size(job.recipe["global_batch_size"], distributed.world_size(), most)
    return smaller if smaller < size else None


def set_accumulation(engine: Any, global_batch_size: int, size: int, passes: int = 1) -> None:
    """Set, between two optimizer steps, the micro-batch size of an engine and the number of micro-batches in a step.

    Args:
        engine: A DeepSpeed engine.
        global_batch_size: Samples of an optimizer step.
        size: Samples of a micro-batch.
        passes: Passes that train of each micro-batch, of which the engine hears as of so many micro-batches.
    """
    world_size = distributed.world_size()
    steps = accumulation_steps(global_batch_size, size, world_size) * passes
    if (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()) == (size, steps):
        return
    engine.set_train_micro_batch_size(size)
    engine.set_train_batch_size(size * steps * world_size)
    engine.micro_steps = 0  # it updates at multiples of the number of accumulation steps
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = steps  # ZeRO 1 and 2 read it where the optimizer is offloaded


def _measured(job: StageJob, work: Path, notes: dict[str, Any], key: str, trial: Callable[[int], float]) -> int:
    """Return the largest size whose trial stays below the limit; each next size follows from the last trial's share.

    Every rank tries the same samples, so that all run out of memory together.
    """
    batch, workers = job.recipe["global_batch_size"], distributed.world_size()
    size = fits = notes[key]["size"]
    while True:
        try:
            share = trial(size)
        except torch.OutOfMemoryError:
            share = float("inf")
        share = distributed.reduce_values([share], largest=True)[0]
        if share > 1:
            smaller = even_size(batch, workers, size // 2)
            if smaller >= size:
                raise StageRunError(
                    f"out of memory in micro-batches of {size}, the minimum; use more workers, zero3, "
                    "gradient_checkpointing, or a lower model_max_length"
                )
            notes[key] |= {"size": max(smaller, fits) if fits < size else smaller, "below": size}
            distributed.decide(lambda: write_json(work / NOTES_FILE, notes))
            raise MicroBatchTooLarge(f"micro-batches of {size} samples do not fit; {notes[key]['size']} are next")
        fits = size
        # A part of the peak does not grow with the size, so a proportional step stays below the limit.
        size = even_size(batch, workers, min(fits * GPU_SHARE / max(share, 1e-3), notes[key].get("below", 2**31) - 1))
        if size <= fits:
            return fits


def _first_notes(
    job: StageJob, session: Any, data: TrainData, work: Path, actions: Mapping[str, Action], allowed: int | None
) -> dict[str, Any]:
    """Return the sizes that an earlier attempt noted, else cached ones, else the formula's; on rank 0."""
    workers = distributed.world_size()
    known = {k: note for k, note in (read_json(work / NOTES_FILE) or {}).items() if note["world_size"] == workers}
    missing = {key: action for key, action in actions.items() if key not in known}
    if not missing:
        return known
    facts = model_facts(job.model["model_name_or_path"], job.model.get("revision"))
    if facts is None or facts.decoder_layers:
        unknown = "sizes" if facts is None else "activations of the layers (experts, linear attention)"
        raise UsageError(
            f"per_device_train_batch_size: auto: the {unknown} of {job.model['model_name_or_path']} are not known, "
            "so the memory of its micro-batches cannot be estimated; give a number"
        )
    longest, attention = longest_of(data), _attention(job)
    if allowed is None:
        allowed = _allowed_bytes(facts, job, session)
    for key, action in missing.items():
        each = _sample_bytes(facts, job, session, longest, action)
        size = even_size(job.recipe["global_batch_size"], workers, allowed / each)
        what = [_device_kind(), workers, asdict(facts), job.recipe, asdict(longest), attention, key]
        note: dict[str, Any] = {"size": size, "measured": False, "sample_bytes": each, "allowed_bytes": allowed}
        note |= {"world_size": workers, "about": digest(what)}
        known[key] = (read_json(_remembered(note)) if distributed.device().type == "cuda" else None) or note
    return known


def longest_of(data: TrainData) -> Longest:
    """Return the maxima of token, label and image counts over the samples that may be the longest."""
    sizes = []
    for index in data.longest:
        try:
            sample = data.sample(index)
        except DataError:
            continue  # raised when a step needs the sample
        labels = int((sample.labels >= 0).sum())
        sizes.append((len(sample) - sample.num_visual_tokens, labels, sample.num_visual_tokens, len(sample.images)))
    return Longest(*(max(column) for column in zip(*sizes, strict=True)))


def _sample_bytes(facts: ModelFacts, job: StageJob, session: Any, longest: Longest, action: Action) -> float:
    """Return the memory in bytes of one sample's activations, by the formula."""
    return activation_bytes(facts, action, longest, job.recipe, session.compute_dtype.itemsize, _attention(job))


def _attention(job: StageJob) -> str:
    return str(job.model.get("attn_implementation", "sdpa"))


def _allowed_bytes(facts: ModelFacts, job: StageJob, session: Any) -> int:
    """Return the memory in bytes for activations of one worker; the engine's weights are allocated already."""
    states = state_bytes(facts, job.recipe, session.compute_dtype.itemsize, session.config, distributed.world_size())
    to_come = states.gradients + states.adam
    free = distributed.device_memory_bytes()
    if distributed.device().type == "cuda":
        return max(0, int(free * GPU_SHARE - to_come))
    return max(0, min(CPU_CAP_BYTES, int(free * CPU_SHARE - to_come - states.host)))


def _device_kind() -> str:
    if distributed.device().type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(distributed.device())
    return f"{properties.name} {properties.total_memory}"


def _remembered(note: Mapping[str, Any]) -> Path:
    return cache_folder() / "micro_batches" / f"{note['about']}.json"


def _log(job: StageJob, action: Action, note: Mapping[str, Any]) -> None:
    steps = accumulation_steps(job.recipe["global_batch_size"], note["size"], distributed.world_size())
    LOGGER.info(
        "%s under %s: micro-batches of %d samples, %d accumulation step%s (%s; by the formula %.1f MiB a "
        "sample, %.0f MiB allowed)",
        job.phase, action.variant, note["size"], steps, "" if steps == 1 else "s",
        "measured" if note["measured"] else "from the formula", note["sample_bytes"] / 2**20,
        note["allowed_bytes"] / 2**20,
    )  # fmt: skip
