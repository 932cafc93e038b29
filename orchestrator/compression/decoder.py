"""The forward that replaces the language model's own while points are set: layout, segments, cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from orchestrator.compression.acting import call_idle
from orchestrator.compression.caches import CacheRecord, SegmentCache, record_of, remember
from orchestrator.compression.families.base import Family
from orchestrator.compression.layout import Layout, build_layout
from orchestrator.compression.masks import Keys
from orchestrator.compression.projector import trim
from orchestrator.compression.protocol import Kept, Point
from orchestrator.compression.recorder import Recording
from orchestrator.compression.seen import watched_layer
from orchestrator.compression.segments import (
    OTHER_META,
    Draw,
    Flow,
    Segment,
    compress,
    renumber,
    run_layers,
    segments_of,
)
from orchestrator.compression.tower import records_for
from orchestrator.errors import UsageError


@dataclass
class Pass:
    """One forward of the top model: what came in, and what the head must know of what the decoder did.

    Attributes:
        inputs: Keyword arguments of the top model's forward.
        labels_BN: Labels on the device, or None.
        flow: The decoder's last state; None where nothing was compressed.
        visual_tokens_per_layer: Visual tokens that ran in each decoder layer, summed over rows.
        tower: What is recorded of the vision tower; None where no point needs it.
        idle: A training rank whose batch has no image: what learns is called all the same.
        located: Layout and labels on the host, once they are known.
        projected: What points at the projector left of each group.
    """

    inputs: dict[str, Any]
    labels_BN: Tensor | None = None
    flow: Flow | None = None
    visual_tokens_per_layer: tuple[int, ...] = ()
    tower: Recording | None = None
    idle: bool = False
    located: tuple[Layout | None, Tensor | None] | None = None
    projected: list[Kept] | None = None


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
    """

    family: Family
    points: tuple[Point, ...] = ()
    draw: Draw = field(default_factory=Draw)
    modules: nn.ModuleDict | None = None
    current: Pass | None = None
    prompt_columns: int | None = None

    def forward(self, arguments: dict[str, Any]) -> Any:
        """The language model's forward; `arguments` are its keyword arguments."""
        language_model = self.family.language_model
        cache = arguments.get("past_key_values")
        record = record_of(cache)
        current = self.current
        if current is None or (record is None and not self.points):
            if record is None:
                return type(language_model).forward(language_model, **arguments)
            current = Pass({})
        _check_positions(arguments)
        given = _padding_mask(self.family, current, arguments)
        flow = self._flow(current, arguments, record, given)
        if record is None and flow.layout is None and not (current.idle and self._learns()):
            return type(language_model).forward(language_model, **arguments)
        cache = self._cache(arguments, language_model)
        return self._run(current, flow, cache, record, arguments, given)

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

    def _flow(self, current: Pass, arguments: dict[str, Any], record: CacheRecord | None, given: Tensor | None) -> Flow:
        """What enters the first layer: hidden states, ids as the plain model has them, and where the images are."""
        embeds_BND = arguments["inputs_embeds"]
        rows, columns = embeds_BND.shape[:2]
        device = embeds_BND.device
        cache = arguments.get("past_key_values")
        seen = record.seen_tokens if record is not None else 0
        if record is None and cache is not None:
            seen = int(cache.get_seq_length())
        column_N = torch.arange(columns, device=device)
        positions = arguments.get("position_ids")
        if positions is None:
            positions = column_N + seen
        elif cache is not None and record is not None and self.family.counts_cache(current.inputs):
            # The top model numbered them by the cache's first layer, which may hold fewer tokens than were seen.
            positions = positions + (seen - int(cache.get_seq_length()))
        if positions.ndim < 3:
            positions = positions.expand(rows, columns).unsqueeze(0)
        blocks_BN = self.family.block_ids_BN(current.inputs) if current.inputs else None
        blocks_1BN = (
            blocks_BN[:, -columns:].to(positions).unsqueeze(0)
            if blocks_BN is not None
            else torch.full_like(positions[:1], -1)
        )
        columns_1BN = column_N.to(positions.dtype).expand(1, rows, columns)
        meta_CBN = torch.cat([positions, blocks_1BN, torch.ones_like(positions[:1]), columns_1BN])
        layout, labels_BN = None, None
        if not (seen and columns == 1):
            layout, labels_BN = self._layout(current, given, rows, columns)
        return Flow(embeds_BND, meta_CBN, layout, labels_BN, blocked=blocks_BN is not None)

    def located(self, current: Pass) -> tuple[Layout | None, Tensor | None]:
        """Layout and labels of a pass before its decoder runs."""
        if current.located is None and current.inputs.get("input_ids") is not None:
            given = _padding_mask(self.family, current, {"attention_mask": current.inputs.get("attention_mask")})
            self._layout(current, given, *current.inputs["input_ids"].shape)
        return current.located or (None, None)

    def module_of(self, point: Point) -> nn.Module | None:
        """A point's learned module."""
        return self.modules[point.module_name] if point.module_name and self.modules is not None else None

    def _learns(self) -> bool:
        return any(point.module_name for point in self.points if not point.at_projector)

    def _layout(
        self, current: Pass, mask: Tensor | None, rows: int, columns: int
    ) -> tuple[Layout | None, Tensor | None]:
        if current.located is not None:
            return current.located
        input_ids = current.inputs.get("input_ids")
        if input_ids is None:
            if not self.points:
                return None, None
            raise UsageError("compression: the model needs input_ids to know where images are, not inputs_embeds alone")
        parts = [input_ids]
        parts.append(mask[:, -columns:].to(input_ids) if mask is not None else torch.ones_like(input_ids))
        parts.extend([current.labels_BN.to(input_ids)] if current.labels_BN is not None else [])
        host = torch.stack(parts).cpu()  # the one copy to the host of a forward
        visual_BN, real_BN = self.family.visual_BN(host[0]), host[1].bool()
        if not bool(visual_BN.any()):
            current.located = (None, None)
            return None, None
        grids = self.family.grids({**current.inputs, "input_ids": host[0]}, int(visual_BN.sum()))
        layout = build_layout(visual_BN, real_BN, grids)
        # Visual positions never carry a label.
        labels_BN = host[2].masked_fill(visual_BN, -100) if current.labels_BN is not None else None
        current.located = layout, labels_BN
        return layout, labels_BN

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
        columns = flow.hidden_BND.shape[1]
        after = CacheRecord(points, (record.seen_tokens if record else _past(cache)) + columns, [], [], [])
        after.tail = flow.layout.tail if flow.layout else columns + (record.tail if record else 0)
        given = arguments.get("position_ids")
        axes = given is not None and given.ndim == 3
        names = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "input_ids")
        options = {name: value for name, value in arguments.items() if name not in names}
        limit = None if self.prompt_columns is None else self.prompt_columns - (after.seen_tokens - columns)
        flow.records = records_for(points, flow.layout, flow.origins_BN, flow.labels_BN, limit, current.tower)
        if flow.layout is not None and current.projected is None and any(point.at_projector for point in points):
            raise UsageError(
                "compression: a point at the projector acts while the images are encoded; pass pixel_values, not ready "
                "features (mm_encoder_outputs)"
            )
        last_ids_AB = _last_ids(flow)
        before_shift: Tensor | None = None
        counts, outputs = [], []
        for number, segment in enumerate(segments):
            shift = record.shifts[number] if record is not None else None
            _move_ids(flow, before_shift, shift)
            before_shift = shift
            if flow.layout is not None and number:
                shift = after.shifts[-1]
            flow, renumbered = self._points(current, flow, segment)
            keys = self._keys(flow, cache, segment, record, number, padding_BK)
            mask = self.family.attention_mask(keys)
            positions = flow.positions_ABN if axes else flow.positions_ABN[0]
            more = self.family.segment_options(options, segment.first)
            coming = segments[number + 1].points if segment is not segments[-1] else ()
            with watched_layer(language_model, segment.last - 1, coming, flow):
                output = run_layers(language_model, segment, flow.hidden_BND, positions, mask, cache, more)
            outputs.append(output)
            flow.hidden_BND = output.last_hidden_state
            after.masks.append(keys.mask_BK)
            after.sizes.append(keys.sizes_BK)
            after.shifts.append(last_ids_AB - _last_ids(flow) if renumbered else shift)
            counts += [flow.layout.visual_tokens if flow.layout else 0] * (segment.last - segment.first)
        if cache is not None:
            remember(cache, after)
        current.flow, current.visual_tokens_per_layer = flow, tuple(counts)
        return _joined(outputs, cache)

    def _points(self, current: Pass, flow: Flow, segment: Segment) -> tuple[Flow, bool]:
        renumbered = False
        if segment.first == 0 and flow.layout is not None and current.projected is not None:
            flow = trim(flow, current.projected)
            renumbered = any(one.renumber for one in current.projected)
            if renumbered:
                renumber(flow)
        for point in segment.points:
            module = self.module_of(point)
            if flow.layout is None:
                if current.idle and module is not None:
                    flow.hidden_BND = call_idle(module, flow.hidden_BND)
                continue
            flow, wants_numbers = compress(flow, point, self.draw, module)
            if wants_numbers:
                renumber(flow)
            renumbered = renumbered or wants_numbers or point.enters
        return flow, renumbered

    def _keys(
        self,
        flow: Flow,
        cache: Any,
        segment: Segment,
        record: CacheRecord | None,
        number: int,
        padding_BK: Tensor | None,
    ) -> Keys:
        """What the segment's tokens may see: cached ones, then these."""
        language_config, device = self.family.language_model.config, flow.hidden_BND.device
        past = cache.get_seq_length(segment.first) if cache is not None else 0
        mask_BK = self._mask(flow, record.masks[number] if record else None, past, segment, padding_BK)
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
            config=language_config,
            layer_types=tuple((getattr(language_config, "layer_types", None) or ())[segment.first : segment.last]),
            cache=SegmentCache(cache, segment.first, segment.last) if cache is not None else None,
            blocks_BK=blocks_BK,
            sizes_BK=sizes_BK,
        )

    def _mask(
        self, flow: Flow, recorded_BK: Tensor | None, past: int, segment: Segment, padding_BK: Tensor | None
    ) -> Tensor:
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


