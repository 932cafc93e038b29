"""Which samples a rank sees in an optimizer step, and a thread that has the next step's tensors ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.data.processing.encode import IGNORED_LABEL
from orchestrator.errors import UsageError


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
        """Tokens that are predicted: a first token never is."""
        return int((self.tensors["labels"][:, 1:] != IGNORED_LABEL).sum())


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the micro-batches of one rank in one optimizer step.

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
    """Return the smallest size with the fewest accumulation steps that sizes up to `most` allow.

    At least what one worker needs so that each has a sample in every accumulation step.
    """
    least_steps = -(-global_batch_size // (max(1, int(most)) * world_size))
    steps = max(1, min(least_steps, global_batch_size // world_size))
    return -(-global_batch_size // (steps * world_size))


def deal(indices: Sequence[int], micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return a rank's micro-batches of a global batch: neighbours stay together and ranks take turns.

    The batch is cut into chunks whose sizes differ by at most one; rank r takes chunks r, r + world_size, ...
    Neighbours have like lengths where batches are grouped by length, so ranks wait little for one another. Which
    samples the step has depends on neither micro-batch nor world size.
    """
    steps = accumulation_steps(len(indices), micro_batch_size, world_size)
    chunks = steps * world_size
    bounds = [i * len(indices) // chunks for i in range(chunks + 1)]
    return [list(indices[bounds[i] : bounds[i + 1]]) for i in range(rank, chunks, world_size)]


class BatchFeed:
    """Micro-batches by optimizer step; the next step is prepared in a thread while this one is computed.

    Args:
        indices_of: Indices of the global batch of a step, a pure function of the step.
        collate: Tensors of some samples; must not draw from torch's global generator, which belongs to the model.
        micro_batch_size_of: Samples of one rank in one forward, by step.
        last_step: End of the stage run; nothing beyond it is prepared.
    """

    def __init__(
        self,
        indices_of: Callable[[int], Sequence[int]],
        collate: Callable[[Sequence[int]], dict[str, Any]],
        micro_batch_size_of: Callable[[int], int],
        rank: int,
        world_size: int,
        last_step: int,
    ) -> None:
        self._indices_of, self._collate = indices_of, collate
        self._micro_batch_size_of, self._ranks = micro_batch_size_of, (rank, world_size)
        self._last_step = last_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ready: dict[int, Future[list[MicroBatch]]] = {}

    def get(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step; errors of the data are raised here."""
        future = self._ready.pop(step, None) or self._thread.submit(self._prepare, step)
        if step + 1 < self._last_step and step + 1 not in self._ready:
            self._ready[step + 1] = self._thread.submit(self._prepare, step + 1)
        return future.result()

    def close(self) -> None:
        """End the thread; what it prepared is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int) -> list[MicroBatch]:
        shares = deal(self._indices_of(step), self._micro_batch_size_of(step), *self._ranks)
        return [MicroBatch(indices, self._collate(indices)) for indices in shares]
