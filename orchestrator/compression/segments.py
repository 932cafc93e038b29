"""The decoder in segments: its own forward over consecutive slices of its layers, images getting shorter in between.

The model itself builds mask and rotary embedding for every slice and attention implementation; a slice gets its own
position ids and always an explicit padding mask, since without one transformers 5 reads a gap in position ids as the
boundary of packed sequences and cuts image from text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from orchestrator.compression.caches import SegmentCache
from orchestrator.compression.layout import ImageGroup, Layout, shorten
from orchestrator.compression.protocol import Context, Kept, Point
from orchestrator.errors import UsageError


@dataclass(frozen=True)
class Segment:
    """Decoder layers `first` to `last` (half open) and the points that act before `first`."""

    first: int
    last: int
    points: tuple[Point, ...]


def segments_of(points: Sequence[Point], num_layers: int) -> list[Segment]:
    """Cuts the depth at every point; points at one layer act in their order."""
    starts = sorted({0, *(point.layer for point in points)})
    ends = [*starts[1:], num_layers]
    return [
        Segment(first, last, tuple(point for point in points if point.layer == first))
        for first, last in zip(starts, ends, strict=True)
    ]


@dataclass
class Flow:
    """What travels from segment to segment.

    Attributes:
        hidden_BND: Hidden states.
        meta_CBN: Per token: its A position ids, the number of first tokens it stands for, its original column.
        layout: Where text and images are; None where the forward brings no image.
        labels_BN: Labels on the host, or None.
    """

    hidden_BND: Tensor
    meta_CBN: Tensor
    layout: Layout | None
    labels_BN: Tensor | None

    @property
    def positions_ABN(self) -> Tensor:
        """Position ids."""
        return self.meta_CBN[:-2]

    @property
    def origins_BN(self) -> Tensor:
        """Original columns; -1 at padding."""
        return self.meta_CBN[-1]


@dataclass(frozen=True)
class Draw:
    """What random methods draw from."""

    seed: int = 0
    step: int = 0
    sample_indices: tuple[int, ...] = ()


def compress(flow: Flow, point: Point, draw: Draw, module: nn.Module | None) -> tuple[Flow, bool]:
    """One point: every group of images of one grid goes through the method as a batch, then rows are put together.

    Returns:
        The flow after it, and whether position ids are to be numbered again.
    """
    assert flow.layout is not None
    layout, device = flow.layout, flow.hidden_BND.device
    columns, width = layout.length, flow.hidden_BND.shape[-1]
    flat_hidden, flat_meta = flow.hidden_BND.reshape(-1, width), flow.meta_CBN.flatten(1)
    kept, kept_meta = [], []
    for group in layout.groups:
        places = group.places(columns).to(device, non_blocking=True)
        shape = group.columns_IN.shape
        meta_CIN = flat_meta.index_select(1, places).unflatten(1, shape)
        context = _context(flow, point, draw, module, group, meta_CIN)
        visual_BND = flat_hidden.index_select(0, places).unflatten(0, shape)
        one = _call(point, visual_BND, group.grid, context)
        kept.append(one)
        kept_meta.append(_meta_of(one, meta_CIN))
    after, moves = shorten(layout, [one.hidden_BMD.shape[1] for one in kept], [one.grid for one in kept])
    moves_device = moves.to(device)
    rows = layout.real_BN.shape[0]
    hidden = flow.hidden_BND.new_zeros(rows * after.length, width)
    hidden.index_copy_(0, moves_device.text_to, flat_hidden.index_select(0, moves_device.text_from))
    meta = flow.meta_CBN.new_zeros(len(flow.meta_CBN), rows * after.length)
    meta[-1] = -1
    meta[:, moves_device.text_to] = flat_meta[:, moves_device.text_from]
    for one, one_meta, to in zip(kept, kept_meta, moves_device.kept_to, strict=True):
        hidden.index_copy_(0, to, one.hidden_BMD.reshape(-1, width).to(hidden.dtype))
        meta[:, to] = one_meta
    labels = None
    if flow.labels_BN is not None:
        labels = flow.labels_BN.new_full((rows * after.length,), -100)
        labels[moves.text_to] = flow.labels_BN.flatten()[moves.text_from]
        labels = labels.unflatten(0, (rows, after.length))
    flow = Flow(hidden.unflatten(0, (rows, -1)), meta.unflatten(1, (rows, -1)), after, labels)
    return flow, any(one.renumber for one in kept)


def _context(
    flow: Flow, point: Point, draw: Draw, module: nn.Module | None, group: ImageGroup, meta_CIN: Tensor
) -> Context:
    samples = tuple(draw.sample_indices[row] for row in group.rows_I.tolist()) if draw.sample_indices else ()
    return Context(
        layer=point.layer,
        positions_ABN=meta_CIN[:-2],
        sizes_BN=meta_CIN[-2],
        rows_B=group.rows_I,
        seed=draw.seed,
        step=draw.step,
        sample_indices=samples,
        hidden_RND=flow.hidden_BND,
        module=module,
    )


def _call(point: Point, visual_BND: Tensor, grid: Any, context: Context) -> Kept:
    try:
        kept = point.compressor.compress(visual_BND, grid, context)
    except ValueError as error:
        raise UsageError(f"compression: {point.spec.kind} at layer {point.layer}: {error}") from error
    if not 0 < kept.hidden_BMD.shape[1] <= visual_BND.shape[1]:
        raise UsageError(
            f"compression: {point.spec.kind} at layer {point.layer} returned {kept.hidden_BMD.shape[1]} tokens of "
            f"{visual_BND.shape[1]}; a method keeps at least one and at most all"
        )
    return kept


def _meta_of(kept: Kept, meta_CIN: Tensor) -> Tensor:
    """Positions, sizes and original columns of the kept tokens, flat: C x (I * M)."""
    images, tokens = meta_CIN.shape[1:]
    count = kept.hidden_BMD.shape[1]
    sources_IM = kept.sources_BM
    if sources_IM is None:
        sources_IM = (torch.arange(count, device=meta_CIN.device) * tokens // count).expand(images, -1)
    origins_IM = meta_CIN[-1].gather(1, sources_IM)
    return torch.cat([kept.positions_ABM, kept.sizes_BM.unsqueeze(0), origins_IM.unsqueeze(0)]).flatten(1)


def renumber(flow: Flow) -> None:
    """Position ids of every row without gaps, counted from the row's first."""
    assert flow.layout is not None
    real_BN = flow.layout.real_BN.to(flow.hidden_BND.device)
    rank_BN = real_BN.long().cumsum(1) - 1
    first_ABN = flow.positions_ABN.masked_fill(~real_BN, torch.iinfo(torch.long).max).amin(2, keepdim=True)
    flow.meta_CBN[:-2] = torch.where(real_BN, first_ABN + rank_BN, 0)


