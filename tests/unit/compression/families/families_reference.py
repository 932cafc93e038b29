"""The plain computation for any family: every row alone, without padding, through two copies of the language model."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from orchestrator.compression.testing.tiny import IMAGE, VIDEO


class _Captured(Exception):
    pass


def embeddings(model, batch):
    """What the plain model gives its language model: text embeddings with visual features in their places."""
    inner, found = model.model, []
    language_model = getattr(inner, "language_model", None) or inner.text_model

    def capture(_, args, kwargs):
        found.append(kwargs["inputs_embeds"])
        raise _Captured

    handle = language_model.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        inner(**{name: value for name, value in batch.items() if name != "labels"})
    except _Captured:
        pass
    finally:
        handle.remove()
    return language_model, found[0]


def slice_of(language_model, first, last):
    """A copy with some of the layers and the same parameters; the norm goes with the last layer."""
    part = copy.deepcopy(language_model, {id(p): p for p in language_model.parameters()})
    whole = last == len(part.layers)
    part.layers = part.layers[first:last]
    types = getattr(part.config, "layer_types", None)
    if types:
        part.config.layer_types = [*types[first:], *types[:first]]  # the forward counts from its first layer
    if not whole:
        part.norm = nn.Identity()
    return part


def run(part, hidden_ND, positions_N):
    """Hidden states of one row; a mask of ones, since a gap in position ids without a mask means packed rows."""
    return part(
        inputs_embeds=hidden_ND.unsqueeze(0),
        position_ids=torch.tensor([positions_N]),
        attention_mask=torch.ones(1, len(hidden_ND), dtype=torch.long),
        use_cache=False,
    ).last_hidden_state[0]


def pooled(tokens, units, stride):
    """Averages windows of each unit; a token is (hidden, position, label, is visual, order in the row).

    A window takes the place of the unit's token at its share of the unit, and the mean of its positions.
    """
    kept = [token for token in tokens if not token[3]]
    visual = [token for token in tokens if token[3]]
    for grid in units:
        unit, visual = visual[: grid.tokens], visual[grid.tokens :]
        windows = [unit[start : start + stride] for start in range(0, len(unit), stride)]
        for number, window in enumerate(windows):
            hidden = torch.stack([token[0] for token in window]).mean(0)
            position = sum(token[1] for token in window) // len(window)
            kept.append((hidden, position, -100, True, unit[number * len(unit) // len(windows)][4]))
    assert not visual
    return sorted(kept, key=lambda token: token[4])


def plain_loss(model, batch, units_of_rows, layer, stride):
    """Mean cross-entropy over label tokens, by loops.

    Args:
        model: A tiny model, not attached.
        batch: Its batch.
        units_of_rows: For each row the grids of its visual input in order, stated by hand.
        layer: Layer before which images are pooled.
        stride: Window.
    """
    language_model, embeds_BND = embeddings(model, batch)
    below = slice_of(language_model, 0, layer)
    above = slice_of(language_model, layer, len(language_model.layers))
    losses = []
    for row, units in enumerate(units_of_rows):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist()
        hidden_ND = run(below, embeds_BND[row][real], list(range(len(ids))))
        tokens = [
            (hidden_ND[place], place, labels[place], token in (IMAGE, VIDEO), place) for place, token in enumerate(ids)
        ]
        tokens = pooled(tokens, units, stride)
        hidden_MD = run(above, torch.stack([token[0] for token in tokens]), [token[1] for token in tokens])
        logits_MV = model.lm_head(hidden_MD).float()
        for place, token in enumerate(tokens[1:]):
            if token[2] != -100:
                losses.append(F.cross_entropy(logits_MV[place], torch.tensor(token[2])))
    return sum(losses) / len(losses)
