"""The plain computation the mechanism is held against: one row at a time without padding, eager attention, own masks.

It shares with the mechanism the model's layers and the method itself, nothing else: no layout, batching, padding,
cache, recorder or label arithmetic. The method gets the images of one row and one grid at a time, so what it makes of
them cannot depend on the other rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from orchestrator.compression.families import Family
from orchestrator.compression.protocol import IGNORED, Context, Enters, Kept, Point
from orchestrator.compression.testing.features import before_projector, one_of
from orchestrator.compression.testing.method import Call
from orchestrator.compression.testing.rows import RowState, Unit, spliced, take_rows
from orchestrator.compression.testing.tower import watched, with_cls
from orchestrator.spec.components import Grid

NUDGE = 1e-5  # relative; some hundred times what two exact computations differ by in float32
_STEP, _SEED = 3, 11


@dataclass
class Reference:
    """Plain computations on one model.

    Attributes:
        family: Adapter of a plain model with eager attention.
        modules: Learned modules by name.
        unstable: After a computation: some method chose otherwise when what it looks at was moved by `NUDGE`, so a
            comparison would depend on the last bits.
        calls: After a computation: all calls of methods.
    """

    family: Family
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    unstable: bool = False
    calls: list[Call] = field(default_factory=list)
    _seen: dict[str, Tensor] = field(default_factory=dict)

    def rows(
        self, batch: Mapping[str, Any], units: Sequence[Sequence[Grid]], points: Sequence[Point]
    ) -> list[tuple[RowState, Tensor]]:
        """Return each row after its last layer with its logits (tokens x vocabulary).

        Args:
            batch: Keyword arguments of the model's forward.
            units: For each row the grids of its images, tiles and frames.
            points: Compressors in the order of layers, those at the decoder's input included.
        """
        self.unstable, self.calls = False, []
        with watched(self.family, any("cls" in point.spec.needs for point in points)) as seen:
            states = take_rows(self.family, batch, units)
        states = with_cls(states, seen)
        before = [point for point in points if point.at_projector]
        if before:
            states = before_projector(self.family, batch, states, before, self._at_projector)
        inside = [point for point in points if not point.at_projector]
        done = [self._through(state, inside) for state in states]
        return [(state, self._logits(state.hidden_ND)) for state in done]

    def loss(self, batch: Mapping[str, Any], units: Sequence[Sequence[Grid]], points: Sequence[Point]) -> Tensor:
        """Return the sum over label tokens of the cross-entropy, divided by their number."""
        losses = []
        for state, logits_NV in self.rows(batch, units, points):
            for place in range(len(state.labels) - 1):
                if state.labels[place + 1] != IGNORED:
                    losses.append(F.cross_entropy(logits_NV[place].float(), torch.tensor(state.labels[place + 1])))
        return torch.stack(losses).sum() / len(losses)

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """Return what the top model makes of final hidden states."""
        logits_NV: Tensor = self.family.model.get_output_embeddings()(hidden_ND)
        cap = getattr(self.family.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    def _through(self, state: RowState, points: Sequence[Point]) -> RowState:
        num_layers = self.family.num_layers
        waiting = [*points]
        start = 0
        while start < num_layers:
            here = [point for point in waiting if point.layer <= start]
            for point in here:
                state = self._act(state, point)
            entering = [point for point in points if start == 0 and hasattr(point.compressor, "enter")]
            for point in entering:
                state = self._act(state, point, enters=True)
            waiting = [point for point in waiting if point not in here]
            end = min((point.layer for point in waiting), default=num_layers)
            needs = {need for point in waiting if point.layer == end for need in point.spec.needs}
            state, self._seen = run_layers(self.family.language_model, state, start, end, needs)
            start = end
        return state

    def _act(self, state: RowState, point: Point, enters: bool = False) -> RowState:
        """Return one point on one row: all its units of one grid at a time."""
        module = self.modules.get(point.module_name) if point.module_name else None
        parts: list[tuple[Unit, Kept]] = []
        for grid in dict.fromkeys(unit.grid for unit in state.units if len(unit.columns) > 1):
            members = [unit for unit in state.units if unit.grid == grid and len(unit.columns) > 1]
            context = self._context(state, point, members, module)
            visual_BND = torch.stack([state.hidden_ND[list(unit.columns)] for unit in members])
            compressor = point.compressor
            method = compressor.enter if enters and isinstance(compressor, Enters) else compressor.compress
            kept = self._call(point, method, visual_BND, grid, context)
            parts += [(unit, one_of(kept, number)) for number, unit in enumerate(members)]
        return spliced(state, parts) if parts else state

    def _at_projector(self, point: Point, visual_BND: Tensor, grid: Grid, context: Context) -> Kept:
        samples = tuple(sample_of(row) for row in context.sample_indices)
        module = self.modules.get(point.module_name) if point.module_name else None
        context = replace(context, seed=_SEED, step=_STEP, sample_indices=samples, module=module)
        return self._call(point, point.compressor.compress, visual_BND, grid, context)

    def _call(self, point: Point, method: Any, visual_BND: Tensor, grid: Grid, context: Context) -> Kept:
        kept: Kept = method(visual_BND, grid, context)
        self.calls.append(Call(point.spec, method, visual_BND, grid, context, kept))
        self.unstable = self.unstable or is_unstable(method, visual_BND, grid, context, kept)
        return kept

    def _context(self, state: RowState, point: Point, members: Sequence[Unit], module: nn.Module | None) -> Context:
        columns_BN = torch.tensor([unit.columns for unit in members])
        sizes_N = torch.tensor(state.sizes)
        text = [place not in state.visual and state.labels[place] == IGNORED for place in range(len(state.sizes))]
        context = Context(
            layer=point.layer,
            positions_ABN=state.positions_AN[:, columns_BN],
            sizes_BN=sizes_N[columns_BN],
            rows_B=torch.zeros(len(members), dtype=torch.long),
            seed=_SEED,
            step=_STEP,
            sample_indices=(sample_of(state.number),) * len(members),
            hidden_RND=state.hidden_ND.unsqueeze(0),
            module=module,
            columns_BN=columns_BN,
            text_RN=torch.tensor([text]),
        )
        if "queries" in point.spec.needs:
            context = replace(context, attention_BN=self._seen["attention"][_asking(state)].mean(0)[columns_BN])
        if "keys" in point.spec.needs:
            context = replace(context, row_keys_RND=self._seen["keys"].unsqueeze(0))
        if "cls" in point.spec.needs and state.cls_N is not None and state.cls_keys_Nd is not None:
            origins_BN = torch.tensor(state.origins)[columns_BN]
            attention_BN, keys_BND = state.cls_N[origins_BN], state.cls_keys_Nd[origins_BN]
            context = replace(context, cls_attention_BN=attention_BN, cls_keys_BND=keys_BND)
        return context


def sample_of(row: int) -> int:
    """Return the sample number the kit gives to a row of its batches."""
    return 40 + 7 * row


def draws(rows: int) -> dict[str, Any]:
    """Return the arguments of `Attachment.set_step` under which an attached model draws what the reference draws."""
    return {"step": _STEP, "seed": _SEED, "sample_index": [sample_of(row) for row in range(rows)]}


def _asking(state: RowState) -> list[int]:
    """Return the places of the query tokens: the last before each answer; without labels the row's last."""
    places = [
        place
        for place in range(len(state.labels) - 1)
        if state.labels[place] == IGNORED and state.labels[place + 1] != IGNORED
    ]
    return places or [len(state.labels) - 1]


