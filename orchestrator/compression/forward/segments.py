"""The decoder in segments: its own forward over consecutive slices of its layers, images getting shorter in between.

The model itself builds mask and rotary embedding for every slice and attention implementation; a slice gets its own
position ids and always an explicit padding mask, since without one transformers 5 reads a gap in position ids as the
boundary of packed sequences and cuts image from text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from orchestrator.compression.attention.stats import Records
from orchestrator.compression.forward.apply_point import apply_point, by_count
from orchestrator.compression.forward.queries import Queries, for_queries, holding, runs_for_queries, view_of
from orchestrator.compression.layout import ImageGroup, Layout, join_frames, rearrange, split_frames
from orchestrator.compression.protocol import IGNORED, Context, Kept, Point
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid


@dataclass(frozen=True)
class Segment:
    """Decoder layers `first` to `last` (half open) and the points that act before `first`.

    Attributes:
        first: Its first layer.
        last: The layer after its last.
        points: The points.
        text_only: Visual tokens wait outside of it until the next segment.
    """

    first: int
    last: int
    points: tuple[Point, ...]
    text_only: bool = False


def segments_of(points: Sequence[Point], num_layers: int) -> list[Segment]:
    """Cut the depth at every point; points at one layer act in their order, then new tokens enter at layer 0."""
    inside = [point for point in points if not point.before_decoder]
    entering = [replace(point, layer=0, enters=True) for point in inside if hasattr(point.compressor, "enter")]
    acting = [point for point in inside if hasattr(point.compressor, "compress")]
    starts = sorted({0, *(point.layer for point in acting)})
    ends = [*starts[1:], num_layers]
    late = any(point.spec.enters_late and point.layer > 0 for point in acting)
    return [
        Segment(first, last, tuple(p for p in [*acting, *entering] if p.layer == first), late and first == 0)
        for first, last in zip(starts, ends, strict=True)
    ]


OTHER_META = 3  # rows of Flow.meta_CBN that are no position ids


@dataclass
class Flow:
    """What travels from segment to segment.

    Attributes:
        hidden_BND: Hidden states.
        meta_CBN: Per token: its A position ids, its block, the number of first tokens it stands for, its original
            column. Real numbers where position ids are (Qwen3-Omni), else integers.
        layout: Where text and images are; None where the forward brings no image.
        labels_BN: Labels on the host, or None.
        blocked: Tokens of one non-negative block see one another both ways.
        size_bias: Attention logits of a key are raised by the logarithm of its size.
        records: What attention saw, for points that need it; None where none does.
        layers_give_tuples: The decoder's layers return tuples that begin with hidden states, as far as is known yet.
        held_BN: True at tokens that are keys and values alone from here on (`keys_only`), on the host; None where
            there is none.
        input_changed: What reached layer 0 was not what the decoder's forward was given (it scales it, for instance).
        waiting: In segments of text alone the rows as they came, visual tokens included.
    """

    hidden_BND: Tensor
    meta_CBN: Tensor
    layout: Layout | None
    labels_BN: Tensor | None
    blocked: bool = False
    size_bias: bool = False
    records: Records | None = None
    layers_give_tuples: bool = False
    held_BN: Tensor | None = None
    input_changed: bool = False
    waiting: Flow | None = None

    @property
    def positions_ABN(self) -> Tensor:
        """Position ids."""
        return self.meta_CBN[:-OTHER_META]

    @property
    def blocks_BN(self) -> Tensor:
        """Blocks; -1 for a token that sees what is before it only."""
        return self.meta_CBN[-3].long()

    @property
    def sizes_BN(self) -> Tensor:
        """How many first tokens each token stands for."""
        return self.meta_CBN[-2].long()

    @property
    def origins_BN(self) -> Tensor:
        """Original columns; -1 at padding."""
        return self.meta_CBN[-1].long()


@dataclass(frozen=True)
class Draw:
    """What random methods draw from; with `fill` adaptive methods leave the most they may (see `apply_point`)."""

    seed: int = 0
    step: int = 0
    sample_indices: tuple[int, ...] = ()
    fill: bool = False

    def context_fields(self, rows_B: Tensor) -> dict[str, Any]:
        """Return the fields of `Context` for images of these rows."""
        samples = tuple(self.sample_indices[row] for row in rows_B.tolist()) if self.sample_indices else ()
        return {"rows_B": rows_B, "seed": self.seed, "step": self.step, "sample_indices": samples}


def compress(flow: Flow, point: Point, draw: Draw, module: nn.Module | None) -> tuple[Flow, bool]:
    """Apply one point: every group of images of one grid goes through the method as a batch, then rows are rejoined.

    Returns:
        The flow after it, and whether position ids are to be numbered again.
    """
    assert flow.layout is not None
    if point.spec.across_frames:
        flow = replace(flow, layout=join_frames(flow.layout))
    assert flow.layout is not None
    groups, metas = [], []
    for group in flow.layout.groups:
        visual_BND, meta_CIN = visuals_of(flow, group)
        groups.append((visual_BND, group.grid, _context(flow, point, draw, group, meta_CIN)))
        metas.append(meta_CIN)
    kept = apply_point(point, groups, module, draw.fill)
    before = flow
    flow = hold(flow, kept, metas, point) if point.spec.keys_only else rejoin(flow, kept, metas)
    if point.spec.keeps_none:
        check_text(before, flow, point)
    if point.spec.across_frames and flow.layout is not None:
        flow = replace(flow, layout=split_frames(flow.layout))
    # Where no token leaves the row its numbers have no gaps.
    return flow, not point.spec.keys_only and any(one.renumber for one in kept)


def set_aside(flow: Flow, point: Point) -> Flow:
    """Return the rows' text alone; the rows as they are wait until layer `point.layer` (`let_in`)."""
    assert flow.layout is not None
    kept, metas = [], []
    for group in flow.layout.groups:
        visual_BND, meta_CIN = visuals_of(flow, group)
        ids_AB0, sizes_B0 = meta_CIN[:-OTHER_META, :, :0], meta_CIN[-2, :, :0]
        kept.append(Kept(visual_BND[:, :0], ids_AB0, sizes_B0, sizes_B0.long(), Grid(1, 0)))
        metas.append(meta_CIN)
    text = replace(rejoin(flow, kept, metas), waiting=flow)
    _check_length(text, point)
    return text


