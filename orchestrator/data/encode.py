"""Rows to token ids and labels: placeholders expanded, length limited, loss on the assistant's turns only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.data.bounded_cache import BoundedCache
from orchestrator.data.processor import VisionTextProcessor
from orchestrator.data.rows import ImageRef, Row
from orchestrator.data.templates import TEMPLATES, render
from orchestrator.errors import DataError, UsageError

IGNORED_LABEL = -100
SAMPLE_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Sample:
    """A tokenised row of length T.

    Attributes:
        input_ids: (T,) int32, the image placeholder once for every visual token.
        labels: (T,) int32, the ids where the assistant speaks, -100 elsewhere.
        images: Images whose tokens are in `input_ids`, in order.
        num_visual_tokens: Visual tokens of all images, before compression.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageRef, ...]
    num_visual_tokens: int

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Encodes the rows of one data set.

    A row longer than `model_max_length`, counted before compression, loses its end. An image is never cut: where the
    limit falls inside one, the row ends before it. A row whose answers are all cut off teaches nothing.

    Args:
        processor: The model's tokenizer and image processor.
        template: `plain`, `vicuna_v1` or `chat_template`.
        model_max_length: Most tokens of a row.
    """

    def __init__(self, processor: VisionTextProcessor, template: str, model_max_length: int) -> None:
        if template not in TEMPLATES:
            raise UsageError(f"conversation_template: {template!r} is none of {', '.join(TEMPLATES)}")
        self._processor, self._template, self._max_length = processor, template, model_max_length
        # Rows repeat texts (easy-VQA: 38,575 rows, 1,300 texts), so a text is tokenised once.
        self._seen: BoundedCache[tuple[np.ndarray, np.ndarray, int]] = BoundedCache(SAMPLE_CACHE_BYTES)

    def encode(self, row: Row) -> Sample:
        """A row for training.

        Raises:
            DataError: it does not fit the template, or an image alone is as long as `model_max_length`.
        """
        return self._encode(row, prompt_only=False)

    def encode_prompt(self, row: Row) -> Sample:
        """A row up to where the assistant's last answer begins; no labels.

        Raises:
            DataError: it does not fit the template, or is longer than `model_max_length`: an answer to half a
                question would count as the model's.
        """
        return self._encode(row, prompt_only=True)

    def _encode(self, row: Row, prompt_only: bool) -> Sample:
        counts = tuple(self._processor.image_tokens(image) for image in row.images)
        key = (row.turns, counts, prompt_only)
        found = self._seen.get(key)
        if found is None:
            found = self._tokenize(row, counts, prompt_only)
            self._seen.put(key, found, found[0].nbytes + found[1].nbytes)
        input_ids, labels, num_images = found
        return Sample(input_ids, labels, row.images[:num_images], sum(counts[:num_images]))

    def _tokenize(self, row: Row, counts: tuple[int, ...], prompt_only: bool) -> tuple[np.ndarray, np.ndarray, int]:
        rendered = render(self._template, row, self._processor.chat, prompt_only)
        tokens = self._processor.tokenize(rendered.text)
        spoken = np.zeros(len(tokens.ids), dtype=bool)
        for first, last in rendered.answers:
            # A token that reaches into an answer belongs to it: tokenizers join the blank before a word to the word.
            inside = (tokens.offsets[:, 1] > first) & (tokens.offsets[:, 0] < last)
            spoken |= inside & (tokens.offsets[:, 1] > tokens.offsets[:, 0])
        is_image = tokens.ids == self._processor.image_token_id
        if is_image.sum() != len(counts):
            raise DataError(
                f"row {row.index}: {int(is_image.sum())} image placeholders after tokenising, {len(counts)} images"
            )
        repeats = np.ones(len(tokens.ids), dtype=np.int64)
        repeats[is_image] = counts
        labels = np.where(spoken & ~is_image, tokens.ids, IGNORED_LABEL)
        keep, num_images = self._fit(row, repeats, is_image, prompt_only)
        input_ids = np.repeat(tokens.ids, repeats)[:keep].astype(np.int32)
        return input_ids, np.repeat(labels, repeats)[:keep].astype(np.int32), num_images

    def _fit(self, row: Row, repeats: np.ndarray, is_image: np.ndarray, prompt_only: bool) -> tuple[int, int]:
        """Tokens and images that are kept."""
        ends = np.cumsum(repeats)
        total, limit = int(ends[-1]) if len(ends) else 0, self._max_length
        if total <= limit:
            return total, int(is_image.sum())
        if prompt_only:
            raise DataError(
                f"row {row.index}: the prompt has {total} tokens, model_max_length is {limit}; raise it or leave it out"
            )
        if (repeats[is_image] >= limit).any():
            raise DataError(
                f"row {row.index}: an image of {int(repeats[is_image].max())} tokens, model_max_length is {limit}; "
                "raise it"
            )
        cut = next((end - n for end, n in zip(ends[is_image], repeats[is_image], strict=True) if end > limit), limit)
        keep = min(int(cut), limit)
        return keep, int((is_image & (ends <= keep)).sum())