def is_unstable(method: Any, visual_BND: Tensor, grid: Grid, context: Context, kept: Kept) -> bool:
    """Return whether a method chooses otherwise when all it looks at is moved by `NUDGE`: a near-tie.

    Two exact computations differ in their last bits, so a selection on a near-tie may go either way in them. Tokens
    that are equal (the newlines of LLaVA-NeXT) stay equal: among them a method takes the first.
    """

    def moved(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        values = values.detach()
        noise = torch.sin(1e5 * values + torch.arange(values.shape[-1]) * (values.ndim > 2))
        return values * (1 + NUDGE * noise)

    names = ("hidden_RND", "attention_BN", "row_keys_RND", "cls_attention_BN", "cls_keys_BND")
    with torch.no_grad():
        others: dict[str, Any] = {name: moved(getattr(context, name)) for name in names}
        other_context = replace(context, **others)
        nudged = moved(visual_BND)
        assert nudged is not None
        other = method(nudged, grid, other_context)
    if other.hidden_BMD.shape != kept.hidden_BMD.shape or not torch.equal(other.positions_ABM, kept.positions_ABM):
        return True
    if kept.sources_BM is not None and not torch.equal(other.sources_BM, kept.sources_BM):
        return True
    scale = max(1.0, float(visual_BND.detach().abs().max()))
    return float((other.hidden_BMD - kept.hidden_BMD).detach().abs().max()) > 300 * NUDGE * scale


def run_layers(
    language_model: Any, state: RowState, first: int, last: int, needs: set[str]
) -> tuple[RowState, dict[str, Tensor]]:
    """Return one row through layers `first` to `last` (half open) of a plain language model.

    Returns:
        The row after them, and what the last of them saw, as far as it is needed: `attention` (tokens x tokens, mean
        over heads) and `keys` (tokens x heads side by side).
    """
    cache = DynamicCache() if "keys" in needs else None
    maps: list[Tensor] = []
    count = len(state.sizes)
    positions = state.positions_AN.unsqueeze(1) if len(state.positions_AN) > 1 else state.positions_AN
    extras = state.extras if first == 0 and len(state.origins) == len(state.sees_NN) else {}
    with only_layers(language_model, first, last) as layers:
        handles = []
        if "queries" in needs:
            attention = next(child for name, child in layers[-1].named_children() if "attn" in name)
            handles.append(attention.register_forward_hook(lambda _, args, output: maps.append(output[1])))
        try:
            output = language_model(
                inputs_embeds=state.hidden_ND.unsqueeze(0),
                attention_mask=_mask(language_model.config, state),
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                **extras,
            )
        finally:
            for handle in handles:
                handle.remove()
    seen = {}
    if maps:
        seen["attention"] = maps[0][0].float().mean(0).detach()
    if cache is not None:
        seen["keys"] = cache.layers[last - 1].keys[0].transpose(0, 1).reshape(count, -1).detach()
    return replace(state, hidden_ND=output.last_hidden_state[0]), seen


@contextmanager
def only_layers(language_model: Any, first: int, last: int) -> Iterator[list[nn.Module]]:
    """Within the block a language model consists of some of its layers; the final norm belongs to the last."""
    layers, norm, config = language_model.layers, language_model.norm, language_model.config
    kinds = getattr(config, "layer_types", None)
    try:
        language_model.layers = nn.ModuleList(list(layers)[first:last])
        if last != len(layers):
            language_model.norm = nn.Identity()
        if kinds:
            language_model.config = copy.copy(config)
            language_model.config.layer_types = [*kinds[first:], *kinds[:first]]
        yield list(layers)[first:last]
    finally:
        language_model.layers, language_model.norm, language_model.config = layers, norm, config


def _mask(config: Any, state: RowState) -> Any:
    """Return who sees whom among the tokens that are left, as additive masks; by kind of layer where there are
    several.
    """
    count = len(state.sizes)
    causal_NN = torch.ones(count, count, dtype=torch.bool).tril()
    origin_N = torch.tensor(state.origins).clamp(min=0)
    there_N = torch.tensor(state.origins) >= 0
    seen_NN = state.sees_NN[origin_N][:, origin_N] & there_N & there_N.unsqueeze(1)
    both_NN = seen_NN & seen_NN.T
    bias_N = torch.tensor(state.sizes).clamp(min=1).float().log() if state.size_bias else torch.zeros(count)

    def additive(visible_NN: Tensor) -> Tensor:
        return torch.where(visible_NN, bias_N, torch.finfo(torch.float32).min)[None, None]

    full_NN = causal_NN | both_NN
    window = getattr(config, "sliding_window", None)
    place_N = torch.arange(count)
    near_NN = place_N.unsqueeze(1) - place_N < (window or count)
    sliding_NN = full_NN & near_NN if state.window_cuts else (causal_NN & near_NN) | both_NN
    if state.ready_made or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return {"full_attention": additive(full_NN), "sliding_attention": additive(sliding_NN)}
    return additive(sliding_NN if window and not getattr(config, "layer_types", None) else full_NN)
