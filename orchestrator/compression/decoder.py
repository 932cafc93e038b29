"""The forward that replaces the language model's own while points are set: layout, segments, cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from orchestrator.compression.caches import CacheRecord
from orchestrator.compression.families.base import Family
from orchestrator.compression.layout import Layout, build_layout
from orchestrator.compression.protocol import Point
from orchestrator.compression.segments import Draw, Flow, Segment, compress, renumber, run_layers, segments_of
from orchestrator.errors import UsageError


@dataclass
class Pass:
    """One forward of the top model: what came in, and what the head must know of what the decoder did.

    Attributes:
        inputs: Keyword arguments of the top model's forward.
        labels_BN: Labels on the device, or None.
        flow: The decoder's last state; None where nothing was compressed.
        visual_tokens_per_layer: Visual tokens that ran in each decoder layer, summed over rows.
    """

    inputs: dict[str, Any]
    labels_BN: Tensor | None = None
    flow: Flow | None = None
    visual_tokens_per_layer: tuple[int, ...] = ()


@dataclass
class Decoder:
    """Runs the language model of one attached model under the present points.

    Attributes:
        family: The model's adapter.
        points: The present points, in the order of layers.
        draw: What random methods draw from.
        modules: Learned modules by name.
        records: What filled caches must remember.
        current: The pass of the top model that is under way.
    """

    family: Family
    points: tuple[Point, ...] = ()
    draw: Draw = field(default_factory=Draw)
    modules: nn.ModuleDict | None = None
    records: WeakKeyDictionary[Cache, CacheRecord] = field(default_factory=WeakKeyDictionary)
    current: Pass | None = None

    def forward(self, arguments: dict[str, Any]) -> Any:
        """The language model's forward; `arguments` are its keyword arguments."""
        language_model = self.family.language_model
        cache = arguments.get("past_key_values")
        record = self.records.get(cache) if isinstance(cache, Cache) else None
        current = self.current
        if current is None or (record is None and not self.points):
            if record is None:
                return type(language_model).forward(language_model, **arguments)
            current = Pass({})
        embeds_BND = arguments["inputs_embeds"]
        _check_mask(arguments)
        flow = self._flow(current, arguments, record)
        if record is None and flow.layout is None:
            return type(language_model).forward(language_model, **arguments)
        cache = self._cache(arguments, language_model)
        return self._run(current, flow, cache, record, arguments, embeds_BND.shape[1])

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
        return cache

    def _flow(self, current: Pass, arguments: dict[str, Any], record: CacheRecord | None) -> Flow:
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
        if positions.ndim < 3:
            positions = positions.expand(rows, columns).unsqueeze(0)
        meta_CBN = torch.cat(
            [positions, torch.ones_like(positions[:1]), column_N.to(positions.dtype).expand(1, rows, columns)]
        )
        layout, labels_BN = None, None
        if not (seen and columns == 1):
            layout, labels_BN = self._layout(current, arguments.get("attention_mask"), rows, columns)
        return Flow(embeds_BND, meta_CBN, layout, labels_BN)

    def _layout(
        self, current: Pass, mask: Tensor | None, rows: int, columns: int
    ) -> tuple[Layout | None, Tensor | None]:
        input_ids = current.inputs.get("input_ids")
        if input_ids is None:
            if not self.points:
                return None, None
            raise UsageError("compression: the model needs input_ids to know where images are, not inputs_embeds alone")
        parts = [self.family.visual_BN(input_ids).to(input_ids.dtype)]
        parts.append(mask[:, -columns:].to(input_ids) if mask is not None else torch.ones_like(input_ids))
        parts.extend([current.labels_BN.to(input_ids)] if current.labels_BN is not None else [])
        host = torch.stack(parts).cpu()  # the one copy to the host of a forward
        visual_BN, real_BN = host[0].bool(), host[1].bool()
        if not bool(visual_BN.any()):
            return None, None
        grids = self.family.grids(current.inputs, int(visual_BN.sum()))
        layout = build_layout(visual_BN, real_BN, grids)
        # Visual positions never carry a label.
        labels_BN = host[2].masked_fill(visual_BN, -100) if current.labels_BN is not None else None
        return layout, labels_BN

    def _run(
        self,
        current: Pass,
        flow: Flow,
        cache: Any,
        record: CacheRecord | None,
        arguments: dict[str, Any],
        columns: int,
    ) -> Any:
        language_model = self.family.language_model
        points = record.points if record is not None else self.points
        segments = segments_of(points, self.family.num_layers)
        after = CacheRecord(points, (record.seen_tokens if record else _past(cache)) + columns, [], [])
        given = arguments.get("position_ids")
        axes = given is not None and given.ndim == 3
        names = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "input_ids")
        options = {name: value for name, value in arguments.items() if name not in names}
        last_ids_AB = _last_ids(flow)
        before_shift: Tensor | None = None
        counts, outputs = [], []
        for number, segment in enumerate(segments):
            shift = record.shifts[number] if record is not None else None
            _move_ids(flow, before_shift, shift)
            before_shift = shift
            if flow.layout is not None and number:
                shift = after.shifts[-1]
            flow, renumbered = self._points(flow, segment)
            mask_BN = self._mask(flow, cache, segment, record, number, arguments.get("attention_mask"))
            positions = flow.positions_ABN if axes else flow.positions_ABN[0]
            output = run_layers(language_model, segment, flow.hidden_BND, positions, mask_BN, cache, options)
            outputs.append(output)
            flow.hidden_BND = output.last_hidden_state
            after.masks.append(mask_BN)
            after.shifts.append(last_ids_AB - _last_ids(flow) if renumbered else shift)
            counts += [flow.layout.visual_tokens if flow.layout else 0] * (segment.last - segment.first)
        if cache is not None:
            self.records[cache] = after
        current.flow, current.visual_tokens_per_layer = flow, tuple(counts)
        return _joined(outputs, cache)

    def _points(self, flow: Flow, segment: Segment) -> tuple[Flow, bool]:
        renumbered = False
        for point in segment.points:
            if flow.layout is None:
                break
            module = self.modules[point.module_name] if point.module_name and self.modules is not None else None
            flow, wants_numbers = compress(flow, point, self.draw, module)
            if wants_numbers:
                renumber(flow)
                renumbered = True
        return flow, renumbered

    def _mask(
        self, flow: Flow, cache: Any, segment: Segment, record: CacheRecord | None, number: int, given: Tensor | None
    ) -> Tensor:
        device, (rows, columns) = flow.hidden_BND.device, flow.hidden_BND.shape[:2]
        if flow.layout is not None:
            mask_BN = flow.layout.real_BN.to(device, non_blocking=True)
        elif given is not None:
            mask_BN = given[:, -columns:].to(torch.bool)
        else:
            mask_BN = torch.ones(rows, columns, dtype=torch.bool, device=device)
        past = cache.get_seq_length(segment.first) if cache is not None else 0
        if not past:
            return mask_BN
        if record is not None:
            past_BN = record.masks[number][:, :past]
        elif given is not None:
            past_BN = given[:, :past].to(torch.bool)
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
    flow.meta_CBN[:-2] -= difference_AB.unsqueeze(2)


def _check_mask(arguments: dict[str, Any]) -> None:
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UsageError(
            "compression: attention_mask must be 2-D (batch x tokens); a ready-made mask (static cache) cannot follow "
            "tokens that are dropped"
        )
    if positions is None or mask is not None or arguments.get("past_key_values") is not None:
        return
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