def let_in(flow: Flow, entered_BND: Tensor) -> Flow:
    """Return the rows with the visual tokens that wait, where they stood, between the text as it is now.

    Args:
        flow: The text alone.
        entered_BND: The rows that wait as they would have entered layer 0.
    """
    whole = flow.waiting
    assert flow.layout is not None and whole is not None and whole.layout is not None
    device, hidden_BND = flow.hidden_BND.device, flow.hidden_BND
    # Row by row the text stands in one order in both.
    present, places = (
        mask_BN.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        for mask_BN in (flow.layout.text_BN, whole.layout.text_BN)
    )
    text_LD = hidden_BND.flatten(0, 1).index_select(0, present)
    hidden = entered_BND.to(hidden_BND.dtype).flatten(0, 1).index_copy(0, places, text_LD)
    hidden_BND = hidden.unflatten(0, entered_BND.shape[:2])
    return replace(whole, hidden_BND=hidden_BND, layers_give_tuples=flow.layers_give_tuples)


def check_text(before: Flow, after: Flow, point: Point) -> None:
    """Refuse a batch whose answers cannot be predicted once its images are gone.

    Raises:
        UsageError: nothing is left, or a token with a label is now the first of its row.
    """
    _check_length(after, point)
    if _predicted(before) != _predicted(after):
        raise UsageError(
            f"compression: {point.spec.kind} at {point.place}: a row begins with an image, and the token after it has "
            "a label, which nothing would predict; let rows begin with text (a BOS token), or label it -100"
        )


