"""What the contract kit knows of a tiny random model of a family: how it is built, what its batches are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from orchestrator.spec.components import Grid

Row = Sequence[int | str]


@dataclass(frozen=True)
class TinyFamily:
    """A family as the kit tests it.

    Attributes:
        model_type: `model_type` of its config, the key under which its adapter is registered.
        build: `build(attention, seed)`: a random model of a few narrow layers in float32, weights large enough that
            what the layers do shows in the loss.
        batch: `batch(rows, padding, seed, answer)`: keyword arguments of the model's forward. A row lists numbers of
            text tokens and kinds of visual input; the last `answer` tokens of a row carry labels (-100 elsewhere).
        units: For each kind of visual input a row may hold (`image`, `small` for another size, `video`), the grids it
            becomes, in order; stated by hand, not by the adapter.
        layers: Decoder layers; points act at layers the family allows.
        first_layer: First layer at which a point may act.
        attentions: Attention implementations that run on a CPU.
    """

    model_type: str
    build: Callable[[str, int], nn.Module]
    batch: Callable[[Sequence[Row], str, int, int], dict[str, Tensor]]
    units: Mapping[str, tuple[Grid, ...]]
    layers: int = 4
    first_layer: int = 0
    attentions: tuple[str, ...] = ("eager", "sdpa")


def pad_rows(
    sequences: Sequence[Sequence[int]], visual: Sequence[Sequence[bool]], padding: str, pad_token: int, answer: int
) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` and `labels` of rows of token ids.

    Args:
        sequences: Token ids of each row, placeholders expanded.
        visual: True at each row's placeholders; they never carry a label.
        padding: `left` or `right`.
        pad_token: Token id of padding.
        answer: How many last tokens of a row carry labels; 0 for none.
    """
    import torch

    length = max(map(len, sequences))
    ids, mask, labels = [], [], []
    for tokens, is_visual in zip(sequences, visual, strict=True):
        gap = length - len(tokens)
        labelled = [
            token if number >= len(tokens) - answer and not seen else -100
            for number, (token, seen) in enumerate(zip(tokens, is_visual, strict=True))
        ]
        left, right = (gap, 0) if padding == "left" else (0, gap)
        ids.append([pad_token] * left + list(tokens) + [pad_token] * right)
        mask.append([0] * left + [1] * len(tokens) + [0] * right)
        labels.append([-100] * left + labelled + [-100] * right)
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(value) for name, value in named.items()}
