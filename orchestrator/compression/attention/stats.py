"""Attention statistics: query tokens, what was recorded by column, and the fields of `Context` made of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.layout import ImageGroup, Layout
from orchestrator.compression.ops import tokens_at
from orchestrator.compression.protocol import IGNORED, Point
from orchestrator.errors import UsageError


def counted_from_zero(
    keys_BhND: Tensor, firsts_B: Tensor, language_model: Any, layer: int, attention: nn.Module
) -> Tensor:
    """Rotated keys turned back by their row's first position id.

    Attention knows only distances, but a norm of a rotated key's coordinates (DART) is another at another position: a
    row padded on the left, whose ids count the padding, would choose other pivots than the same row alone. Models with
    several position axes (M-RoPE) number their rows from 0 themselves; models without rotary embedding need nothing.

    Args:
        keys_BhND: Rotated keys in float32.
        firsts_B: Position id of each row's first token.
        language_model: The decoder stack; its `rotary_emb` says how positions turn keys.
        layer: Number of the keys' layer.
        attention: The attention module the keys are from.
    """
    rotary = getattr(language_model, "rotary_emb", None)
    parameters = getattr(language_model.config, "rope_parameters", None) or {}
    if rotary is None or "mrope_section" in parameters or not _rotates(attention):
        return keys_BhND
    kinds = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds["layer_type"] = language_model.config.layer_types[layer]
    with torch.no_grad(), torch.autocast(keys_BhND.device.type, enabled=False):
        back_B1 = -firsts_B.unsqueeze(1)
        # Past the module's hooks, by which ZeRO-3 counts calls; it holds no parameters.
        angles = rotary.forward(keys_BhND, back_B1, **kinds)
        scale = rotary.forward(keys_BhND, torch.zeros_like(back_B1), **kinds)  # YaRN lengthens
        if isinstance(angles, Tensor):  # complex
            return turning(attention)(keys_BhND, angles / scale)
        return turning(attention)(keys_BhND, (angles[0] / scale[0], angles[1] / scale[0]))


# Models that rotate keys in some of their layers alone, by the file of their attention: where they do not.
_UNROTATED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("modeling_cohere2", "modeling_flint"), lambda attention: attention.sliding_window is None),
    "modeling_cohere2_moe": lambda attention: attention.sliding_window is None and not attention.force_rope,
    "modeling_afmoe": lambda attention: not attention.is_local_attention,
    **dict.fromkeys(
        ("modeling_exaone4", "modeling_exaone4_5", "modeling_exaone_moe", "modeling_kolibri1"),
        lambda attention: attention.sliding_window is not None and not attention.is_sliding,
    ),
}
_BY_LAYERS = ("granite_swa", "granitemoe_swa", "granitemoehybrid", "olmo_hybrid", "muse_glimmer", "muse_spark")
"""Models whose decoder, not their attention, knows which layers rotate."""


def _rotates(attention: Any) -> bool:
    """Return whether a layer rotates its keys; some models do so in some of their layers alone."""
    unrotated = _UNROTATED.get(_file_of(attention))
    return not unrotated(attention) if unrotated is not None else bool(getattr(attention, "use_rope", True))


def _file_of(attention: Any) -> str:
    return type(attention).__module__.rpartition(".")[2]


def turning(attention: nn.Module) -> Callable[[Tensor, Any], Tensor]:
    """Return how the file of an attention module turns keys (B x heads x N x size) by what its rotary embedding gives.

    Raises:
        UsageError: it has no function of a known form.
    """
    file = sys.modules[type(attention).__module__]
    real, complex_ = (getattr(file, name, None) for name in ("apply_rotary_pos_emb", "apply_rotary_emb"))
    if _file_of(attention).removeprefix("modeling_") in _BY_LAYERS:
        real = complex_ = None
    if real is not None:
        names = list(inspect.signature(real).parameters)
        if names[:4] == ["q", "k", "cos", "sin"]:
            return lambda keys, angles: real(keys, keys, *angles)[1]
        if {*names[1:3]} == {"cos", "sin"}:
            return lambda keys, angles: real(keys, cos=angles[0], sin=angles[1])
    elif complex_ is not None and "freqs_cis" in inspect.signature(complex_).parameters:
        return lambda keys, angles: complex_(keys.transpose(1, 2), keys.transpose(1, 2), angles)[1].transpose(1, 2)
    raise UsageError(
        f"compression: how {type(attention).__name__} rotates its keys is not known (its file has no "
        "apply_rotary_pos_emb of q, k, cos, sin), so they cannot be counted from a row's first token; "
        "use a method that needs no keys"
    )


@dataclass(frozen=True)
class Prompt:
    """Where a batch asks: by original columns, so that it holds in every segment.

    Attributes:
        queries_BQ: Original columns of each row's query tokens; a row with fewer repeats its first.
        weights_BQ: One over the row's number of query tokens; 0 at repeats.
        text_BN: True at the text a method may look at: the prompt's, no answer's.
    """

    queries_BQ: Tensor
    weights_BQ: Tensor
    text_BN: Tensor

    def to(self, device: torch.device) -> Prompt:
        """Move all fields to another device."""
        moved = [part.to(device, non_blocking=True) for part in (self.queries_BQ, self.weights_BQ, self.text_BN)]
        return Prompt(*moved)


def prompt_of(visual_BN: Tensor, real_BN: Tensor, labels_BN: Tensor | None, limit: int | None = None) -> Prompt:
    """Return the query tokens and the prompt's text of a batch.

    With labels a row asks with the tokens before its answers: those without a label whose next token has one (the
    published training of PyramidDrop, arXiv:2410.17247 section 3.2, averages over them too). Without labels, or where
    none is set, it asks with its last token; while `generate` adds tokens, with the prompt's last.

    Args:
        visual_BN: True at visual tokens.
        real_BN: True where there is no padding.
        labels_BN: Labels, -100 where there is none.
        limit: Columns of the prompt, where the row may have grown since; None = all.
    """
    columns = real_BN.shape[1]
    column_N = torch.arange(columns)
    prompt_BN = real_BN if limit is None else real_BN & (column_N < limit)
    # A row that begins after the prompt's end does not exist; should it, all of it counts.
    prompt_BN = torch.where(prompt_BN.any(1, keepdim=True), prompt_BN, real_BN)
    last_B = (prompt_BN * (column_N + 1)).amax(1).sub(1).clamp(min=0)
    asks_BN = torch.zeros_like(real_BN)
    labelled_BN = torch.zeros_like(real_BN)
    if labels_BN is not None:
        labelled_BN = (labels_BN != IGNORED) & real_BN
        asks_BN[:, :-1] = real_BN[:, :-1] & ~labelled_BN[:, :-1] & labelled_BN[:, 1:]
    unasked_B = ~asks_BN.any(1)
    asks_BN[unasked_B, last_B[unasked_B]] = True
    counts_B = asks_BN.sum(1)
    most = int(counts_B.max())
    queries_BQ = torch.where(asks_BN, column_N, columns).sort(1).values[:, :most]
    first_BQ = queries_BQ[:, :1].expand_as(queries_BQ)
    weights_BQ = (queries_BQ < columns) / counts_B.unsqueeze(1)
    return Prompt(
        torch.where(queries_BQ < columns, queries_BQ, first_BQ), weights_BQ, prompt_BN & ~visual_BN & ~labelled_BN
    )


@dataclass(frozen=True)
class Seen:
    """What was recorded, a column for each token of the rows as they were then.

    Attributes:
        layout: The rows as they were then.
        origins_BN: Original column of each; -1 at padding.
        length: Original columns.
        attention_BN: Attention paid to it, or None.
        keys_BND: Its key, or None.
    """

    layout: Layout
    origins_BN: Tensor
    length: int
    attention_BN: Tensor | None = None
    keys_BND: Tensor | None = None

    def at(self, layout: Layout, origins_BM: Tensor) -> Seen:
        """Select the tokens that are left; a token made of several has the values of its source."""
        if layout is self.layout:
            return self
        # What padding reads is of no interest.
        index_BM = present_columns(self.origins_BN, self.length).gather(1, origins_BM.clamp(min=0)).clamp(min=0)
        attention, keys = self.attention_BN, self.keys_BND
        return Seen(
            layout,
            origins_BM,
            self.length,
            None if attention is None else attention.gather(1, index_BM),
            None if keys is None else tokens_at(keys, index_BM),
        )


@dataclass
class Records:
    """What is known beside the hidden states, for the points of one forward that need it.

    Attributes:
        prompt: Where the rows ask, on the device.
        layer: What the layer before the coming points saw.
        cls: What the vision tower's CLS token saw.
    """

    prompt: Prompt
    layer: Seen | None = None
    cls: Seen | None = None

    def context_fields(self, point: Point, layout: Layout, origins_BN: Tensor, group: ImageGroup) -> dict[str, Any]:
        """Return the fields of `Context` that a point needs, for one group of images."""
        needs, device = set(point.spec.needs), origins_BN.device
        if not needs & {"queries", "keys", "cls", "text"}:
            return {}
        places, shape = group.places(layout.length).to(device), group.columns_IN.shape
        fields: dict[str, Any] = {"columns_BN": group.columns_IN.to(device, non_blocking=True)}
        prompt_text_BN = self.prompt.text_BN.gather(1, origins_BN.clamp(min=0))
        fields["text_RN"] = prompt_text_BN & (origins_BN >= 0)
        if self.layer is not None and needs & {"queries", "keys"}:
            seen = self.layer.at(layout, origins_BN)
            if "queries" in needs and seen.attention_BN is not None:
                fields["attention_BN"] = seen.attention_BN.flatten()[places].unflatten(0, shape)
            if "keys" in needs:
                fields["row_keys_RND"] = seen.keys_BND
        if self.cls is not None and "cls" in needs:
            seen = self.cls.at(layout, origins_BN)
            assert seen.attention_BN is not None and seen.keys_BND is not None
            fields["cls_attention_BN"] = seen.attention_BN.flatten()[places].unflatten(0, shape)
            fields["cls_keys_BND"] = seen.keys_BND.flatten(0, 1)[places].unflatten(0, shape)
        return fields


def present_columns(origins_BN: Tensor, length: int) -> Tensor:
    """Return the present column of each of `length` original ones, B x length; -1 where it was dropped.

    Args:
        origins_BN: Original column of each present token; -1 at padding and for added tokens.
        length: Original columns.
    """
    rows, columns = origins_BN.shape
    columns_BC = origins_BN.new_full((rows, length + 1), -1)
    targets_BN = torch.where(origins_BN < 0, length, origins_BN)  # padding writes to a column that is cut off
    columns_BC.scatter_(1, targets_BN, torch.arange(columns, device=origins_BN.device).expand(rows, -1).contiguous())
    return columns_BC[:, :length]


def needs_of(points: Sequence[Point]) -> set[str]:
    """Return the needs of all points together."""
    return {need for point in points for need in point.spec.needs}
