"""Samples to the tensors a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from orchestrator.data.encode import IGNORED_LABEL, Sample
from orchestrator.data.processor import VisionTextProcessor

PaddingSide = Literal["right", "left"]


def collate(
    samples: Sequence[Sample],
    processor: VisionTextProcessor,
    padding_side: PaddingSide = "right",
    with_labels: bool = True,
) -> dict[str, torch.Tensor]:
    """Pad samples to the longest and add the image inputs, ready for `model(**batch)`.

    Returns:
        `input_ids`, `attention_mask`, `labels`: (B, T) int64; `token_type_ids` or `mm_token_type_ids` (B, T), 0 at
        padding, where the model's processor gives them; the image processor's tensors, e.g. `pixel_values`
        (images of the batch, C, H, W), only where the batch has an image.
    """
    shape = (len(samples), max(len(sample) for sample in samples))
    input_ids = np.full(shape, processor.pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    for number, sample in enumerate(samples):
        place = slice(0, len(sample)) if padding_side == "right" else slice(shape[1] - len(sample), shape[1])
        input_ids[number, place] = sample.input_ids
        attention_mask[number, place] = 1
        labels[number, place] = sample.labels
    attention = torch.from_numpy(attention_mask).bool()
    batch = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
    if with_labels:
        batch["labels"] = torch.from_numpy(labels)
    for number, sample in enumerate(samples):
        types = processor.token_types(sample.input_ids, sample.labels)
        if types is not None:
            row = batch.setdefault(types[0], torch.zeros(shape, dtype=torch.int64))[number]
            row[attention[number]] = torch.from_numpy(types[1])
    batch.update(processor.images.tensors([sample.images for sample in samples]))
    return batch
