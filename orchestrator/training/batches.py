"""Which samples a rank gets in an optimizer step, and a thread that prepares the next step's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.data.processing.encode import IGNORED_LABEL
from orchestrator.errors import UsageError
from orchestrator.training import distributed


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward on one rank.

    Attributes:
        indices: Indices of the samples in the training data.
        tensors: What the model takes: `input_ids` (B, T), `labels` (B, T), `pixel_values`, ...
    """

    indices: list[int]
    tensors: dict[str, torch.Tensor]

    @property
    def label_tokens(self) -> int:
        """Number of predicted tokens: a first token never is one."""
        return int((self.tensors["labels"][:, 1:] != IGNORED_LABEL).sum())


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return how many micro-batches one rank computes in one optimizer step.

    Raises:
        UsageError: there are more workers than samples in a global batch.
    """
    steps = -(-global_batch_size // (micro_batch_size * world_size))
    if steps * world_size > global_batch_size:
        raise UsageError(
            f"global_batch_size: {global_batch_size} samples cannot be dealt to {world_size} workers in "
            f"{steps} micro-batches each; raise it, or use fewer workers"
        )
    return steps


def even_size(global_batch_size: int, world_size: int, most: float) -> int:
    """Return the smallest micro-batch with the fewest accumulation steps that sizes up to `most` allow.

    It is at least so large that every worker has a sample in every accumulation step.
    """
    least_steps = -(-global_batch_size // (max(1, int(most)) * world_size))
    steps = max(1, min(least_steps, global_batch_size // world_size))
    return -(-global_batch_size // (steps * world_size))


def deal(indices: Sequence[int], micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return the micro-batches of a rank: the global batch is cut into chunks, and ranks take them in turn.

    Sizes of chunks differ by at most one; rank r takes chunks r, r + world_size, ... Neighbouring samples have similar
    lengths where batches are grouped by length, so that ranks wait little for one another. The samples of a step depend
    on neither the micro-batch size nor the world size.
    """
    steps = accumulation_steps(len(indices), micro_batch_size, world_size)
    chunks = steps * world_size
    bounds = [i * len(indices) // chunks for i in range(chunks + 1)]
    return [list(indices[bounds[i] : bounds[i + 1]]) for i in range(rank, chunks, world_size)]


class BatchFeed:
    """Micro-batches by optimizer step; a thread prepares the next step while this one is computed.

    Args:
        indices_of: Returns the indices of a step's global batch, a pure function of the step.
        collate: Returns the tensors of samples; must not draw from torch's global generator, which the model uses.
        micro_batch_size_of: Returns how many samples a rank computes at a time in a step.
        last_step: End of the stage run; nothing beyond it is prepared.
    """

    def __init__(
        self,
        indices_of: Callable[[int], Sequence[int]],
        collate: Callable[[Sequence[int]], dict[str, Any]],
        micro_batch_size_of: Callable[[int], int],
        last_step: int,
    ) -> None:
        self._indices_of, self._collate = indices_of, collate
        self._micro_batch_size_of, self._last_step = micro_batch_size_of, last_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ready: dict[int, Future[list[MicroBatch]]] = {}

    def get(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step; errors in the data are raised here."""
        future = self._ready.pop(step, None) or self._thread.submit(self._prepare, step)
        if step + 1 < self._last_step and step + 1 not in self._ready:
            self._ready[step + 1] = self._thread.submit(self._prepare, step + 1)
        return future.result()

    def close(self) -> None:
        """Stop the thread and discard what it prepared."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int) -> list[MicroBatch]:
        ranks = distributed.rank(), distributed.world_size()
        shares = deal(self._indices_of(step), self._micro_batch_size_of(step), *ranks)
        return [MicroBatch(indices, self._collate(indices)) for indices in shares]