def _check_length(text: Flow, point: Point) -> None:
    assert text.layout is not None
    if not text.layout.length:
        raise UsageError(
            f"compression: {point.spec.kind} at {point.place}: the rows hold images alone, and some layers see text "
            "only; give every prompt or turn text"
        )


def _predicted(flow: Flow) -> int:
    """Return the number of tokens with a label that another one stands before."""
    if flow.labels_BN is None or flow.layout is None:
        return 0
    real_BN = flow.layout.real_BN
    return int(((flow.labels_BN != IGNORED) & real_BN & (real_BN.cumsum(1) > 1)).sum())


def visuals_of(flow: Flow, group: ImageGroup) -> tuple[Tensor, Tensor]:
    """Return the visual tokens of a group, I x N x D, and what is known of them, C x I x N."""
    assert flow.layout is not None
    places = group.places(flow.layout.length).to(flow.hidden_BND.device, non_blocking=True)
    shape = group.columns_IN.shape
    flat_hidden, flat_meta = flow.hidden_BND.flatten(0, 1), flow.meta_CBN.flatten(1)
    return flat_hidden.index_select(0, places).unflatten(0, shape), flat_meta.index_select(1, places).unflatten(
        1, shape
    )


def rejoin(flow: Flow, kept: Sequence[Kept], metas: Sequence[Tensor]) -> Flow:
    """Return rows with what is left of each group in the place of its visual tokens (`metas`: C x I x N of each)."""
    assert flow.layout is not None
    device, width = flow.hidden_BND.device, flow.hidden_BND.shape[-1]
    flat_hidden, flat_meta = flow.hidden_BND.reshape(-1, width), flow.meta_CBN.flatten(1)
    parts = [
        (images, left, meta_CIN[:, number_I])
        for group, one, meta_CIN in zip(flow.layout.groups, kept, metas, strict=True)
        for images, left, number_I in by_count(group, one)
    ]
    images, kept, metas = zip(*parts, strict=True)
    grids = [one.grid for one in kept if one.grid is not None]  # all of them: `apply_point` fills them in
    after, moves = rearrange(
        replace(flow.layout, groups=images),
        [one.hidden_BMD.shape[1] for one in kept],
        grids,
        [one.before for one in kept],
        [one.sources_BM.cpu() if one.in_place and one.sources_BM is not None else None for one in kept],
    )
    moves_device = moves.to(device)
    rows = flow.layout.real_BN.shape[0]
    hidden = flow.hidden_BND.new_zeros(rows * after.length, width)
    hidden.index_copy_(0, moves_device.text_to, flat_hidden.index_select(0, moves_device.text_from))
    meta = flow.meta_CBN.new_zeros(len(flow.meta_CBN), rows * after.length)
    meta[-3], meta[-1] = -1, -1
    meta[:, moves_device.text_to] = flat_meta[:, moves_device.text_from]
    for one, meta_CIN, to in zip(kept, metas, moves_device.kept_to, strict=True):
        hidden.index_copy_(0, to, one.hidden_BMD.reshape(-1, width).to(hidden.dtype))
        meta[:, to] = _meta_of(one, meta_CIN)
    if moves_device.added is not None:
        meta[:-OTHER_META] += moves_device.added

    def moved(values_BN: Tensor | None, elsewhere: Any) -> Tensor | None:
        if values_BN is None:
            return None
        values = values_BN.new_full((rows * after.length,), elsewhere)
        values[moves.text_to] = values_BN.flatten()[moves.text_from]
        return values.unflatten(0, (rows, after.length))

    return replace(
        flow,
        hidden_BND=hidden.unflatten(0, (rows, -1)),
        meta_CBN=meta.unflatten(1, (rows, -1)),
        layout=after,
        labels_BN=moved(flow.labels_BN, IGNORED),
        held_BN=moved(flow.held_BN, False),
        size_bias=flow.size_bias or any(one.size_bias for one in kept),
    )


