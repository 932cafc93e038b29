"""The order of the data: a pure function of (seed, step), the same for every variant, micro-batch and world size.

Random numbers are the raw 64-bit output of the counter-based Philox generator, whose stream numpy guarantees, keyed by
a hash of what they are for; sorting them gives a permutation. So no library version, rank or restart moves a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from orchestrator.spec.phase import rows_per_epoch as planned_rows


def permutation(count: int, *purpose: object) -> np.ndarray:
    """Return a permutation of `range(count)`, drawn from what it is for, e.g. `(seed, "epoch", 3)`."""
    key = hashlib.sha256(repr(purpose).encode()).digest()
    draws = np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)).random_raw(count)
    return np.argsort(draws, kind="stable")


def rows_per_epoch(count: int, share: float) -> int:
    """Return the rows of a set of `count` in one epoch of a mixture, as the planner counts them."""
    return planned_rows([(count, share)]) if count else 0


@dataclass(frozen=True)
class SetSize:
    """Rows of one set of a mixture, and how many of them an epoch takes."""

    count: int
    per_epoch: int


class DataOrder:
    """Batches of row indices by step. Rows of a mixture are numbered through its sets in order.

    The stream of samples is one epoch after the other, cut into global batches; a batch may reach over the end of an
    epoch, so every row of an epoch is visited once and every batch is whole.

    Args:
        sets: Sizes of the mixture's sets.
        lengths: Length of each row, any unit.
        has_image: Whether each row has one.
    """

    def __init__(self, sets: Sequence[SetSize], lengths: np.ndarray, has_image: np.ndarray) -> None:
        self._sets, self._lengths, self._has_image = tuple(sets), lengths, has_image
        self.epoch_length = sum(part.per_epoch for part in sets)
        self._arranged = lru_cache(maxsize=4)(self._arrange)

    def batch(self, seed: int, step: int, global_batch_size: int, group_by_modality_length: bool) -> list[int]:
        """Return the row indices of one optimizer step, longest first where batches are grouped."""
        first, last = step * global_batch_size, (step + 1) * global_batch_size
        found: list[int] = []
        while first < last:
            epoch, offset = divmod(first, self.epoch_length)
            rows = self._arranged(seed, epoch, global_batch_size if group_by_modality_length else 0)
            part = rows[offset : offset + last - first]
            found.extend(part.tolist())
            first += len(part)
        if group_by_modality_length:
            found.sort(key=lambda row: (bool(self._has_image[row]), -int(self._lengths[row])))
        return found

    def _arrange(self, seed: int, epoch: int, group: int) -> np.ndarray:
        """Return the rows of an epoch in order; with `group` (the global batch size) batches are of one modality."""
        rows = self._rows(seed, epoch)
        rows = rows[permutation(len(rows), seed, "order", epoch)]
        if not group:
            return rows
        # The epoch's first rows complete the batch that the epoch before began.
        head = min(-(epoch * self.epoch_length) % group, len(rows))
        batches: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for modality in (True, False):
            of_modality = rows[head:][self._has_image[rows[head:]] == modality]
            whole = len(of_modality) // group * group
            batches.extend(of_modality[:whole].reshape(-1, group))
            rest.append(of_modality[whole:])
        shuffled = [batches[i] for i in permutation(len(batches), seed, "batches", epoch)]
        return np.concatenate([rows[:head], *shuffled, *rest])

    def _rows(self, seed: int, epoch: int) -> np.ndarray:
        """Return the rows an epoch takes: of each set the next of its own endless stream, so that a share visits all
        in turn.
        """
        parts: list[np.ndarray] = []
        offset = 0
        for number, part in enumerate(self._sets):
            first, taken = epoch * part.per_epoch, 0
            while taken < part.per_epoch:
                round_number, start = divmod(first + taken, part.count)
                order = permutation(part.count, seed, "set", number, round_number)
                parts.append(order[start : start + part.per_epoch - taken] + offset)
                taken += len(parts[-1])
            offset += part.count
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
