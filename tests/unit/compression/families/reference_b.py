"""The plain computation for families with blocks, windows, several position axes or DeepStack: rows and loops."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from orchestrator.compression.testing.tiny import IMAGE, VIDEO


@dataclass(frozen=True)
class Token:
    """One token of a row: hidden state, position id per axis, unit (None = text), block, label, column, size."""

    hidden: torch.Tensor
    position: tuple
    unit: int | None
    block: int
    label: int
    column: int
    size: int = 1


def entering(model, batch):
    """What the plain top model hands to its language model."""
    seen = {}
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    hook.remove()
    return seen


def row_tokens(tiny, rows, batch, seen, r):
    """Row `r` of a batch as a list of tokens, padding left out; units as stated by hand."""
    lengths = [grid.tokens for part in rows[r] if isinstance(part, str) for grid in tiny.units[part]]
    units = iter([number for number, length in enumerate(lengths) for _ in range(length)])
    positions, ids = seen.get("position_ids"), batch["input_ids"][r].tolist()
    tokens, block = [], -1
    for c, token in enumerate(ids):
        if not batch["attention_mask"][r, c]:
            continue
        if positions is None:
            position = (c,)
        elif positions.ndim == 2:
            position = (int(positions[0 if len(positions) == 1 else r, c]),)
        else:
            position = tuple(positions[:, r, c].tolist())
        visual = token in (IMAGE, VIDEO)
        if tiny.model_type == "paligemma":
            block_here = 0 if batch["token_type_ids"][r, c] == 0 else -1
        elif tiny.model_type == "gemma3":
            block += int(visual and (c == 0 or ids[c - 1] != IMAGE))
            block_here = block if visual else -1
        else:
            block_here = -1
        label = int(batch["labels"][r, c]) if "labels" in batch else -100
        hidden = seen["inputs_embeds"][r, c]
        tokens.append(Token(hidden, position, next(units) if visual else None, block_here, label, c))
    assert next(units, None) is None, "the row holds fewer placeholders than stated"
    return tokens


def pool(tokens, stride, renumber=False):
    """Averages windows of `stride` neighbours of every unit."""
    result = []
    for unit, members in itertools.groupby(tokens, key=lambda token: token.unit):
        members = list(members)
        if unit is None or len(members) == 1:
            result += members
            continue
        for start in range(0, len(members), stride):
            window = members[start : start + stride]
            axes = zip(*(token.position for token in window), strict=True)
            result.append(
                replace(
                    window[0],
                    hidden=sum(token.hidden for token in window) / len(window),
                    position=tuple(sum(axis) // len(window) for axis in axes),
                    size=sum(token.size for token in window),
                    label=-100,
                )
            )
    if renumber:
        first = [min(axis) for axis in zip(*(token.position for token in result), strict=True)]
        result = [replace(t, position=tuple(f + n for f in first)) for n, t in enumerate(result)]
    return result


def mask_of(tiny, tokens, window, size_bias):
    """Additive mask, number by number."""
    count = len(tokens)
    mask = torch.full((1, 1, count, count), torch.finfo(torch.float32).min)
    for q, k in itertools.product(range(count), repeat=2):
        causal, near = k <= q, window is None or k > q - window
        same = tokens[q].block >= 0 and tokens[q].block == tokens[k].block
        sees = ((causal and near) or same) if tiny.model_type == "paligemma" else (near and (causal or same))
        if sees:
            mask[0, 0, q, k] = math.log(tokens[k].size) if size_bias else 0.0
    return mask


def run_row(tiny, model, tokens, points, deep=()):
    """One row through the decoder, layer by layer; `deep` are DeepStack's features of its visual tokens, per layer."""
    decoder = model.model.language_model
    config, size_bias = decoder.config, False
    kinds = getattr(config, "layer_types", None)
    for number, layer in enumerate(decoder.layers):
        for point in points:
            if point["layer"] == number:
                tokens = pool(tokens, point["stride"], point.get("positions") == "renumber")
                size_bias = size_bias or point.get("size_bias", False)
        hidden = torch.stack([token.hidden for token in tokens]).unsqueeze(0)
        axes = torch.tensor([token.position for token in tokens]).T.unsqueeze(1)
        rotated = axes[0] if len(axes) == 1 else axes[-3:]
        if len(axes) == 1 and tiny.model_type.startswith("qwen"):
            rotated = axes.expand(3, -1, -1)
        kind = kinds[number] if kinds else "full_attention"
        arguments = (hidden, rotated, kind) if tiny.model_type == "gemma3" else (hidden, rotated)
        window = config.sliding_window if kind == "sliding_attention" else None
        out = layer(
            hidden,
            attention_mask=mask_of(tiny, tokens, window, size_bias),
            position_embeddings=decoder.rotary_emb(*arguments),
        )
        out = (out[0] if isinstance(out, tuple) else out)[0]
        states = list(out)
        if number < len(deep):
            features = iter(deep[number])
            states = [s if t.unit is None else s + next(features) for s, t in zip(states, tokens, strict=True)]
        tokens = [replace(token, hidden=state) for token, state in zip(tokens, states, strict=True)]
    return tokens


def logits_of(model, tokens):
    """Logits of a row's last states."""
    decoder = model.model.language_model
    logits = model.lm_head(decoder.norm(torch.stack([token.hidden for token in tokens])))
    cap = getattr(decoder.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def reference_rows(tiny, model, rows, batch, points):
    """For each row its kept tokens and their logits."""
    seen = entering(model, batch)
    result, place = [], 0
    for r in range(len(rows)):
        tokens = row_tokens(tiny, rows, batch, seen, r)
        count = sum(token.unit is not None for token in tokens)
        deep = [level[place : place + count] for level in seen.get("deepstack_visual_embeds") or ()]
        place += count
        tokens = run_row(tiny, model, tokens, points, deep)
        result.append((tokens, logits_of(model, tokens)))
    return result


def reference_loss(result):
    """Mean over all label tokens."""
    losses = []
    for tokens, logits in result:
        for n in range(1, len(tokens)):
            if tokens[n].label != -100:
                losses.append(F.cross_entropy(logits[n - 1], torch.tensor(tokens[n].label)))
    return sum(losses) / len(losses)