def hold(flow: Flow, kept: Sequence[Kept], metas: Sequence[Tensor], point: Point) -> Flow:
    """Return the rows with what is left of each group where its sources stood, all others staying as keys and values.

    What stays so has no original column any more, like a dropped token; it is no visual token of the layout.

    Raises:
        UsageError: the method's tokens do not stand in the place of one token each, or it weighs them.
    """
    assert flow.layout is not None
    layout, device, width = flow.layout, flow.hidden_BND.device, flow.hidden_BND.shape[-1]
    held = torch.zeros(layout.real_BN.numel(), dtype=torch.bool) if flow.held_BN is None else flow.held_BN.flatten()
    hidden, meta, groups = flow.hidden_BND.reshape(-1, width), flow.meta_CBN.flatten(1).clone(), []
    for group, one, meta_CIN in zip(layout.groups, kept, metas, strict=True):
        assert one.sources_BM is not None and one.grid is not None  # `apply_point` fills them in
        sources_IM = one.sources_BM.cpu()
        several = bool((sources_IM.sort(1).values.diff(dim=1) <= 0).any())
        if several or bool((sources_IM < 0).any()) or one.size_bias or flow.size_bias:
            raise UsageError(
                f"compression: {point.spec.kind} at {point.place}: with keys_only each token stands where one token "
                "stood (`sources_BM` without repeats or -1), and weighs as one"
            )
        after = replace(group, grid=one.grid, columns_IN=group.columns_IN.gather(1, sources_IM))
        held = held.index_fill(0, group.places(layout.length), True).index_fill(0, after.places(layout.length), False)
        to = after.places(layout.length).to(device, non_blocking=True)
        hidden = hidden.index_copy(0, to, one.hidden_BMD.reshape(-1, width).to(hidden.dtype))
        meta[:, to] = _meta_of(one, meta_CIN)
        groups.append(after)
    held_BN = held.view_as(layout.real_BN)
    meta[-1].masked_fill_(held.to(device, non_blocking=True), -1)
    return replace(
        flow,
        hidden_BND=hidden.view_as(flow.hidden_BND),
        meta_CBN=meta.view_as(flow.meta_CBN),
        layout=replace(layout, groups=tuple(groups)),
        held_BN=held_BN if bool(held_BN.any()) else None,
    )


def _context(flow: Flow, point: Point, draw: Draw, group: ImageGroup, meta_CIN: Tensor) -> Context:
    fields = draw.context_fields(group.rows_I)
    if flow.records and flow.layout:
        fields |= flow.records.context_fields(point, flow.layout, flow.origins_BN, group)
    return Context(
        layer=point.layer,
        positions_ABN=meta_CIN[:-OTHER_META],
        sizes_BN=meta_CIN[-2].long(),
        hidden_RND=flow.hidden_BND,
        **fields,
    )


def _meta_of(kept: Kept, meta_CIN: Tensor) -> Tensor:
    """Return the positions, blocks, sizes and original columns of the kept tokens, flat: C x (I * M)."""
    sources_IM = kept.sources_BM
    assert sources_IM is not None  # `apply_point` fills them in
    blocks_IM, origins_IM = (
        meta_CIN[row].gather(1, sources_IM.clamp(min=0)).masked_fill(sources_IM < 0, -1).unsqueeze(0)
        for row in (-3, -1)
    )
    return torch.cat([kept.positions_ABM, blocks_IM, kept.sizes_BM.unsqueeze(0), origins_IM]).flatten(1)


def renumber(flow: Flow) -> None:
    """Renumber the position ids of every row without gaps, counted from the row's first."""
    assert flow.layout is not None
    real_BN = flow.layout.real_BN.to(flow.hidden_BND.device)
    rank_BN = real_BN.long().cumsum(1) - 1
    first_ABN = flow.positions_ABN.masked_fill(~real_BN, torch.iinfo(torch.long).max).amin(2, keepdim=True)
    flow.meta_CBN[:-OTHER_META] = torch.where(real_BN, first_ABN + rank_BN, 0)


