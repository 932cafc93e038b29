"""What tiny random models share: a small vocabulary, rows with expanded placeholders, weights that matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.testing.tiny import Row, pad_rows

PAD, FIRST_TEXT, SEPARATOR, VIDEO, IMAGE, VOCABULARY = 0, 1, 61, 62, 63, 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
VISION_SIZES = SIZES | {"num_hidden_layers": 2}
TEXT_SIZES = SIZES | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}


def enlarge(model: nn.Module, factor: float = 4.0) -> nn.Module:
    """Make weights larger than their initial values, so that what layers do shows in the loss."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model


def text_batch(
    rows: Sequence[Row], tokens: Mapping[str, Sequence[int]], padding: str, generator: torch.Generator, answer: int
) -> tuple[dict[str, Any], list[list[str]]]:
    """Return the text side of a batch, and the kinds of visual input in each row.

    Args:
        rows: Rows as `TinyFamily.batch` takes them.
        tokens: Token ids that each kind of visual input becomes; those that are not `IMAGE` or `VIDEO` are text.
        padding: `left` or `right`.
        generator: Draws the text.
        answer: How many last tokens of a row carry labels.
    """
    sequences: list[list[int]] = []
    for row in rows:
        ids: list[int] = []
        for part in row:
            if isinstance(part, str):
                ids += tokens[part]
            else:
                ids += torch.randint(FIRST_TEXT, SEPARATOR, (part,), generator=generator).tolist()
        sequences.append(ids)
    visual = [[token in (IMAGE, VIDEO) for token in ids] for ids in sequences]
    kinds = [[part for part in row if isinstance(part, str)] for row in rows]
    return pad_rows(sequences, visual, padding, PAD, answer), kinds


def pixels(*shape: int, generator: torch.Generator) -> Tensor:
    """Return the random pixels."""
    return torch.randn(*shape, generator=generator)


def generator_of(seed: int) -> torch.Generator:
    """Return a generator of its own, so that the global state stays as it is."""
    return torch.Generator().manual_seed(seed)