def _past(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None else 0


def _last_ids(flow: Flow) -> Tensor:
    """The highest position id of each row: axes x B."""
    positions_ABN = flow.positions_ABN
    if flow.layout is not None:
        padding_BN = ~flow.layout.real_BN.to(positions_ABN.device)
        positions_ABN = positions_ABN.masked_fill(padding_BN, -1)
    return positions_ABN.amax(2)


def _move_ids(flow: Flow, before: Tensor | None, shift: Tensor | None) -> None:
    """Tokens that follow a renumbered image in the cache go on from its numbers."""
    if shift is None or shift is before:
        return
    difference_AB = shift if before is None else shift - before
    flow.meta_CBN = flow.meta_CBN.clone()
    axes = len(flow.meta_CBN) - OTHER_META  # plain ids may follow a prompt that had several axes
    flow.meta_CBN[:axes] -= difference_AB[-axes:].unsqueeze(2)


def _padding_mask(family: Family, current: Pass, arguments: dict[str, Any]) -> Tensor | None:
    """The 2-D padding mask (B x K), or None for no padding.

    Families whose top model makes masks (Gemma 3, PaliGemma) hand ready ones of the full length to the language model;
    these are of no use here, and what they were made of is what the top model was given.
    """
    mask = arguments.get("attention_mask")
    if (
        mask is not None
        and not (isinstance(mask, Tensor) and mask.ndim == 2)
        and current.inputs
        and family.remakes_masks
    ):
        mask = current.inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UsageError(
            "compression: attention_mask must be 2-D (batch x tokens); a ready-made mask (static cache) cannot follow "
            "tokens that are dropped"
        )
    return mask


def _check_positions(arguments: dict[str, Any]) -> None:
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if positions is None or mask is not None or arguments.get("past_key_values") is not None:
        return
    if positions.ndim == 3:
        if len(positions) == 3:  # heights and widths restart in every image
            return
        positions = positions[0]
    if bool((positions[..., 1:] < positions[..., :-1]).any()):
        raise UsageError("compression: position_ids restart within a row; packed rows cannot be compressed")


def _joined(outputs: Sequence[Any], cache: Any) -> Any:
    """One output of the language model: the last segment's, with all segments' recorded layers."""
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
