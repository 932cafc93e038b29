"""The forward that replaces the language model's own while points are set: layout, segments, cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from orchestrator.compression.attention.recorder import Recording, attention_module, not_recorded, recording_of
from orchestrator.compression.attention.stats import Seen, counted_from_zero, needs_of
from orchestrator.compression.attention.tower import records_for
from orchestrator.compression.families.base import Family
from orchestrator.compression.families.images import ready_features
from orchestrator.compression.forward.apply_point import call_idle
from orchestrator.compression.forward.cache import CacheRecord, SegmentCache, record_of, remember
from orchestrator.compression.forward.entry import Pass, check_positions, entering, locate, padding_mask
from orchestrator.compression.forward.queries import (
    Queries,
    for_queries,
    has_attention,
    runs_for_queries,
    shows_queries,
    view_of,
)
from orchestrator.compression.forward.segments import (
    OTHER_META,
    Draw,
    Flow,
    Segment,
    compress,
    let_in,
    records_layers,
    renumber,
    run_layers,
    segments_of,
    set_aside,
    trim,
)
from orchestrator.compression.layout import Layout
from orchestrator.compression.masks import Keys
from orchestrator.compression.protocol import IGNORED, Point
from orchestrator.errors import UsageError


def keys_of(
    config: Any,
    flow: Flow,
    cache: Any,
    segment: Segment,
    record: CacheRecord | None,
    number: int,
    padding_BK: Tensor | None,
) -> Keys:
    """Return the keys of one segment.

    Args:
        config: The language model's config.
        flow: What enters the segment.
        cache: The complete KV cache, or None.
        segment: The segment.
        record: What the filled cache remembers, or None.
        number: The segment's number.
        padding_BK: The padding mask as the caller gave it, cached tokens first, or None.

    Raises:
        UsageError: the cache's rows or tokens are not those it was filled with.
    """
    device = flow.hidden_BND.device
    recorded = record.masks[number].shape[1] if record is not None else 0
    view = SegmentCache(cache, segment.first, segment.last, recorded) if cache is not None else None
    past = view.get_seq_length() if view is not None else 0
    mask_BK = _mask(flow, record.masks[number] if record else None, past, segment, padding_BK)
    sizes_BK = None
    past_sizes = record.sizes[number] if record is not None else None
    if flow.size_bias or past_sizes is not None:
        if past_sizes is None:
            past_sizes = torch.ones(len(mask_BK), past, dtype=torch.long, device=device)
        sizes_BK = torch.cat([past_sizes[:, :past], flow.sizes_BN], dim=1)
    # Queries see all that is cached anyway: no cached token needs a block.
    blocks_BK = nn.functional.pad(flow.blocks_BN, (past, 0), value=-1) if flow.blocked else None
    return Keys(
        hidden_BND=flow.hidden_BND,
        mask_BK=mask_BK,
        config=config,
        layer_types=tuple((getattr(config, "layer_types", None) or ())[segment.first : segment.last]),
        cache=view,
        first=segment.first,
        blocks_BK=blocks_BK,
        sizes_BK=sizes_BK,
    )


def _mask(flow: Flow, recorded_BK: Tensor | None, past: int, segment: Segment, padding_BK: Tensor | None) -> Tensor:
    device, (rows, columns) = flow.hidden_BND.device, flow.hidden_BND.shape[:2]
    if flow.layout is not None:
        mask_BN = flow.layout.real_BN.to(device, non_blocking=True)
    elif padding_BK is not None:
        mask_BN = padding_BK[:, -columns:].to(torch.bool)
    else:
        mask_BN = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if not past:
        return mask_BN
    if recorded_BK is not None:
        past_BN = recorded_BK[:, :past]
    elif padding_BK is not None:
        past_BN = padding_BK[:, :past].to(torch.bool)
    else:
        past_BN = torch.ones(rows, past, dtype=torch.bool, device=device)
    if past_BN.shape != (rows, past):
        raise UsageError(
            f"compression: the KV cache holds {rows} rows of {past} tokens before layer {segment.first}, "
            f"but was filled with {tuple(past_BN.shape)}; rows of a cache cannot be added after the prompt"
        )
    return torch.cat([past_BN, mask_BN], dim=1)


# Arguments of the language model that every segment gets its own of.
_PER_SEGMENT = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "input_ids")


@dataclass
class Decoder:
    """Runs the language model of one attached model under the present points.

    Attributes:
        family: The model's adapter.
        points: The present points, in the order of layers.
        draw: What random methods draw from.
        modules: Learned modules by name.
        current: The pass of the top model that is under way.
        prompt_columns: Columns of the prompt while `generate` runs, else None.
        kinds_seen: Whether any training rank has had images, and videos, so far; of a family with a tower for each.
    """

    family: Family
    points: tuple[Point, ...] = ()
    draw: Draw = field(default_factory=Draw)
    modules: nn.ModuleDict | None = None
    current: Pass | None = None
    prompt_columns: int | None = None
    kinds_seen: tuple[bool, bool] = (False, False)

    def forward(self, arguments: dict[str, Any]) -> Any:
        """Return the language model's forward; `arguments` are its keyword arguments."""
        language_model = self.family.language_model
        cache = arguments.get("past_key_values")
        record = record_of(cache)
        current = self.current
        if current is None or (record is None and not self.points):
            if record is None:
                return self._plain(current, arguments)
            current = Pass({})
        check_positions(arguments)
        given = padding_mask(self.family, current, arguments)
        flow = entering(self.family, current, arguments, record, given, bool(self.points))
        if record is None and flow.layout is None and not (current.idle and self._learns()):
            return self._plain(current, arguments)
        cache = self._cache(arguments, language_model)
        return self._run(current, flow, cache, record, arguments, given)

    def _plain(self, current: Pass | None, arguments: dict[str, Any]) -> Any:
        """Return the language model's own forward of what nothing compresses."""
        language_model = self.family.language_model
        queries = self._last_queries(current, None, arguments) if current is not None else None
        view = language_model
        if queries is not None:
            *layers, last = language_model.layers
            view = view_of(language_model, {"layers": [*layers, for_queries(last, queries)]})
        return type(language_model).forward(view, **arguments)

    def _last_queries(self, current: Pass, flow: Flow | None, arguments: dict[str, Any]) -> Queries | None:
        """Return the tokens whose logits a label needs, where nothing else that the last layer makes is read."""
        asked = {**arguments, **current.inputs}
        cached = arguments.get("past_key_values") is not None or arguments.get("use_cache") is not False
        if not current.label_logits_only or cached or not self.trims:
            return None
        if any(records_layers(owner.config, asked) for owner in (self.family.language_model, self.family.model)):
            return None
        if not runs_for_queries(self.family.language_model.layers[-1]):
            return None
        queries = Queries.of(current.targets_BN(flow).cpu() != IGNORED)
        current.queries = None if queries is None else queries.to(arguments["inputs_embeds"].device)
        return current.queries

    def _leaves(self, coming: Sequence[Point], layer: int, arguments: dict[str, Any]) -> bool:
        """Return whether all visual tokens leave after a layer that can be run for the others alone."""
        language_model = self.family.language_model
        if not any(point.spec.keeps_none for point in coming) or not self.trims:
            return False
        before, last = language_model.layers[layer], language_model.layers[-1]
        if type(before) is not type(last) or not has_attention(before):
            return False
        return not records_layers(language_model.config, arguments)

    @functools.cached_property
    def trims(self) -> bool:
        """Whether the last layer runs only for tokens whose logits a label needs, in forwards that ask for no more."""
        return shows_queries(self.family)

    def _cache(self, arguments: dict[str, Any], language_model: Any) -> Any:
        use_cache = arguments.get("use_cache")
        if use_cache is None:
            use_cache = getattr(language_model.config, "use_cache", False)
        if language_model.training and getattr(language_model, "gradient_checkpointing", False):
            use_cache = False
        arguments["use_cache"] = bool(use_cache)
        cache = arguments.get("past_key_values")
        if cache is None and use_cache:
            cache = DynamicCache(config=language_model.config)
        if getattr(cache, "is_compileable", False):
            raise UsageError(
                "compression: a static KV cache has one length for all layers, compressed ones differ; use a dynamic "
                "one"
            )
        return cache

    def located(self, current: Pass) -> tuple[Layout | None, Tensor | None]:
        """Return the layout and labels of a pass before its decoder runs."""
        if current.located is None and current.inputs.get("input_ids") is not None:
            given = padding_mask(self.family, current, {"attention_mask": current.inputs.get("attention_mask")})
            locate(self.family, current, given, current.inputs["input_ids"].shape[1], bool(self.points))
        return current.located or (None, None)

    def module_of(self, point: Point) -> nn.Module | None:
        """Return a point's learned module; of one that adds tokens where they enter, so that it is called once a
        forward.
        """
        if hasattr(point.compressor, "enter") and not point.enters:
            return None
        return self.modules[point.module_name] if point.module_name and self.modules is not None else None

    def _learns(self) -> bool:
        return any(point.module_name for point in self.points if not point.before_decoder)

    def _run(
        self,
        current: Pass,
        flow: Flow,
        cache: Any,
        record: CacheRecord | None,
        arguments: dict[str, Any],
        padding_BK: Tensor | None,
    ) -> Any:
        language_model = self.family.language_model
        points = record.points if record is not None else self.points
        segments = segments_of(points, self.family.num_layers)
        after = _record_after(points, flow, cache, record)
        given = arguments.get("position_ids")
        if any(point.spec.keys_only for point in points) and records_layers(language_model.config, arguments):
            raise UsageError(
                "compression: what layers do with tokens that are keys alone (keys_only) cannot be recorded; do not "
                "ask for hidden states, attentions or router logits"
            )
        axes = given is not None and given.ndim == 3
        options = {name: value for name, value in arguments.items() if name not in _PER_SEGMENT}
        self._watch(current, flow, points, after.seen_tokens - flow.hidden_BND.shape[1])
        last_ids_AB, columns, entering = _last_ids(flow), flow.hidden_BND.shape[1], flow.layout
        before_shift: Tensor | None = None
        counts, outputs = [], []
        for number, segment in enumerate(segments):
            if flow.waiting is not None:
                flow = let_in(flow, self._entered(flow, flow.waiting, options, axes, columns))
            shift = record.shifts[number] if record is not None else None
            _move_ids(flow, before_shift, shift)
            before_shift = shift
            if flow.layout is not None and number:
                shift = after.shifts[-1]
            flow, renumbered_AB = self._points(current, flow, segment)
            if segment.text_only and flow.layout is not None:
                flow = set_aside(flow, segments[1].points[0])
            keys = keys_of(language_model.config, flow, cache, segment, record, number, padding_BK)
            mask = self.family.attention_mask(keys)
            positions = flow.positions_ABN if axes else flow.positions_ABN[0]
            more = self.family.segment_options(options, segment.first)
            more = more | _of_tokens(options, self.family.token_options, flow, columns)
            coming = segments[number + 1].points if segment is not segments[-1] else ()
            with watched_layer(language_model, segment.last - 1, coming, flow):
                queries = self._last_queries(current, flow, arguments) if segment is segments[-1] else None
                leaving = self._leaves(coming, segment.last - 1, arguments)
                output = run_layers(self.family, segment, flow, positions, mask, keys.cache, more, queries, leaving)
            # Held back: the model would count them by a mask of the length that came in.
            for logits in output.get("router_logits") or ():
                real_M = keys.mask_BK[:, -flow.hidden_BND.shape[1] :].flatten()
                current.router_logits += (logits.reshape(-1, logits.shape[-1])[real_M],)
                output["router_logits"] = None
            outputs.append(output)
            flow.hidden_BND = output.last_hidden_state
            after.masks.append(keys.mask_BK)
            after.sizes.append(keys.sizes_BK)
            after.shifts.append(last_ids_AB - renumbered_AB if renumbered_AB is not None else shift)
            counts += [flow.layout.visual_tokens if flow.layout else 0] * (segment.last - segment.first)
        if self.prompt_columns is not None:
            _check_last(entering, flow, points, columns - 1)
        if cache is not None:
            remember(cache, after)
        current.flow, current.visual_tokens_per_layer = flow, tuple(counts)
        return _joined(outputs, cache)

    def _entered(self, text: Flow, waiting: Flow, options: dict[str, Any], axes: bool, columns: int) -> Tensor:
        """Return rows that wait as they would have entered layer 0: unchanged, where the text was."""
        if not text.input_changed:
            return waiting.hidden_BND
        assert waiting.layout is not None
        waiting.layers_give_tuples = text.layers_give_tuples
        positions = waiting.positions_ABN if axes else waiting.positions_ABN[0]
        mask_BN = waiting.layout.real_BN.to(waiting.hidden_BND.device, non_blocking=True)
        more = self.family.segment_options(options, 0) | {"use_cache": False}
        more |= _of_tokens(options, self.family.token_options, waiting, columns)
        output = run_layers(self.family, Segment(0, 0, ()), waiting, positions, mask_BN, None, more)
        entered_BND: Tensor = output.last_hidden_state
        return entered_BND

    def _watch(self, current: Pass, flow: Flow, points: Sequence[Point], seen: int) -> None:
        """Prepare what points ask to see of tower and layers; `seen` tokens came before."""
        limit = None if self.prompt_columns is None else self.prompt_columns - seen
        flow.records = records_for(points, flow.layout, flow.origins_BN, flow.labels_BN, limit, current.tower)
        across = [point.spec.kind for point in points if point.spec.across_frames]
        if flow.layout is not None and across and ready_features(current.inputs, "video") is not None:
            raise UsageError(
                f"compression: {across[0]} acts across the frames of a video, and ready features do not tell them; "
                "pass pixel_values_videos, not mm_encoder_outputs"
            )
        if flow.layout is not None and current.projected is None:
            early = next((point.place for point in points if point.before_decoder), None)
            if early is not None:
                raise UsageError(
                    f"compression: a point at {early} acts while the images are encoded; pass pixel_values, not ready "
                    "features (mm_encoder_outputs)"
                )

    def _points(self, current: Pass, flow: Flow, segment: Segment) -> tuple[Flow, Tensor | None]:
        """Return the flow after a segment's points, and where they gave other position ids the rows' highest (axes x
        B).
        """
        highest_AB: Tensor | None = None
        if segment.first == 0 and flow.layout is not None and current.projected is not None:
            flow = trim(flow, current.projected)
            if any(one.renumber for _, one in current.projected):
                renumber(flow)
                highest_AB = _last_ids(flow)
        for point in segment.points:
            module = self.module_of(point)
            if flow.layout is None:
                if current.idle and module is not None:
                    flow.hidden_BND = call_idle(module, flow.hidden_BND)
                continue
            flow, wants_numbers = compress(flow, point, self.draw, module)
            if wants_numbers:
                renumber(flow)
            if wants_numbers or point.enters:
                highest_AB = _last_ids(flow)
        return flow, highest_AB


