"""`TrainData`: the data sets of a phase as one numbered sequence, its order, and its batches as tensors.

The order is a pure function of (seed, step), the same for every variant, micro-batch and world size. Random numbers are
the raw 64-bit output of the counter-based Philox generator, whose stream numpy guarantees, keyed by a hash of their
purpose; sorting them gives a permutation. So no library version, rank or restart moves a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from orchestrator.data.processing.encode import IGNORED_LABEL, Encoder, PaddingSide, Sample, collate
from orchestrator.data.processing.processor import VisionTextProcessor, load_processor
from orchestrator.data.records.row_index import IndexedRows, JoinedRows, num_images, num_words, open_rows
from orchestrator.data.rows import Row, data_spec, raise_for_errors, template_of
from orchestrator.errors import DataError
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.phase import rows_per_epoch


def permutation(count: int, *purpose: object) -> np.ndarray:
    """Return a permutation of `range(count)`, drawn from its purpose, e.g. `(seed, "epoch", 3)`."""
    key = hashlib.sha256(repr(purpose).encode()).digest()
    draws = np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)).random_raw(count)
    return np.argsort(draws, kind="stable")


@dataclass(frozen=True)
class SetSize:
    """Number of rows of one set of a mixture, and how many of them an epoch takes."""

    count: int
    per_epoch: int


class DataOrder:
    """Batches of row indices by step. Rows of a mixture are numbered through its sets in order.

    The stream of samples is one epoch after the other, cut into global batches; a batch may span two epochs, so every
    row of an epoch is visited once and every batch is complete.

    Args:
        sets: Sizes of the mixture's sets.
        lengths: Length of each row, any unit.
        has_image: Whether each row has an image.
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
        # The epoch's first rows complete the last batch of the epoch before.
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
        """Return the rows of an epoch: of each set the next of its own endless stream, so that a share visits all rows
        in the course of epochs.
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


ROWS_TRIED = 64
LONGEST_TRIED = 32


class TrainData:
    """A phase's mixture of data sets.

    Attributes:
        rows: Rows of all sets, one set after the other; an index into it is a sample's index everywhere.
    """

    def __init__(self, sets: Sequence[tuple[Sequence[Row], float, Encoder]], processor: VisionTextProcessor) -> None:
        self.rows: Sequence[Row] = JoinedRows([rows for rows, _, _ in sets])
        self._encoders = [encoder for _, _, encoder in sets]
        self._set_of = np.repeat(np.arange(len(sets)), [len(rows) for rows, _, _ in sets])
        self._sizes = [SetSize(len(rows), rows_per_epoch([(len(rows), share)])) for rows, share, _ in sets]
        self._processor = processor

    def __len__(self) -> int:
        """Return the number of samples of one epoch."""
        return sum(size.per_epoch for size in self._sizes)

    @cached_property
    def _order(self) -> DataOrder:
        return DataOrder(self._sizes, num_words(self.rows), num_images(self.rows) > 0)

    @cached_property
    def longest(self) -> list[int]:
        """Samples that may need the most memory: of each set the longest in words and in images, and some in between.

        Words approximate tokens, which would need encoding; the samples in between catch images of unusual sizes.
        """
        found: dict[int, None] = {}
        for number in range(len(self._sizes)):
            indices = np.flatnonzero(self._set_of == number)
            for measure in (num_words(self.rows), num_images(self.rows)):
                most = np.argsort(-measure[indices], kind="stable")[:LONGEST_TRIED]
                found |= dict.fromkeys(indices[most].tolist())
            found |= dict.fromkeys(indices[:: max(1, len(indices) // LONGEST_TRIED)].tolist())
        return list(found)

    def batch_indices(
        self, seed: int, step: int, global_batch_size: int, group_by_modality_length: bool = False
    ) -> list[int]:
        """Return the samples of one optimizer step over all ranks: a pure function of the arguments.

        Grouped as in LLaVA: a batch holds only rows with an image or only rows without, longest first, so that
        neighbours have similar lengths; ranks take neighbours in turn.
        """
        return self._order.batch(seed, step, global_batch_size, group_by_modality_length)

    def sample(self, index: int) -> Sample:
        """Return one sample, tokenised.

        Raises:
            DataError: the row cannot be encoded.
        """
        return self._encoders[self._set_of[index]].encode(self.rows[index])

    def collate(self, indices: Sequence[int], padding_side: PaddingSide = "right") -> dict[str, torch.Tensor]:
        """Return the tensors of some samples, ready for `model(**batch)`; see `collate`.

        Raises:
            DataError: an image cannot be read or a row cannot be encoded.
        """
        return collate([self.sample(index) for index in indices], self._processor, padding_side)


def build_train_data(
    datasets: Sequence[Mapping[str, Any]],
    model: ModelSpec | VisionTextProcessor,
    model_max_length: int,
) -> TrainData:
    """Return the data of a phase.

    Args:
        datasets: `{"name", "share", "spec", "content"}` each, as in `StageJob.data`.
        model: Whose processor reads the data, or the processor itself.
        model_max_length: Most tokens of a row, counted before compression.

    Raises:
        DataError: a set has no rows, errors, or rows whose images alone are longer than `model_max_length`.
    """
    processor = load_processor(model) if isinstance(model, ModelSpec) else model
    sets = []
    for entry in datasets:
        spec = data_spec(entry["spec"])
        rows = open_rows(spec, entry.get("content"), entry.get("left_out", ()))
        if not len(rows):
            raise DataError(f"data.{entry['name']}: no rows")
        if clips := rows.origin.images.clips:
            processor.images.know_clips(clips)
        _images_fit(entry["name"], rows, processor, model_max_length)
        encoder = Encoder(processor, template_of(spec), model_max_length)
        _answers_fit(entry["name"], rows, encoder, model_max_length)
        sets.append((rows, float(entry.get("share", 1.0)), encoder))
    return TrainData(sets, processor)


def _answers_fit(name: str, rows: Sequence[Row], encoder: Encoder, model_max_length: int) -> None:
    """Encode the first rows, so that a template or a limit that fits none is reported before training."""
    first = rows[:ROWS_TRIED]
    if not any((encoder.encode(row).labels != IGNORED_LABEL).any() for row in first):
        raise DataError(
            f"data.{name}: model_max_length {model_max_length} cuts off every answer of the first {len(first)} rows; "
            "raise it"
        )


def _images_fit(name: str, rows: IndexedRows, processor: VisionTextProcessor, model_max_length: int) -> None:
    counts = rows.num_images
    if not counts.any() or processor.fixed_image_tokens is None:
        return
    per_image = processor.fixed_image_tokens
    too_many = np.flatnonzero(counts * per_image >= model_max_length).tolist()
    raise_for_errors(
        f"data.{name}",
        [
            f"row {rows[at].index}: {counts[at]} images take {counts[at] * per_image} tokens, "
            f"model_max_length is {model_max_length}; raise it or take the row out"
            for at in too_many
        ],
    )
