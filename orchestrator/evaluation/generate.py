"""Batched greedy answers of a vision-language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from orchestrator.compression import attachment_of
from orchestrator.data.processing.encode import collate
from orchestrator.data.rows import Row
from orchestrator.evaluation.protocol import EvaluationData


def greedy_answers(
    model: Any, rows: Sequence[Row], data: EvaluationData, batch_size: int, max_new_tokens: int
) -> list[str]:
    """Return the model's answer to each row, in the order of `rows`, without special tokens.

    Prompts are padded on the left, so that all answers of a batch begin at the same position, and batched by length, so
    that there is little padding; generation uses a KV cache and stops when every answer of the batch has ended. When
    `data.should_stop` is true, the remaining answers are empty.

    Raises:
        DataError: a prompt is longer than the model may take, or an image cannot be read.
    """
    prompts = [data.encoder.encode_prompt(row) for row in rows]
    # Text-only prompts stay together: a batch then has an image in every row or in none.
    order = sorted(range(len(prompts)), key=lambda i: (bool(prompts[i].images), len(prompts[i]), i))
    tokenizer = data.processor.tokenizer
    answers = [""] * len(rows)
    weight, attachment = next(model.parameters()), attachment_of(model)
    for first in range(0, len(order), batch_size):
        if data.should_stop():
            break
        part = order[first : first + batch_size]
        batch = collate([prompts[i] for i in part], data.processor, padding_side="left", with_labels=False)
        moved = {
            name: value.to(weight.device, weight.dtype) if value.is_floating_point() else value.to(weight.device)
            for name, value in batch.items()
        }
        if attachment is not None:
            # Random methods draw by row, so that answers do not depend on the batch size.
            attachment.set_step(sample_index=[rows[i].index for i in part])
        generated = model.generate(
            **moved,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=end_tokens(model, tokenizer),
            pad_token_id=data.processor.pad_token_id,
            # An untrained model may generate the placeholder, which would count as an image without pixels.
            suppress_tokens=data.processor.placeholder_ids,
        )
        new_tokens = generated[:, moved["input_ids"].shape[1] :]
        for i, text in zip(part, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return answers


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the tokenizer's and the model's (Gemma 3 ends a turn with another token)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(int(id) for id in ids if id is not None))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Disable dropout and gradients; afterwards restore the mode of every module."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