def _of_tokens(options: dict[str, Any], names: Sequence[str], flow: Flow, columns: int) -> dict[str, Any]:
    """Return the arguments that hold a number for each of `columns` tokens, for the tokens that are left.

    Without a KV cache, `generate` gives those of the prompt alone; the tokens after it are text, 0.
    """
    given = {name: options[name] for name in names if isinstance(options.get(name), Tensor)}
    origins_BM = flow.origins_BN
    return {
        name: nn.functional.pad(value_BN, (0, columns - value_BN.shape[1]))
        .gather(1, origins_BM.clamp(min=0))
        .masked_fill(origins_BM < 0, 0)
        for name, value_BN in given.items()
    }


def _record_after(points: tuple[Point, ...], flow: Flow, cache: Any, record: CacheRecord | None) -> CacheRecord:
    """Return the cache's record after this pass; its segments are added as they run."""
    columns = flow.hidden_BND.shape[1]
    if record is not None:
        seen = record.seen_tokens
    else:
        seen = int(cache.get_seq_length()) if cache is not None else 0
    after = CacheRecord(points, seen + columns, [], [], [])
    after.tail = flow.layout.tail if flow.layout else columns + (record.tail if record else 0)
    return after


def _check_last(entering: Layout | None, left: Flow, points: Sequence[Point], last: int) -> None:
    """Refuse a prompt that ends with a visual token which was dropped: the next token would follow from nothing.

    Raises:
        UsageError: a row does.
    """
    groups = entering.groups if entering is not None else ()
    rows = torch.cat([group.rows_I[(group.columns_IN == last).any(1)] for group in groups]) if groups else None
    if rows is None or not len(rows):  # elsewhere nothing waits for the device
        return
    if not bool((left.origins_BN[rows.to(left.origins_BN.device)] == last).any(1).all()):
        kinds = ", ".join(dict.fromkeys(point.spec.kind for point in points))
        raise UsageError(
            f"generate: a prompt ends with an image, and {kinds} dropped its last token, whose logits are the answer's "
            "first; let prompts end with text"
        )


