"""Encode rows as token ids and labels (the loss is on the assistant's turns only), and collate them into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from orchestrator.data.processing.images import BoundedCache, ImageText
from orchestrator.data.processing.processor import TokenizedText, VisionTextProcessor
from orchestrator.data.processing.templates import TEMPLATES, expand, render
from orchestrator.data.rows import ImageRef, Row
from orchestrator.errors import DataError, UsageError

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


IGNORED_LABEL = -100
SAMPLE_CACHE_BYTES = 256 * 2**20


class RowLengths(NamedTuple):
    """Lengths of a row, and how much of it fits into `model_max_length`.

    Attributes:
        tokens: Tokens of the complete row, visual ones included.
        labels: Tokens of its answers.
        kept_tokens: Tokens that fit.
        kept_labels: Tokens of answers that fit.
        kept_visual: Visual tokens that fit.
        kept_images: Images that fit.
    """

    tokens: int
    labels: int
    kept_tokens: int
    kept_labels: int
    kept_visual: int
    kept_images: int


class _Encoded(NamedTuple):
    """Ids and labels (T,) of the part of a row that fits, its number of images, and the totals of the complete row."""

    input_ids: np.ndarray
    labels: np.ndarray
    num_images: int
    all_tokens: int
    all_labels: int


@dataclass(frozen=True)
class Sample:
    """A tokenised row of length T.

    Attributes:
        input_ids: (T,) int32, the image placeholder once per visual token, between the family's markers.
        labels: (T,) int32, the ids where the assistant speaks, -100 elsewhere.
        images: Images and videos whose tokens are in `input_ids`, in order.
        num_visual_tokens: Visual tokens of them all, before compression.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageRef, ...]
    num_visual_tokens: int

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Encodes the rows of one data set.

    A row longer than `model_max_length`, counted before compression, is truncated. An image is never cut: where the
    limit falls inside one or its markers, the row ends before it.

    Args:
        processor: The model's tokenizer and image processor.
        template: `plain`, `vicuna_v1` or `chat_template`.
        model_max_length: Maximum number of tokens of a row.
    """

    def __init__(self, processor: VisionTextProcessor, template: str, model_max_length: int) -> None:
        if template not in TEMPLATES:
            raise UsageError(f"conversation_template: {template!r} is none of {', '.join(TEMPLATES)}")
        self._processor, self._template, self.model_max_length = processor, template, model_max_length
        # Rows repeat texts (easy-VQA: 38,575 rows, 1,300 texts), so a text is tokenised once.
        self._seen: BoundedCache[_Encoded] = BoundedCache(SAMPLE_CACHE_BYTES)

    def encode(self, row: Row) -> Sample:
        """Return a row as a training sample.

        Raises:
            DataError: it does not fit the template, or an image alone is as long as `model_max_length`.
        """
        return self._encode(row, prompt_only=False)[0]

    def encode_prompt(self, row: Row) -> Sample:
        """Return a row up to where the assistant's last answer begins, without labels.

        Raises:
            DataError: it does not fit the template, or is longer than `model_max_length`: an answer to a truncated
                question would count as the model's.
        """
        return self._encode(row, prompt_only=True)[0]

    def lengths(self, row: Row, prompt_only: bool) -> RowLengths:
        """Return the lengths of what `encode` or `encode_prompt` keeps of a row, and of the complete row.

        Raises:
            DataError: as they do.
        """
        sample, tokens, labels = self._encode(row, prompt_only)
        kept = int(np.count_nonzero(sample.labels != IGNORED_LABEL))
        return RowLengths(tokens, labels, len(sample), kept, sample.num_visual_tokens, len(sample.images))

    def _encode(self, row: Row, prompt_only: bool) -> tuple[Sample, int, int]:
        """Return the sample, and the numbers of tokens and labels of the complete row."""
        images, totals = row.images, None
        while True:
            texts = self._processor.images.texts(images)
            key = (row.turns, texts, prompt_only)
            found = self._seen.get(key)
            if found is None:
                found = self._tokenize(row, texts, prompt_only)
                self._seen.put(key, found, found.input_ids.nbytes + found.labels.nbytes)
            totals = totals or (found.all_tokens, found.all_labels)
            kept = row.images[: found.num_images]
            # Some processors treat an image differently once others of its row are dropped (LLaVA-OneVision: tiles).
            if len(kept) == len(images) or self._processor.images.texts(kept) == texts[: len(kept)]:
                visual = sum(text.num_visual_tokens for text in texts[: len(kept)])
                return Sample(found.input_ids, found.labels, kept, visual), *totals
            images = kept

    def _tokenize(self, row: Row, texts: tuple[ImageText, ...], prompt_only: bool) -> _Encoded:
        """Return the part of a row that fits; an image beyond `texts` ends it."""
        chat = self._processor.chat
        rendered = render(self._template, row, chat, prompt_only)
        expanded = expand(rendered, chat.tokens_of(row), [text.text for text in texts])
        tokens = self._processor.tokenize(expanded.text)
        spoken, of_image = np.zeros(len(tokens.ids), dtype=bool), np.zeros(len(tokens.ids), dtype=bool)
        for first, last in expanded.answers:
            # A token that reaches into an answer belongs to it: tokenizers join the space before a word to the word.
            spoken |= _within(tokens, first, last)
        blocks = [np.flatnonzero(_within(tokens, first, last)) for first, last in expanded.images]
        for block in blocks:
            of_image[block] = True
        # An image beyond `texts` is not expanded, and the row ends before it.
        known = len(tokens.ids) if len(blocks) == len(texts) else int(blocks[len(texts)][0])
        visual = np.flatnonzero(np.isin(tokens.ids[:known], self._processor.placeholder_ids))
        runs = [run for text in texts for run in text.runs]
        if len(visual) != len(runs):
            raise DataError(f"row {row.index}: {len(visual)} image placeholders after tokenising, {len(runs)} expected")
        repeats = np.ones(len(tokens.ids), dtype=np.int64)
        repeats[visual] = runs
        ends = np.cumsum(repeats)
        spans = [(int(ends[block[0]] - repeats[block[0]]), int(ends[block[-1]])) for block in blocks]
        keep, num_images = self._fit(row, int(ends[-1]) if len(ends) else 0, spans, len(texts), prompt_only)
        labels = np.where(spoken & ~of_image, tokens.ids, IGNORED_LABEL)
        return _Encoded(
            np.repeat(tokens.ids, repeats)[:keep].astype(np.int32),
            np.repeat(labels, repeats)[:keep].astype(np.int32),
            num_images,
            int(ends[-1]) if len(ends) else 0,
            int(repeats[labels != IGNORED_LABEL].sum()),
        )

    def _fit(
        self, row: Row, total: int, spans: list[tuple[int, int]], known: int, prompt_only: bool
    ) -> tuple[int, int]:
        """Return how many tokens and images are kept.

        Args:
            row: The row, named in errors.
            total: Tokens of the row.
            spans: Tokens `[first, last)` of each image, its markers included.
            known: Number of images that may be kept.
            prompt_only: Whether the row is a prompt, which must not be cut.
        """
        limit = self.model_max_length
        if total <= limit and known == len(spans):
            return total, known
        if prompt_only:
            raise DataError(
                f"row {row.index}: the prompt has {total} tokens, model_max_length is {limit}; raise the evaluation's "
                "own model_max_length (nothing is trained again) or leave the row out"
            )
        longest = max((last - first for first, last in spans[:known]), default=0)
        if longest >= limit:
            raise DataError(f"row {row.index}: an image of {longest} tokens, model_max_length is {limit}; raise it")
        for number, (first, last) in enumerate(spans):
            if number >= known or last > limit:
                return min(first, limit), number
        return min(total, limit), known


def _within(tokens: TokenizedText, first: int, last: int) -> np.ndarray:
    """Return a mask (T,) of the tokens with a character of `[first, last)`."""
    inside = (tokens.offsets[:, 1] > first) & (tokens.offsets[:, 0] < last)
    return np.asarray(inside & (tokens.offsets[:, 1] > tokens.offsets[:, 0]))