def run_layers(
    language_model: Any,
    segment: Segment,
    hidden_BND: Tensor,
    positions: Tensor,
    mask_BN: Tensor,
    cache: Any,
    options: dict[str, Any],
) -> Any:
    """The language model's own forward over the layers of one segment.

    It runs on a shallow view of the model (same parameters and submodules, other lists of them), so the model itself
    is never changed, not even when something fails.

    Args:
        language_model: The decoder stack.
        segment: Its layers to run; the final norm belongs to the last segment.
        hidden_BND: Input of the first layer.
        positions: Position ids, B x N or axes x B x N.
        mask_BN: True where a token is, cached ones first.
        cache: The whole KV cache, or None.
        options: Further keyword arguments of the model's forward.
    """
    num_layers = len(language_model.layers)
    if any(options.get(f"output_{name}") for name in ("hidden_states", "attentions")):
        maybe_install_capturing_hooks(language_model)  # once, on the model: on a view they would pile up
    view: Any = object.__new__(type(language_model))
    view.__dict__.update(language_model.__dict__)
    modules = dict(language_model._modules)
    modules["layers"] = language_model.layers[segment.first : segment.last]
    if segment.last != num_layers:
        modules["norm"] = nn.Identity()
    if segment.first > 0:
        # Called past its hooks: ZeRO-3 gathers by the order of hooked calls, which must be one and the same for every
        # rank (one without images runs no segments) and every stage. It holds no parameters.
        modules["rotary_emb"] = language_model.rotary_emb.forward
    view.__dict__["_modules"] = modules
    view.__dict__["config"] = _shifted_config(language_model.config, segment)
    if "flash" in str(view.config._attn_implementation) and len(hidden_BND) == 1:
        options = options | _one_sequence(hidden_BND, mask_BN)
    return type(language_model).forward(
        view,
        inputs_embeds=hidden_BND,
        attention_mask=mask_BN,
        position_ids=positions,
        past_key_values=SegmentCache(cache, segment.first, segment.last) if cache is not None else None,
        **options,
    )


def _shifted_config(config: Any, segment: Segment) -> Any:
    """The config with per-layer lists that begin at the segment's first layer."""
    layer_types = getattr(config, "layer_types", None)
    if segment.first == 0 or not layer_types:
        return config
    shifted = copy.copy(config)
    shifted.layer_types = [*layer_types[segment.first :], *layer_types[: segment.first]]
    return shifted


def _one_sequence(hidden_BND: Tensor, mask_BN: Tensor) -> dict[str, Any]:
    """Says to flash attention that a single row is one sequence; else it reads gaps in position ids as boundaries."""
    queries, keys = hidden_BND.shape[1], mask_BN.shape[1]
    bounds = torch.tensor([[0, queries], [0, keys]], dtype=torch.int32).to(hidden_BND.device, non_blocking=True)
    return {"cu_seq_lens_q": bounds[0], "cu_seq_lens_k": bounds[1], "max_length_q": queries, "max_length_k": keys}