def _last_ids(flow: Flow) -> Tensor:
    """Return the highest position id of each row: axes x B."""
    positions_ABN = flow.positions_ABN
    if flow.layout is not None:
        padding_BN = ~flow.layout.real_BN.to(positions_ABN.device)
        positions_ABN = positions_ABN.masked_fill(padding_BN, -1)
    return positions_ABN.amax(2)


def _move_ids(flow: Flow, before: Tensor | None, shift: Tensor | None) -> None:
    """Let tokens that follow a renumbered image in the cache continue its numbers."""
    if shift is None or shift is before:
        return
    difference_AB = shift if before is None else shift - before
    flow.meta_CBN = flow.meta_CBN.clone()
    axes = len(flow.meta_CBN) - OTHER_META  # plain ids may follow a prompt that had several axes
    flow.meta_CBN[:axes] -= difference_AB[-axes:].unsqueeze(2)


def _joined(outputs: Sequence[Any], cache: Any) -> Any:
    """Return one output of the language model: the last segment's, with all segments' recorded layers."""
    output = outputs[-1]
    if "past_key_values" in output:
        output["past_key_values"] = cache
    for name in ("hidden_states", "attentions"):
        recorded = [one.get(name) for one in outputs]
        if recorded[-1] is not None:
            # A segment's last hidden state is, uncompressed, the next one's first.
            cut = -1 if name == "hidden_states" else None
            output[name] = tuple(state for one in recorded[:-1] for state in one[:cut]) + tuple(recorded[-1])
    return output


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
        recording.queries_BQ = query_columns(records.prompt.queries_BQ, flow.origins_BN)
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


def query_columns(queries_BQ: Tensor, origins_BN: Tensor) -> Tensor:
    """Return the present columns of query tokens given by original column; of a dropped one, of the last before it."""
    columns = origins_BN.shape[1]
    column_N = torch.arange(columns, device=origins_BN.device)
    before_BQN = (origins_BN.unsqueeze(1) <= queries_BQ.unsqueeze(2)) & (origins_BN >= 0).unsqueeze(1)
    rank_BN = origins_BN * columns + column_N
    return rank_BN.unsqueeze(1).masked_fill(~before_BQN, -1).argmax(2)