def run_layers(
    family: Any,
    segment: Segment,
    flow: Flow,
    positions: Tensor,
    mask: Any,
    cache: Any,
    options: dict[str, Any],
    queries: Queries | None = None,
    leaving: bool = False,
) -> Any:
    """Return the language model's own forward over the layers of one segment.

    Of a segment without layers only what layer 0 would get is computed.

    It runs on a shallow view of the model (same parameters and submodules, another list of layers), so the model itself
    is never changed, not even when something fails. The view has a place for every layer, so that whatever the forward
    reads by a layer's number is right; layers outside the segment do nothing there. What the forward does to its input
    before the first layer (Granite scales it) is for layer 0 alone: the first layer of a later segment gets the hidden
    states as they left the one before, and a segment ends with what reaches the layer after it.

    Args:
        family: The model's adapter: its language model, and what the final norm is called.
        segment: Its layers to run; the final norm belongs to the last segment.
        flow: Its hidden states are the input of the first layer.
        positions: Position ids, B x N or axes x B x N.
        mask: True where a token is, cached ones first (B x N), or ready-made masks (`Family.attention_mask`).
        cache: The segment's view of the KV cache, or None.
        options: Further keyword arguments of the model's forward.
        queries: What the model's last layer and its norm are run for; None = all tokens.
        leaving: All visual tokens leave after the segment: nobody reads what its last layer makes of them.
    """
    language_model, hidden_BND = family.language_model, flow.hidden_BND
    if records_layers(language_model.config, options):
        maybe_install_capturing_hooks(language_model)  # once, on the model: on a view they would pile up
    passage = _Passage(segment, hidden_BND, flow.layers_give_tuples)
    layers = layers_for(language_model, segment, flow, queries, leaving)
    modules: dict[str, Any] = {"layers": [_Layer(layer, number, passage) for number, layer in enumerate(layers)]}
    if segment.last != len(language_model.layers):
        modules[family.norm_name] = nn.Identity()
    if segment.first > 0 or segment.last == 0:
        # Called past its hooks: ZeRO-3 gathers by the order of hooked calls, which must be one and the same for every
        # rank (one without images runs no segments) and every stage. They hold no parameters.
        beside = {name: child for name, child in language_model._modules.items() if name not in modules}
        modules |= {name: _Unhooked(child) for name, child in beside.items() if _holds_nothing(child)}
    view = view_of(language_model, modules)
    if "flash" in str(view.config._attn_implementation) and len(hidden_BND) == 1:
        options = options | _one_sequence(hidden_BND, mask)
    output = type(language_model).forward(
        view,
        inputs_embeds=hidden_BND,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        **options,
    )
    flow.layers_give_tuples = passage.gives_tuples
    flow.input_changed = flow.input_changed or passage.input_changed
    if segment.last != len(language_model.layers):
        output.last_hidden_state = passage.left_BND
    return output


def layers_for(language_model: Any, segment: Segment, flow: Flow, queries: Queries | None, leaving: bool) -> list[Any]:
    """Return the decoder layers, those of a segment as they are to be run."""
    layers = list(language_model.layers)
    if flow.held_BN is not None and flow.layout is not None:
        others = Queries.of(flow.layout.real_BN & ~flow.held_BN)
        held_BN, device = flow.held_BN.to(flow.hidden_BND.device, non_blocking=True), flow.hidden_BND.device
        exact = others is not None and not bool(flow.held_BN.gather(1, others.columns_BQ).any())
        others = None if others is None else others.to(device)
        inside = layers[segment.first : segment.last]
        layers[segment.first : segment.last] = [holding(layer, held_BN, others, exact) for layer in inside]
    if leaving and flow.layout is not None and runs_for_queries(layers[segment.last - 1]):
        visual_BN = torch.zeros_like(flow.layout.real_BN)
        for group in flow.layout.groups:
            visual_BN[group.rows_I.unsqueeze(1), group.columns_IN] = True
        text, device = Queries.of(flow.layout.real_BN & ~visual_BN), flow.hidden_BND.device
        if text is not None:
            last = holding(layers[segment.last - 1], visual_BN.to(device), text.to(device), exact=True)
            layers[segment.last - 1] = last
    if queries is not None:
        layers[-1] = for_queries(language_model.layers[-1], queries)
    return layers


