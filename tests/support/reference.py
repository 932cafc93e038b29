"""The plain, obviously correct computation that the mechanism is held against: one row at a time, loops everywhere."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from orchestrator.compression.testing.families import TINY, tiny_llava
from orchestrator.compression.testing.tiny import IMAGE, PAD, VIDEO
from orchestrator.spec.components import Grid
from orchestrator.spec.model_facts import ModelFacts

__all__ = ["IMAGE", "PAD", "tiny_llava"]

TOKENS = 9  # of an image of the tiny LLaVA


def make_batch(rows, padding="right", seed=0, answer=3):
    """Rows given as lists of a number of text tokens or "image"; labels on each row's last `answer` tokens."""
    return TINY["llava"].batch(rows, padding, seed, answer)


def windows_of(count, point):
    """Lists of token numbers, one for each window."""
    if "stride" in point:
        return [list(range(s, min(s + point["stride"], count))) for s in range(0, count, point["stride"])]
    n = point["keep_tokens"]
    return [list(range(j * count // n, (j + 1) * count // n)) for j in range(n)]


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


def decoder_of(model):
    """The language model's stack of layers."""
    return getattr(model.model, "language_model", None) or model.model.text_model


def entering(model, batch):
    """What the plain top model hands to its language model."""
    seen = {}
    hook = decoder_of(model).register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    hook.remove()
    return seen


def row_tokens(model, batch, seen, r, lengths):
    """Row `r` of a batch as a list of tokens, padding left out; `lengths` of its images, tiles and frames in order."""
    ids, model_type = batch["input_ids"][r].tolist(), model.config.model_type
    if lengths is None:
        lengths = [TOKENS] * (ids.count(IMAGE) // TOKENS)
    units = iter([number for number, length in enumerate(lengths) for _ in range(length)])
    positions = seen.get("position_ids")
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
        if model_type == "paligemma":
            block_here = 0 if batch["token_type_ids"][r, c] == 0 else -1
        elif model_type == "gemma3":
            block += int(visual and (c == 0 or ids[c - 1] != IMAGE))
            block_here = block if visual else -1
        else:
            block_here = -1
        label = int(batch["labels"][r, c]) if "labels" in batch and not visual else -100
        hidden = seen["inputs_embeds"][r, c]
        tokens.append(Token(hidden, position, next(units) if visual else None, block_here, label, c))
    assert next(units, None) is None, "the row holds fewer placeholders than stated"
    return tokens


def pool(tokens, point):
    """Averages the windows of every unit; a window takes the place of the unit's token at its share of the unit."""
    kept = [(place, token) for place, token in enumerate(tokens) if token.unit is None]
    for unit in sorted({token.unit for token in tokens} - {None}):
        members = [(place, token) for place, token in enumerate(tokens) if token.unit == unit]
        windows = windows_of(len(members), point) if len(members) > 1 else [[0]]
        for number, window in enumerate(windows):
            inside = [members[w][1] for w in window]
            axes = zip(*(token.position for token in inside), strict=True)
            mean = tuple(sum(axis) // len(inside) for axis in axes)
            pooled = replace(
                inside[0],
                hidden=sum(token.hidden for token in inside) / len(inside),
                position=inside[0].position if point.get("positions") == "first" else mean,
                size=sum(token.size for token in inside),
            )
            kept.append((members[number * len(members) // len(windows)][0], pooled))
    result = [token for _, token in sorted(kept, key=lambda pair: pair[0])]
    if point.get("positions") == "renumber":
        first = [min(axis) for axis in zip(*(token.position for token in result), strict=True)]
        result = [replace(token, position=tuple(f + n for f in first)) for n, token in enumerate(result)]
    return result


def mask_of(model_type, tokens, window, size_bias):
    """Additive mask, number by number."""
    count = len(tokens)
    mask = torch.full((1, 1, count, count), torch.finfo(torch.float32).min)
    for q, k in itertools.product(range(count), repeat=2):
        causal, near = k <= q, window is None or k > q - window
        same = tokens[q].block >= 0 and tokens[q].block == tokens[k].block
        sees = ((causal and near) or same) if model_type == "paligemma" else (near and (causal or same))
        if sees:
            mask[0, 0, q, k] = math.log(tokens[k].size) if size_bias else 0.0
    return mask


def run_row(model, tokens, points, deep=()):
    """One row through the decoder, layer by layer; `deep` are DeepStack's features of its visual tokens, per layer."""
    decoder, model_type = decoder_of(model), model.config.model_type
    config, size_bias = decoder.config, False
    kinds = getattr(config, "layer_types", None)
    for number, layer in enumerate(decoder.layers):
        for point in points:
            if point["layer"] == number:
                tokens = pool(tokens, point)
                size_bias = size_bias or point.get("size_bias", False)
        hidden = torch.stack([token.hidden for token in tokens]).unsqueeze(0)
        axes = torch.tensor([token.position for token in tokens]).T.unsqueeze(1)
        rotated = axes[0] if len(axes) == 1 else axes[-3:]
        if len(axes) == 1 and model_type.startswith("qwen"):
            rotated = axes.expand(3, -1, -1)
        kind = kinds[number] if kinds else "full_attention"
        arguments = (hidden, rotated, kind) if model_type == "gemma3" else (hidden, rotated)
        window = config.sliding_window if kind == "sliding_attention" else None
        out = layer(
            hidden,
            attention_mask=mask_of(model_type, tokens, window, size_bias),
            position_embeddings=decoder.rotary_emb(*arguments),
        )
        states = list((out[0] if isinstance(out, tuple) else out)[0])
        if number < len(deep):
            features = iter(deep[number])
            states = [s if t.unit is None else s + next(features) for s, t in zip(states, tokens, strict=True)]
        tokens = [replace(token, hidden=state) for token, state in zip(tokens, states, strict=True)]
    return tokens


def logits_of(model, tokens):
    """Logits of a row's last states."""
    decoder = decoder_of(model)
    logits = model.lm_head(decoder.norm(torch.stack([token.hidden for token in tokens])))
    cap = getattr(decoder.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def reference_rows(model, batch, points, units=None):
    """For each row its kept tokens and their logits.

    Args:
        model: A tiny model with eager attention.
        batch: Its batch.
        points: Average pooling, each with its layer.
        units: For each row the numbers of tokens of its images, tiles and frames, stated by hand; None = images of
            `TOKENS`.
    """
    seen = entering(model, batch)
    result, place = [], 0
    for r in range(len(batch["input_ids"])):
        tokens = row_tokens(model, batch, seen, r, None if units is None else units[r])
        count = sum(token.unit is not None for token in tokens)
        deep = [level[place : place + count] for level in seen.get("deepstack_visual_embeds") or ()]
        place += count
        tokens = run_row(model, tokens, points, deep)
        result.append((tokens, logits_of(model, tokens)))
    return result


def loss_of(rows, num_items=None):
    """Sum of the label tokens' cross-entropies over their number."""
    losses = []
    for tokens, logits in rows:
        for n in range(1, len(tokens)):
            if tokens[n].label != -100:
                losses.append(F.cross_entropy(logits[n - 1].float(), torch.tensor(tokens[n].label)))
    return sum(losses) / (num_items or len(losses))


def reference_loss(model, batch, points, num_items=None, units=None):
    """The loss of `reference_rows`."""
    return loss_of(reference_rows(model, batch, points, units), num_items)


def generate(model, batch, steps, **options):
    """Greedy steps with their logits; placeholders are never generated."""
    return model.generate(
        **{name: value for name, value in batch.items() if name != "labels"},
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        suppress_tokens=[IMAGE, VIDEO],
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def gradients(model, loss):
    """Gradients of all parameters by name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, tolerance=1e-5):
    """Every gradient equal to `tolerance` of the largest one."""
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3, "a test without gradients proves nothing"
    for name, wanted in expected.items():
        if name not in got:
            assert float(wanted.abs().max()) == 0, name
            continue
        assert float((got[name] - wanted).abs().max()) <= tolerance * max(1.0, scale), name


def decoder_facts(text: Any) -> ModelFacts:
    """What the planner would know of a tiny LLaVA with this text config; one vision layer of nine patches and a class
    token.
    """
    return ModelFacts(
        model_type="llava", num_layers=text.num_hidden_layers, hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size, num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads, head_dim=text.hidden_size // text.num_attention_heads,
        vocab_size=64, vision_layers=1, vision_hidden_size=32, vision_intermediate_size=64, vision_tokens=10,
        projector_in=32, projector_hidden=32, visual_grid=Grid(3, 3), has_cls=True, gated_mlp=True,
    )  # fmt: skip
