"""One trial of a micro-batch on a GPU: forward and backward of the longest samples, which leave nothing behind."""

from __future__ import annotations

import torch

from orchestrator.data.pipeline import TrainData
from orchestrator.plan.jobs import Action, StageJob
from orchestrator.training import group
from orchestrator.training.batches import MicroBatch
from orchestrator.training.figures import peak_memory_gib, reset_peak_memory
from orchestrator.training.memory import Session
from orchestrator.training.micro_batch import set_accumulation
from orchestrator.training.step import forward_losses


def longest_samples(data: TrainData, size: int) -> list[int]:
    """As many of the longest samples as a micro-batch has, again and again where there are too few."""
    by_length = sorted(data.longest, key=lambda index: -len(data.sample(index)))
    return [by_length[i % len(by_length)] for i in range(size)]


def measure_trial(session: Session, job: StageJob, data: TrainData, action: Action, size: int) -> float:
    """Return the share of the device's memory at the peak of one micro-batch; every rank calls it.

    The loss is multiplied by zero, so that the gradients which the first real micro-batch adds to are zeros. They are
    computed and reduced as in a step; Adam's states are in memory already from ZeRO 1 on.

    Args:
        session: Its engine is between two optimizer steps.
        data: The longest samples of it are tried, again and again where there are too few.
        action: What is tried.
        size: Samples of the micro-batch.

    Raises:
        torch.OutOfMemoryError: it does not fit; the engine must be opened anew.
    """
    indices = longest_samples(data, size)
    # Two micro-batches an optimizer step: this one is not the last, so that nothing is updated.
    set_accumulation(session.engine, 2 * size * group.world_size(), size)
    session.attachment.switch(list(action.points))
    session.attachment.set_step(step=job.first_step, seed=job.seed, sample_index=indices)
    session.draws.enter(job.seed, job.first_step, indices)
    session.points = None
    reset_peak_memory()
    batch = MicroBatch(indices, data.collate(indices))
    losses = forward_losses(session, action, batch, float(batch.label_tokens), seed=0)
    session.engine.backward(losses.total * 0.0, scale_wrt_gas=False)
    session.learned.collect()
    if not torch.cuda.is_available():
        return 0.0
    return peak_memory_gib() * 2**30 / torch.cuda.get_device_properties(group.device()).total_memory