# Arguments (or keys of the config) by which a forward is asked to record what its layers do.
_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


def records_layers(config: Any, options: Mapping[str, Any]) -> bool:
    """Return whether a forward with these arguments gives what its layers did."""
    return any(bool(options.get(name, getattr(config, name, False))) for name in _RECORDED)


def _holds_nothing(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is None


class _Unhooked:
    """A module called past its hooks; its attributes are there to be read."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


@dataclass
class _Passage:
    """One pass through the layers of a segment: what goes in, and what reached the layer after its last.

    Attributes:
        segment: The segment.
        entering_BND: Input of its first layer; of layer 0 what the forward makes of it is.
        gives_tuples: Layers return tuples.
        left_BND: What reached the layer after its last.
        input_changed: What reached layer 0 was another tensor than what came in.
    """

    segment: Segment
    entering_BND: Tensor
    gives_tuples: bool
    left_BND: Tensor | None = None
    input_changed: bool = False


class _Layer:
    """A decoder layer at its place in a view: runs inside its segment, and passes hidden states on outside of it."""

    def __init__(self, layer: Any, number: int, passage: _Passage) -> None:
        self._layer, self._number, self._passage = layer, number, passage

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        passage, segment = self._passage, self._passage.segment
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._number == 0 and segment.first == 0:
            passage.input_changed = hidden is not passage.entering_BND
        if not segment.first <= self._number < segment.last:
            if self._number == segment.last:
                passage.left_BND = hidden
            return (hidden, None) if passage.gives_tuples else hidden
        if self._number == segment.first and segment.first > 0:
            if args:
                args = (passage.entering_BND, *args[1:])
            else:
                kwargs["hidden_states"] = passage.entering_BND
        output = self._layer(*args, **kwargs)
        passage.gives_tuples = isinstance(output, tuple)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


def _one_sequence(hidden_BND: Tensor, mask_BN: Tensor) -> dict[str, Any]:
    """Say to flash attention that a single row is one sequence; else it reads gaps in position ids as boundaries."""
    queries, keys = hidden_BND.shape[1], mask_BN.shape[1]
    bounds = torch.tensor([[0, queries], [0, keys]], dtype=torch.int32).to(hidden_BND.device, non_blocking=True)
    return {"cu_seq_lens_q": bounds[0], "cu_seq_lens_k": bounds[1], "max_length_q": queries, "max_length_k": keys}


def trim(flow: Flow, projected: Sequence[tuple[ImageGroup, Kept]]) -> Flow:
    """Return the rows without the padding after each unit's features: positions, sizes and sources as the points left
    them.
    """
    assert flow.layout is not None
    flow = replace(flow, layout=replace(flow.layout, groups=tuple(group for group, _ in projected)))
    kept, metas = [], []
    for group, one in projected:
        visual_BND, meta_CIN = visuals_of(flow, group)
        axes_ABM = one.positions_ABM.expand(len(meta_CIN) - OTHER_META, -1, -1)
        positions_ABM = meta_CIN[:-OTHER_META].gather(2, axes_ABM)
        hidden_BMD = visual_BND[:, : one.positions_ABM.shape[2]]
        kept.append(replace(one, hidden_BMD=hidden_BMD, positions_ABM=positions_ABM))
        metas.append(meta_CIN)
    return rejoin(flow, kept, metas)
