"""From what attention modules saw to what a method is told: query tokens, tables by column, and who is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orchestrator.compression.layout import ImageGroup, Layout
from orchestrator.compression.merging import tokens_at
from orchestrator.compression.protocol import IGNORED, Point
from orchestrator.compression.recorder import Recording, attention_module, not_recorded, recording_of
from orchestrator.compression.rotation import counted_from_zero
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from orchestrator.compression.segments import Flow


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
        """The same on another device."""
        moved = [part.to(device, non_blocking=True) for part in (self.queries_BQ, self.weights_BQ, self.text_BN)]
        return Prompt(*moved)


def prompt_of(visual_BN: Tensor, real_BN: Tensor, labels_BN: Tensor | None, limit: int | None = None) -> Prompt:
    """The query tokens and the prompt's text of a batch.

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
    nobody_B = ~asks_BN.any(1)
    asks_BN[nobody_B, last_B[nobody_B]] = True
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
        """The same for the tokens that are left; a token made of several has what its source had."""
        if layout is self.layout:
            return self
        rows, columns = self.origins_BN.shape
        # Padding writes to, and reads from, a column of its own.
        targets_BN = torch.where(self.origins_BN < 0, self.length, self.origins_BN)
        column_BN = torch.arange(columns, device=targets_BN.device).expand(rows, -1).contiguous()
        places_BC = targets_BN.new_zeros(rows, self.length + 1).scatter_(1, targets_BN, column_BN)
        index_BM = places_BC.gather(1, torch.where(origins_BM < 0, self.length, origins_BM))
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

    def told(self, point: Point, layout: Layout, origins_BN: Tensor, group: ImageGroup) -> dict[str, Any]:
        """The fields of `Context` that a point needs, for one group of images."""
        needs, device = set(point.spec.needs), origins_BN.device
        if not needs & {"queries", "keys", "cls", "text"}:
            return {}
        places, shape = group.places(layout.length).to(device), group.columns_IN.shape
        told: dict[str, Any] = {"columns_BN": group.columns_IN.to(device, non_blocking=True)}
        prompt_text_BN = self.prompt.text_BN.gather(1, origins_BN.clamp(min=0))
        told["text_RN"] = prompt_text_BN & (origins_BN >= 0)
        if self.layer is not None and needs & {"queries", "keys"}:
            seen = self.layer.at(layout, origins_BN)
            if "queries" in needs and seen.attention_BN is not None:
                told["attention_BN"] = seen.attention_BN.flatten()[places].unflatten(0, shape)
            if "keys" in needs:
                told["row_keys_RND"] = seen.keys_BND
        if self.cls is not None and "cls" in needs:
            seen = self.cls.at(layout, origins_BN)
            assert seen.attention_BN is not None and seen.keys_BND is not None
            told["cls_attention_BN"] = seen.attention_BN.flatten()[places].unflatten(0, shape)
            told["cls_keys_BND"] = seen.keys_BND.flatten(0, 1)[places].unflatten(0, shape)
        return told


def needs_of(points: Sequence[Point]) -> set[str]:
    """What any of the points needs."""
    return {need for point in points for need in point.spec.needs}


def check_point(layer: int | str, needs: Sequence[str], kind: str, cls_attention: Any) -> None:
    """Refuses a point whose needs nothing can answer at its place.

    Args:
        layer: Its decoder layer, or `projector`.
        needs: What its spec says it needs.
        kind: The method, for the message.
        cls_attention: `Family.cls_attention()`.

    Raises:
        UsageError: the point acts where no decoder layer has run, or the tower has no CLS token.
    """
    if {"queries", "keys"} & set(needs) and layer in (0, "projector"):
        raise UsageError(
            f"attach: {kind} at layer {layer}: it looks at what decoder layer K-1 saw, and none has run there; "
            "give it layer 1 or more"
        )
    if "cls" in needs and cls_attention is None:
        raise UsageError(
            f"attach: {kind} needs the attention of the vision tower's CLS token, and this model's tower has none "
            "that is used; use a method without this need"
        )


@contextmanager
def watched_layer(language_model: Any, number: int, points: Sequence[Point], flow: Flow) -> Iterator[None]:
    """While the decoder layer before some points runs, records what they need; nothing where they need nothing.

    Args:
        language_model: The decoder stack.
        number: The layer before the points.
        points: The points that act after it.
        flow: The rows as they enter; the record goes to `flow.records`.

    Raises:
        UsageError: the layer's attention cannot be recorded.
    """
    needs, records, layout = needs_of(points), flow.records, flow.layout
    if records is None or layout is None or not needs & {"queries", "keys"}:
        yield
        return
    what = f"compression: {' and '.join(sorted({p.spec.kind for p in points}))} at layer {points[0].layer}"
    attention = attention_module(language_model.layers[number], what)
    recording = Recording(wants_keys="keys" in needs)
    if "queries" in needs:
        recording.queries_BQ = places_of(records.prompt.queries_BQ, flow.origins_BN)
        recording.weights_BQ = records.prompt.weights_BQ
    with recording_of(attention, recording, what):
        yield
    if not (recording.attentions or recording.keys):
        raise not_recorded(attention, what)
    columns = layout.length  # cached keys of turns before stand first
    keys_BND = None
    if recording.keys:
        keys_BhND = recording.keys[-1]
        if keys_BhND.shape[2] == columns and len(flow.positions_ABN) == 1:
            real_BN = layout.real_BN.to(keys_BhND.device)
            firsts_B = flow.positions_ABN[0].masked_fill(~real_BN, torch.iinfo(torch.long).max).amin(1)
            firsts_B = torch.where(real_BN.any(1), firsts_B, 0)
            keys_BhND = counted_from_zero(keys_BhND, firsts_B, language_model, number, attention)
        keys_BND = keys_BhND[:, :, -columns:].transpose(1, 2).flatten(2)
    attention_BN = recording.attentions[-1][:, -columns:] if recording.attentions else None
    records.layer = Seen(layout, flow.origins_BN, records.prompt.text_BN.shape[1], attention_BN, keys_BND)


def places_of(queries_BQ: Tensor, origins_BN: Tensor) -> Tensor:
    """Present columns of tokens given by original column; of one that was dropped, of the last token before it."""
    columns = origins_BN.shape[1]
    column_N = torch.arange(columns, device=origins_BN.device)
    before_BQN = (origins_BN.unsqueeze(1) <= queries_BQ.unsqueeze(2)) & (origins_BN >= 0).unsqueeze(1)
    rank_BN = origins_BN * columns + column_N
    return rank_BN.unsqueeze(1).masked_fill(~before_BQN, -1).argmax(2)
