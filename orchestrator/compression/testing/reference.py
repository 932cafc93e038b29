"""The plain computation the mechanism is held against: one row at a time without padding, eager attention, own masks.

It shares with the mechanism the model's layers and the method itself, nothing else: no layout, batching, padding,
cache, recorder or label arithmetic. The method gets the images of one row and one grid at a time, so what it makes of
them cannot depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from orchestrator.compression.attach import MODULES_NAME
from orchestrator.compression.families import Family
from orchestrator.compression.forward.apply_point import kept_by
from orchestrator.compression.protocol import IGNORED, Context, Enters, Kept, Point, Resizes
from orchestrator.compression.testing.method import Call, one_of, with_values
from orchestrator.spec.components import Grid

_OWN = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "input_ids", "use_cache")


@dataclass(frozen=True)
class Unit:
    """An image, tile or frame of one row: its grid and where its tokens stand."""

    grid: Grid
    columns: tuple[int, ...]


@dataclass(frozen=True)
class RowState:
    """One row on its way through the decoder, N tokens without padding.

    Attributes:
        number: Row of the batch.
        hidden_ND: Hidden states.
        positions_AN: Position ids, A axes.
        sizes: How many first visual tokens each token stands for.
        origins: Column of each token in the row as it came in (padding not counted); -1 for an added one.
        labels: Label of each token.
        units: Images, tiles and frames in order.
        sees_NN: Who sees whom in the plain model, by original column.
        window_cuts: In the plain model a sliding window also ends what tokens of one image see of each other.
        sliding_NN: Who sees whom in its sliding layers if there were no window, by original column.
        ready_made: The plain model hands its decoder ready-made masks.
        size_bias: Attention logits of a key are raised by the logarithm of its size.
        extras: Further keyword arguments for the first layers (features that enter there).
        cls_N: What the tower's CLS token paid to each visual token, by original column; None where it is not needed.
        cls_keys_Nd: Their keys in the tower, likewise.
        held: Places of tokens that layers make keys and values of, and leave as they are.
    """

    number: int
    hidden_ND: Tensor
    positions_AN: Tensor
    sizes: tuple[int, ...]
    origins: tuple[int, ...]
    labels: tuple[int, ...]
    units: tuple[Unit, ...]
    sees_NN: Tensor
    sliding_NN: Tensor
    window_cuts: bool = True
    ready_made: bool = False
    size_bias: bool = False
    extras: Mapping[str, Any] = field(default_factory=dict)
    cls_N: Tensor | None = None
    cls_keys_Nd: Tensor | None = None
    held: frozenset[int] = frozenset()

    @property
    def visual(self) -> frozenset[int]:
        """Places of all visual tokens."""
        return frozenset(column for unit in self.units for column in unit.columns)


class Reached(Exception):
    """What was to be seen of a forward was seen; nothing after it is of interest."""


def decoder_inputs(model: nn.Module, language_model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments with which a plain model calls its language model for a batch."""
    seen: dict[str, Any] = {}

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise Reached

    _run_until_reached(model, batch, [language_model.register_forward_pre_hook(stop, with_kwargs=True)])
    return {name: value for name, value in seen.items() if value is not None}


def _run_until_reached(model: Any, batch: Mapping[str, Any], handles: Sequence[RemovableHandle]) -> None:
    """Run a plain model on a batch until a hook raises `Reached`, then remove the hooks."""
    with ExitStack() as hooks, suppress(Reached):
        for handle in handles:
            hooks.enter_context(handle)
        model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)


def take_rows(family: Family, batch: Mapping[str, Any], units: Sequence[Sequence[Grid]]) -> list[RowState]:
    """Return the rows of a batch at the decoder's input.

    Args:
        family: Adapter of a plain model; only its language model and its placeholders are asked for.
        batch: Keyword arguments of the model's forward.
        units: For each row the grids of its images, tiles and frames, in order.
    """
    given = decoder_inputs(family.model, family.language_model, batch)
    embeds_BND = given["inputs_embeds"]
    rows, columns = embeds_BND.shape[:2]
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(columns)
    positions_ABN = positions if positions.ndim == 3 else positions.expand(rows, columns).unsqueeze(0)
    visual_BN = family.visual_BN(batch["input_ids"])
    labels_BN = batch.get("labels", torch.full((rows, columns), IGNORED)).masked_fill(visual_BN, IGNORED)
    mask = given.get("attention_mask")
    states = []
    for row in range(rows):
        real_N = batch["attention_mask"][row].bool() if "attention_mask" in batch else torch.ones(columns).bool()
        count = int(real_N.sum())
        sees_NN, sliding_NN, window_cuts = _plain_mask(mask, row, real_N)
        states.append(
            RowState(
                number=row,
                hidden_ND=embeds_BND[row, real_N],
                # The row alone begins at 0, whatever padding stood before it: attention knows only distances.
                positions_AN=positions_ABN[:, row, real_N] - positions_ABN[:, row, real_N].amin(),
                sizes=(1,) * count,
                origins=tuple(range(count)),
                labels=tuple(labels_BN[row, real_N].tolist()),
                units=_units(visual_BN[row, real_N].tolist(), units[row], row),
                sees_NN=sees_NN,
                sliding_NN=sliding_NN,
                window_cuts=window_cuts,
                ready_made=isinstance(mask, dict),
                extras=_extras(given, row, real_N),
            )
        )
    return states


def _units(visual: Sequence[bool], grids: Sequence[Grid], row: int) -> tuple[Unit, ...]:
    columns = [column for column, seen in enumerate(visual) if seen]
    wanted = sum(grid.tokens for grid in grids)
    if len(columns) != wanted:
        raise AssertionError(
            f"row {row} holds {len(columns)} placeholders, but TinyFamily.units says its images become {wanted} tokens"
        )
    found = []
    for grid in grids:
        found.append(Unit(grid, tuple(columns[: grid.tokens])))
        columns = columns[grid.tokens :]
    return tuple(found)


def _plain_mask(mask: Any, row: int, real_N: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return who sees whom in a row, likewise in sliding layers if there were no window, and whether a sliding window
    cuts what tokens of one block see.
    """
    count = int(real_N.sum())
    causal_NN = torch.ones(count, count, dtype=torch.bool).tril()
    full = mask.get("full_attention") if isinstance(mask, dict) else mask
    sees_NN = causal_NN if not isinstance(full, Tensor) or full.ndim != 4 else _row_of(full, row, real_N)
    sliding = mask.get("sliding_attention") if isinstance(mask, dict) else None
    if not isinstance(sliding, Tensor):
        return sees_NN, sees_NN, True
    cut_NN = _row_of(sliding, row, real_N)
    sliding_NN = causal_NN | cut_NN  # no window cuts what a token sees of those after it
    both_NN = sliding_NN & sliding_NN.T & ~torch.eye(count, dtype=torch.bool)
    return sees_NN, sliding_NN, bool((both_NN & ~cut_NN).any()) or not bool(both_NN.any())


def _row_of(mask_B1NN: Tensor, row: int, real_N: Tensor) -> Tensor:
    mask_NN = mask_B1NN[min(row, len(mask_B1NN) - 1), 0][real_N][:, real_N]
    return mask_NN if mask_NN.dtype == torch.bool else mask_NN > -1


def _extras(given: Mapping[str, Any], row: int, real_N: Tensor) -> dict[str, Any]:
    """Return a row's part of the decoder's other arguments by token, or by visual token (several beside a mask)."""
    shape = given["inputs_embeds"].shape[:2]
    masks = [
        one.flatten(1)
        for one in given.values()
        if isinstance(one, Tensor) and one.dtype == torch.bool and one.shape in (shape, (*shape, 1))
    ]
    extras: dict[str, Any] = {}
    for name, value in given.items():
        if name in _OWN or isinstance(value, bool | int | str):
            continue
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            extras[name] = value[row : row + 1, real_N]
        elif isinstance(value, list | tuple) and masks and all(isinstance(one, Tensor) for one in value):
            own = masks[0].nonzero()[:, 0] == row
            extras[name] = [one[own] for one in value]
        elif isinstance(value, dict) and masks and all(isinstance(one, Tensor) for one in value.values()):
            own = masks[0].nonzero()[:, 0] == row
            extras[name] = {layer: one[own] for layer, one in value.items()}
    return extras


class _Token(NamedTuple):
    """What a row holds at one place."""

    hidden_D: Tensor
    position_A: Tensor
    size: int
    origin: int
    label: int
    held: bool = False


def spliced(state: RowState, parts: Sequence[tuple[Unit, Any]]) -> RowState:
    """Return the row with what is left of each unit in its place.

    Args:
        state: The row before.
        parts: Each unit that changes, with what a method kept of it alone (`Kept` of one image).
    """
    kept_of = {unit.columns: kept for unit, kept in parts}
    unit_at = {column: unit for unit in state.units for column in unit.columns}
    places: dict[tuple[int, ...], list[int]] = {unit.columns: [] for unit in state.units}
    tokens: list[_Token] = []
    moved = 0
    for column in range(len(state.origins)):
        unit = unit_at.get(column)
        if unit is None or unit.columns not in kept_of:
            position_A = state.positions_AN[:, column] + moved
            facts = state.sizes[column], state.origins[column], state.labels[column], column in state.held
            found = [_Token(state.hidden_ND[column], position_A, *facts)]
        else:
            kept = kept_of[unit.columns]
            if column == unit.columns[0]:
                moved += kept.before
            found = _kept_at(state, unit, kept, column, moved)
            if column == unit.columns[-1]:
                moved += max(0, kept.hidden_BMD.shape[1] - kept.before - len(unit.columns))
        if unit is not None:
            places[unit.columns] += range(len(tokens), len(tokens) + len(found))
        tokens += found
    units = []
    for unit in state.units:
        kept = kept_of.get(unit.columns)
        grid = unit.grid if kept is None else grid_left(kept, unit.grid)
        units.append(Unit(grid, tuple(places[unit.columns])))
    positions_AN = torch.stack([token.position_A for token in tokens], dim=1)
    if any(kept.renumber for _, kept in parts):
        positions_AN = positions_AN.amin(1, keepdim=True) + torch.arange(len(tokens))
    return replace(
        state,
        hidden_ND=torch.stack([token.hidden_D for token in tokens]),
        positions_AN=positions_AN,
        sizes=tuple(token.size for token in tokens),
        origins=tuple(token.origin for token in tokens),
        labels=tuple(token.label for token in tokens),
        units=tuple(units),
        size_bias=state.size_bias or any(kept.size_bias for _, kept in parts),
        held=frozenset(place for place, token in enumerate(tokens) if token.held),
    )


def held_back(state: RowState, parts: Sequence[tuple[Unit, Any]]) -> RowState:
    """Return the row with what is left of each unit where its source stood; its other tokens stay, and are held."""
    kept_at: dict[int, tuple[Unit, Any, int]] = {}
    held, units = set(state.held), []
    kept_of = {unit.columns: kept for unit, kept in parts}
    for unit in state.units:
        kept = kept_of.get(unit.columns)
        if kept is None:
            units.append(unit)
            continue
        sources = [source_of(kept, m, len(unit.columns)) for m in range(kept.hidden_BMD.shape[1])]
        columns = tuple(unit.columns[source] for source in sources)
        kept_at |= {column: (unit, kept, m) for m, column in enumerate(columns)}
        held |= set(unit.columns) - set(columns)
        units.append(Unit(grid_left(kept, unit.grid), columns))
    tokens = [
        _kept_token(state, *kept_at[column], 0)
        if column in kept_at
        else _Token(state.hidden_ND[column], state.positions_AN[:, column], size, state.origins[column], label)
        for column, (size, label) in enumerate(zip(state.sizes, state.labels, strict=True))
    ]
    return replace(
        state,
        hidden_ND=torch.stack([token.hidden_D for token in tokens]),
        positions_AN=torch.stack([token.position_A for token in tokens], dim=1),
        sizes=tuple(token.size for token in tokens),
        units=tuple(units),
        held=frozenset(held),
    )


def _text_of(state: RowState) -> RowState:
    """Return a row without its visual tokens."""
    columns = [column for column in range(len(state.origins)) if column not in state.visual]
    return replace(
        state,
        hidden_ND=state.hidden_ND[columns],
        positions_AN=state.positions_AN[:, columns],
        sizes=tuple(state.sizes[column] for column in columns),
        origins=tuple(state.origins[column] for column in columns),
        labels=tuple(state.labels[column] for column in columns),
        units=(),
    )


def _with_visual(text: RowState, whole: RowState) -> RowState:
    """Return a whole row whose text is that of a row of text alone."""
    now = iter(text.hidden_ND)
    tokens = [whole.hidden_ND[n] if n in whole.visual else next(now) for n in range(len(whole.origins))]
    return replace(whole, hidden_ND=torch.stack(tokens))


def _videos(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Return the units of a row with the frames of each video as one."""
    found: list[Unit] = []
    for unit in units:
        before = [one for one in found if len(one.columns) > 1]
        if unit.grid.frame and len(unit.columns) > 1:
            video = before[-1]
            frames, shape = video.grid.frames + 1, unit.grid
            assert unit.grid.frame == frames - 1 and video.grid.width == shape.width, "a frame without its video"
            columns = video.columns + unit.columns
            found[found.index(video)] = Unit(Grid(shape.height * frames, shape.width, frames), columns)
        else:
            found.append(unit)
    return tuple(found)


def _frames(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Return the units of a row with each frame of a video by itself."""
    found: list[Unit] = []
    for unit in units:
        frames, each = unit.grid.frames, len(unit.columns) // unit.grid.frames
        for number in range(frames):
            grid = unit.grid if frames == 1 else Grid(unit.grid.height // frames, unit.grid.width, 1, number)
            found.append(Unit(grid, unit.columns[number * each : (number + 1) * each]))
    return tuple(found)


def _kept_at(state: RowState, unit: Unit, kept: Any, column: int, moved: int) -> list[_Token]:
    """Return the kept tokens that stand where a unit's token was; added ones stand by its first or its last."""
    place, tokens, count = unit.columns.index(column), len(unit.columns), kept.hidden_BMD.shape[1] - kept.before
    chosen = [m + kept.before for m in range(min(count, tokens)) if m * tokens // min(count, tokens) == place]
    if kept.in_place:
        return [_kept_token(state, unit, kept, m, moved) for m in range(count) if source_of(kept, m, tokens) == place]
    if place == 0:
        chosen = [*range(kept.before), *chosen]
    if place == tokens - 1:
        chosen += range(kept.before + tokens, kept.before + count)
    return [_kept_token(state, unit, kept, m, moved) for m in chosen]


def _kept_token(state: RowState, unit: Unit, kept: Any, m: int, moved: int) -> _Token:
    source = source_of(kept, m, len(unit.columns))
    origin = state.origins[unit.columns[source]] if source >= 0 else -1
    position_A = kept.positions_ABM[:, 0, m] + moved
    return _Token(kept.hidden_BMD[0, m], position_A, int(kept.sizes_BM[0, m]), origin, IGNORED)


def source_of(kept: Any, m: int, tokens: int, image: int = 0) -> int:
    """Return the token of an image that its kept token `m` stands in place of; -1 for a new one."""
    count = kept.hidden_BMD.shape[1]
    if kept.sources_BM is not None:
        return int(kept.sources_BM[image, m])
    if count > tokens:
        return m if m < tokens else -1
    return m * tokens // count


def grid_left(kept: Any, grid: Grid) -> Grid:
    """Return the grid that is left of an image's; where a method names none, one row, unless it kept all."""
    count = kept.hidden_BMD.shape[1]
    return kept.grid or (grid if count == grid.tokens else Grid(1, count))


@contextmanager
def watched(family: Family, needed: bool) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect, if it is needed, attention maps (images x heads x tokens x tokens) and keys (images x tokens x heads
    side by side) of the calls of the tower's last used attention within the block, images in the order of the batch.
    """
    maps: list[Tensor] = []
    keys: list[Tensor] = []
    with ExitStack() as hooks:
        if needed:
            attention = family.cls_attention()
            hooks.enter_context(attention.register_forward_hook(lambda _, args, output: maps.append(output[1])))
            hooks.enter_context(attention.k_proj.register_forward_hook(lambda _, args, output: keys.append(output)))
        yield maps, keys


def with_cls(states: Sequence[RowState], maps: Sequence[Tensor], keys: Sequence[Tensor]) -> list[RowState]:
    """Return the rows with what the CLS token paid to each visual token and its key, mean over heads, by original
    column.
    """
    if not maps:
        return list(states)
    maps_IHTT, keys_ITD = torch.cat(list(maps)).detach(), torch.cat(list(keys)).detach()
    heads = maps_IHTT.shape[1]
    keys_ITd = keys_ITD.unflatten(2, (heads, -1)).mean(2)
    number, done = 0, []
    for state in states:
        attention_N = torch.zeros(len(state.sizes))
        keys_Nd = torch.zeros(len(state.sizes), keys_ITd.shape[2])
        for unit in state.units:
            if len(unit.columns) == 1:
                continue
            tokens, columns = len(unit.columns), list(unit.columns)
            attention_N[columns] = maps_IHTT[number, :, 0].mean(0)[-tokens:]
            keys_Nd[columns] = keys_ITd[number, -tokens:]
            number += 1
        done.append(replace(state, cls_N=attention_N, cls_keys_Nd=keys_Nd))
    if number != len(maps_IHTT):
        raise AssertionError(f"the tower ran {len(maps_IHTT)} images, the rows hold {number}")
    return done


Apply = Callable[[Point, Tensor, Grid, Context], Kept]


def tower_features(family: Family, batch: Mapping[str, Any], resize: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return the projector's input in a plain model for a batch: features of all images, one after the other.

    Args:
        family: Adapter of the plain model.
        batch: Keyword arguments of the model's forward.
        resize: What makes the pixels smaller first, or None.
    """
    seen: list[Tensor] = []

    def smaller(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert resize is not None
        given = {"pixel_values": args[0]} if args else {}
        given |= kwargs
        return (), given | {"pixel_values": resize(given["pixel_values"]), "interpolate_pos_encoding": True}

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise Reached

    projector = family.projector
    assert projector is not None
    handles = [projector.register_forward_pre_hook(stop)]
    if resize is not None:
        tower = family.resizable_tower
        assert tower is not None
        handles.append(tower.register_forward_pre_hook(smaller, with_kwargs=True))
    _run_until_reached(family.model, batch, handles)
    return seen[0].flatten(0, -2) if seen else torch.zeros(0, 0)


def before_projector(
    family: Family, batch: Mapping[str, Any], states: Sequence[RowState], points: Sequence[Point], apply: Apply
) -> list[RowState]:
    """Return the rows at the decoder's input after the points in the vision tower and at the projector.

    Args:
        family: Adapter of the plain model.
        batch: Keyword arguments of the model's forward.
        states: The rows as the plain model makes them.
        points: The points before the decoder, in their order.
        apply: Calls a method: point, features (units x tokens x width), grid, context without a module.
    """
    if not any(state.units for state in states):
        return list(states)
    whole_LD = tower_features(family, batch, None)
    projector: Any = family.projector
    factor = _factor(states, projector(whole_LD.unsqueeze(0))[0])
    resizing = [point.compressor for point in points if isinstance(point.compressor, Resizes)]
    features_LD = whole_LD
    if resizing:
        grid = next(unit.grid for state in states for unit in state.units)
        features_LD = tower_features(family, batch, lambda pixels: resizing[0].resize(pixels, grid))
    share = len(features_LD) / len(whole_LD)
    inside = [point for point in points if point.tower_layer is not None]
    behind = [point for point in points if point.tower_layer is None]
    entering_ITD = _entering_tower(family, batch) if inside else None
    offset, done = 0, []
    for state in states:
        start_of = {}
        for unit in state.units:
            start_of[unit.columns] = offset
            offset += len(unit.columns)
        parts: list[tuple[Unit, Kept]] = []
        for grid in dict.fromkeys(unit.grid for unit in state.units):
            members = [unit for unit in state.units if unit.grid == grid]
            starts = [start_of[unit.columns] for unit in members]
            visual_BND = torch.stack(
                [features_LD[round(share * start) : round(share * (start + grid.tokens))] for start in starts]
            )
            whole = _whole(members, visual_BND)
            if entering_ITD is not None:
                own_BTD = entering_ITD[[start // grid.tokens for start in starts]]
                whole = _through_tower(family, state, members, own_BTD, whole, inside, apply)
            parts += _kept(state, members, whole, behind, apply)
        mapped = [(unit, _mapped(state, unit, kept, projector, factor)) for unit, kept in parts]
        done.append(spliced(state, mapped) if mapped else state)
    return done


def _entering_tower(family: Family, batch: Mapping[str, Any]) -> Tensor:
    """Return what enters the vision tower's first layer in a plain model: images x tokens x width."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise Reached

    _run_until_reached(family.model, batch, [family.tower.encoder.layers[0].register_forward_pre_hook(stop)])
    return seen[0]


def _through_tower(
    family: Family,
    state: RowState,
    members: Sequence[Unit],
    hidden_BTD: Tensor,
    whole: Sequence[Kept],
    points: Sequence[Point],
    apply: Apply,
) -> list[Kept]:
    """Return a row's images of one grid behind the tower: its layers are written out, points act between and in them.

    Which hidden states the projector takes follows from the config: those of `vision_feature_layer`, else the last one
    after the tower's final norm.

    Args:
        family: Adapter of the plain model.
        state: The row.
        members: Its images.
        hidden_BTD: What enters the tower's first layer of them.
        whole: All their patches.
        points: The points in the tower.
        apply: Calls a method.
    """
    left, front = list(whole), hidden_BTD.shape[1] - len(members[0].columns)
    encoder = family.tower.encoder
    hidden_states = [hidden_BTD]
    keys_BTD: Tensor | None = None

    def act(number: int, inside: bool, hidden_BTD: Tensor, left: list[Kept]) -> tuple[Tensor, list[Kept]]:
        for point in points:
            if (point.tower_layer, point.inside_layer) == (number, inside):
                keys_BND = None
                if keys_BTD is not None and "tower_keys" in point.spec.needs:
                    heads = encoder.layers[number].self_attn.num_heads
                    keys_BND = keys_BTD[:, front:].unflatten(2, (heads, -1)).mean(2)
                left = [replace(one, hidden_BMD=hidden_BTD[n : n + 1, front:]) for n, one in enumerate(left)]
                grid = left[0].grid
                assert grid is not None
                left = _one_point(state, members, point, left, grid, apply, keys_BND)
                hidden_BTD = torch.cat([hidden_BTD[:, :front], torch.cat([one.hidden_BMD for one in left])], 1)
        return hidden_BTD, left

    for number, layer in enumerate(encoder.layers):
        hidden_BTD, left = act(number, False, hidden_BTD, left)
        mask = None
        if left[0].size_bias:
            sizes_BM = torch.cat([one.sizes_BM for one in left])
            sizes_BT = torch.cat([torch.ones(len(hidden_BTD), front, dtype=torch.long), sizes_BM], 1)
            mask = sizes_BT.float().log()[:, None, None, :]
        seen: list[Tensor] = []
        handle = layer.self_attn.k_proj.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
        try:  # a block, written out
            normed_BTD = layer.layer_norm1(hidden_BTD)
            hidden_BTD = hidden_BTD + layer.self_attn(hidden_states=normed_BTD, attention_mask=mask)[0]
        finally:
            handle.remove()
        keys_BTD = seen[0].detach()
        hidden_BTD, left = act(number, True, hidden_BTD, left)
        hidden_BTD = hidden_BTD + layer.mlp(layer.layer_norm2(hidden_BTD))
        hidden_states.append(hidden_BTD)
    config: Any = family.model.config
    wanted = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    if wanted is None:
        tower = family.model.model.vision_tower
        features = [getattr(tower, "vision_model", tower).post_layernorm(hidden_states[-1])]
    else:
        features = [hidden_states[layer] for layer in (wanted if isinstance(wanted, list | tuple) else [wanted])]
    features_BMD = torch.cat(features, -1)[:, front:]
    return [replace(one, hidden_BMD=features_BMD[n : n + 1]) for n, one in enumerate(left)]


def _factor(states: Sequence[RowState], projected_LD: Tensor) -> float:
    """Return the factor of the projector's output before the decoder in the plain model (1 in most)."""
    embeds_LD = torch.cat([state.hidden_ND[list(unit.columns)] for state in states for unit in state.units])
    if embeds_LD.shape != projected_LD.shape:
        raise AssertionError(
            f"the projector gives {tuple(projected_LD.shape)} features, the rows hold {tuple(embeds_LD.shape)}"
        )
    factor = float(((embeds_LD * projected_LD).sum() / projected_LD.square().sum()).detach())
    if not torch.allclose(embeds_LD, factor * projected_LD, atol=1e-4):
        raise AssertionError("visual tokens at the decoder's input are no multiple of what the projector gives")
    return factor


def _whole(members: Sequence[Unit], visual_BND: Tensor) -> list[Kept]:
    """Return all tokens of a row's units of one grid, unit by unit; positions and sources count in the unit."""
    images, tokens = len(members), len(members[0].columns)
    place_BN = torch.arange(tokens).expand(images, -1)
    kept = Kept(visual_BND, place_BN.unsqueeze(0), torch.ones_like(place_BN), place_BN, members[0].grid)
    return [one_of(kept, image) for image in range(images)]


def _kept(
    state: RowState, members: Sequence[Unit], whole: Sequence[Kept], points: Sequence[Point], apply: Apply
) -> list[tuple[Unit, Kept]]:
    """Return the tokens that points leave of a row's units of one grid, unit by unit."""
    images, left = len(members), list(whole)
    for point in points:
        # Units that an adaptive method left unequal are no longer one grid's.
        for grid in dict.fromkeys(one.grid for one in left):
            assert grid is not None
            alike = [image for image in range(images) if left[image].grid == grid]
            done = _one_point(state, [members[image] for image in alike], point, [left[i] for i in alike], grid, apply)
            for image, one in zip(alike, done, strict=True):
                left[image] = one
    return list(zip(members, left, strict=True))


def _one_point(
    state: RowState,
    members: Sequence[Unit],
    point: Point,
    before: Sequence[Kept],
    grid: Grid,
    apply: Apply,
    keys_BND: Tensor | None = None,
) -> list[Kept]:
    """Return what one point leaves of some units of a grid, unit by unit, of what the points before it left."""
    images = len(members)
    context = Context(
        layer=0,
        positions_ABN=torch.cat([one.positions_ABM for one in before], dim=1),
        sizes_BN=torch.cat([one.sizes_BM for one in before]),
        rows_B=torch.zeros(images, dtype=torch.long),
        sample_indices=(state.number,) * images,
        tower_keys_BND=keys_BND,
    )
    context = _with_cls(context, point, state, torch.tensor([unit.columns for unit in members]))
    kept = apply(point, torch.cat([one.hidden_BMD for one in before]), grid, context)
    done = []
    for image, old in enumerate(before):
        one = one_of(kept, image)
        assert old.sources_BM is not None
        sources = [source_of(one, m, old.positions_ABM.shape[2]) for m in range(one.hidden_BMD.shape[1])]
        done.append(
            replace(
                one,
                grid=grid_left(one, grid),
                sources_BM=old.sources_BM[:, sources],
                renumber=one.renumber or old.renumber,
                size_bias=one.size_bias or old.size_bias,
            )
        )
    return done


def _with_cls(context: Context, point: Point, state: RowState, origins_BN: Tensor) -> Context:
    """Return a context with what the CLS token saw of tokens of these original columns, if the point needs it."""
    if "cls" not in point.spec.needs or state.cls_N is None or state.cls_keys_Nd is None:
        return context
    return replace(context, cls_attention_BN=state.cls_N[origins_BN], cls_keys_BND=state.cls_keys_Nd[origins_BN])


def _mapped(state: RowState, unit: Unit, kept: Kept, projector: Any, factor: float) -> Kept:
    """Return the decoder's input of one unit."""
    positions_AN = state.positions_AN[:, list(unit.columns)]
    return replace(
        kept,
        hidden_BMD=factor * projector(kept.hidden_BMD),
        positions_ABM=positions_AN[:, kept.positions_ABM[0, 0]].unsqueeze(1),
    )


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
        with watched(self.family, any("cls" in point.spec.needs for point in points)) as (maps, keys):
            states = take_rows(self.family, batch, units)
        states = with_cls(states, maps, keys)
        before = [point for point in points if point.before_decoder]
        if before:
            states = before_projector(self.family, batch, states, before, self._at_projector)
        inside = [point for point in points if not point.before_decoder]
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

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradients of all parameters by name, learned modules under their names in an attached model."""
        model: nn.Module = self.family.model
        learned = nn.ModuleDict({MODULES_NAME: nn.ModuleDict(self.modules)})
        learned.zero_grad()
        found = gradients(model, loss)
        model.zero_grad()
        return found | {name: one.grad.clone() for name, one in learned.named_parameters() if one.grad is not None}

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """Return the top model's logits of final hidden states."""
        logits_NV: Tensor = self.family.model.get_output_embeddings()(hidden_ND)
        config = self.family.model.config
        if config.model_type == "granite4_vision":  # a Granite in another top model is not scaled
            logits_NV = logits_NV / config.text_config.logits_scaling
        cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    def _through(self, state: RowState, points: Sequence[Point]) -> RowState:
        num_layers = self.family.num_layers
        waiting = [*points]
        late = [point for point in points if point.spec.enters_late and point.layer > 0]
        whole = state
        start = 0
        while start < num_layers:
            if late and start == late[0].layer:
                state = _with_visual(state, whole)
            here = [point for point in waiting if point.layer <= start]
            for point in here:
                if hasattr(point.compressor, "compress"):
                    state = self._act(state, point)
            entering = [point for point in points if start == 0 and hasattr(point.compressor, "enter")]
            for point in entering:
                state = self._act(state, point, enters=True)
            if late and start == 0:
                # As layer 0 would have got them: a forward may scale its input.
                whole = run_layers(self.family.language_model, state, 0, 0, set())[0]
                state = _text_of(state)
            waiting = [point for point in waiting if point not in here]
            end = min((point.layer for point in waiting), default=num_layers)
            needs = {need for point in waiting if point.layer == end for need in point.spec.needs}
            state, self._seen = run_layers(self.family.language_model, state, start, end, needs)
            start = end
        return state

    def _act(self, state: RowState, point: Point, enters: bool = False) -> RowState:
        """Apply one point to one row: all its units of one grid at a time."""
        module = self.modules.get(point.module_name or "")
        if point.spec.across_frames:
            state = replace(state, units=_videos(state.units))
        parts: list[tuple[Unit, Kept]] = []
        units = [unit for unit in state.units if len(unit.columns) > 1 or point.spec.keeps_none]
        for grid in dict.fromkeys(unit.grid for unit in units):
            members = [unit for unit in units if unit.grid == grid]
            context = self._context(state, point, members, module)
            visual_BND = torch.stack([state.hidden_ND[list(unit.columns)] for unit in members])
            compressor = point.compressor
            method = compressor.enter if enters and isinstance(compressor, Enters) else compressor.compress
            kept = self._call(point, method, visual_BND, grid, context)
            parts += [(unit, one_of(kept, number)) for number, unit in enumerate(members)]
        if parts:
            state = held_back(state, parts) if point.spec.keys_only else spliced(state, parts)
        return replace(state, units=_frames(state.units)) if point.spec.across_frames else state

    def _at_projector(self, point: Point, visual_BND: Tensor, grid: Grid, context: Context) -> Kept:
        samples = tuple(sample_of(row) for row in context.sample_indices)
        module = self.modules.get(point.module_name or "")
        context = replace(context, seed=_SEED, step=_STEP, sample_indices=samples, module=module)
        return self._call(point, point.compressor.compress, visual_BND, grid, context)

    def _call(self, point: Point, method: Any, visual_BND: Tensor, grid: Grid, context: Context) -> Kept:
        kept = kept_by(point, method, visual_BND, grid, context)
        self.calls.append(Call(point.spec, method, visual_BND, grid, context, kept))
        self.unstable = self.unstable or is_unstable(method, visual_BND, grid, context, kept)
        return kept

    def _context(self, state: RowState, point: Point, members: Sequence[Unit], module: nn.Module | None) -> Context:
        columns_BN = torch.tensor([unit.columns for unit in members])
        sizes_N = torch.tensor(state.sizes)
        other = state.visual | state.held
        text = [place not in other and state.labels[place] == IGNORED for place in range(len(state.sizes))]
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
        return _with_cls(context, point, state, torch.tensor(state.origins)[columns_BN])


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


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all parameters by name."""
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def is_unstable(method: Any, visual_BND: Tensor, grid: Grid, context: Context, kept: Kept) -> bool:
    """Return whether a method chooses otherwise when all it looks at is moved by `NUDGE`: a near-tie.

    Two exact computations differ in their last bits, so a selection on a near-tie may go either way in them. Tokens
    that are equal (the newlines of LLaVA-NeXT) stay equal: among them a method takes the first.
    """

    def moved(values: Tensor) -> Tensor:
        values = values.detach()
        noise = torch.sin(1e5 * values + torch.arange(values.shape[-1]) * (values.ndim > 2))
        return values * (1 + NUDGE * noise)

    if not kept.hidden_BMD.numel():
        return False
    with torch.no_grad():
        other = method(moved(visual_BND), grid, with_values(context, moved))
    if kept.counts_B is not None and (other.counts_B is None or not torch.equal(other.counts_B, kept.counts_B)):
        return True
    if other.hidden_BMD.shape != kept.hidden_BMD.shape or not torch.equal(other.positions_ABM, kept.positions_ABM):
        return True
    if kept.sources_BM is not None and not torch.equal(other.sources_BM, kept.sources_BM):
        return True
    scale = max(1.0, float(visual_BND.detach().abs().max()))
    return float((other.hidden_BMD - kept.hidden_BMD).detach().abs().max()) > 300 * NUDGE * scale


def run_layers(
    language_model: Any, state: RowState, first: int, last: int, needs: set[str]
) -> tuple[RowState, dict[str, Tensor]]:
    """Run one row through layers `first` to `last` (half open) of a plain language model.

    Returns:
        The row after them, and what the last of them saw, as far as it is needed: `attention` (tokens x tokens, mean
        over heads) and `keys` (tokens x heads side by side).
    """
    kinds = set(getattr(language_model.config, "layer_types", None) or ())
    # A cache that knows the config keeps a window's keys alone, and layers without keys find no place in another.
    softmax = {"full_attention", "sliding_attention", "chunked_attention"}
    known = {"config": language_model.config} if kinds - softmax else {}
    cache = DynamicCache(**known) if "keys" in needs else None
    maps: list[Tensor] = []
    count = len(state.sizes)
    positions = state.positions_AN.unsqueeze(1) if len(state.positions_AN) > 1 else state.positions_AN
    extras = state.extras if first == 0 and len(state.origins) == len(state.sees_NN) else {}
    extras = {**extras, **_numbers_of_tokens(state)}
    layers = language_model.layers
    handles = []
    if "queries" in needs:
        attention = next(child for name, child in layers[last - 1].named_children() if "attn" in name)
        handles.append(attention.register_forward_hook(lambda _, args, output: maps.append(output[1])))
    if state.held:
        handles += [layer.register_forward_hook(_as_they_were(state), with_kwargs=True) for layer in layers[first:last]]
    try:
        with only_layers(layers, first, last, state.hidden_ND.unsqueeze(0)) as left:
            output = language_model(
                inputs_embeds=state.hidden_ND.unsqueeze(0),
                attention_mask=_mask(language_model.config, state),
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                **extras,
            )
            left.append(output.last_hidden_state)
    finally:
        for handle in handles:
            handle.remove()
    seen = {}
    if maps:
        seen["attention"] = maps[-1][0].float().mean(0).detach()
    if cache is not None:
        seen["keys"] = cache.layers[last - 1].keys[0].transpose(0, 1).reshape(count, -1).detach()
    return replace(state, hidden_ND=left[0][0]), seen


def _numbers_of_tokens(state: RowState) -> dict[str, Tensor]:
    """Return the arguments that hold a whole number for each token; a token that was added has 0."""
    origin_N = torch.tensor(state.origins)
    return {
        name: value[:, origin_N.clamp(min=0)] * (origin_N >= 0)
        for name, value in state.extras.items()
        if isinstance(value, Tensor) and value.ndim == 2 and value.dtype in (torch.int32, torch.int64)
    }


def _as_they_were(state: RowState) -> Callable[..., Any]:
    """Return a hook that gives a layer's held tokens the hidden states they had before it."""

    def restore(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before_1ND = args[0] if args else kwargs["hidden_states"]
        after_1ND = output[0] if isinstance(output, tuple) else output
        rows = [before_1ND[:, n] if n in state.held else after_1ND[:, n] for n in range(after_1ND.shape[1])]
        restored = torch.stack(rows, dim=1)
        return (restored, *output[1:]) if isinstance(output, tuple) else restored

    return restore


@contextmanager
def only_layers(layers: Sequence[nn.Module], first: int, last: int, hidden_1ND: Tensor) -> Iterator[list[Tensor]]:
    """Within the block a decoder's forward is one of some layers: the others' numbers and configuration stay theirs.

    Layers before `first` run on what the forward makes of its input, which is thrown away: layer `first` gets
    `hidden_1ND`. The forward ends where layer `last` would begin; what it would get is in the list that is yielded.
    """
    left: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden_1ND, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_1ND})

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        left.append(args[0] if args else kwargs["hidden_states"])
        raise Reached

    handles = []
    if first > 0:
        handles.append(layers[first].register_forward_pre_hook(enter, with_kwargs=True))
    if last < len(layers):
        handles.append(layers[last].register_forward_pre_hook(leave, with_kwargs=True))
    try:
        yield left
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _mask(config: Any, state: RowState) -> Any:
    """Return who sees whom among the tokens that are left, as additive masks; by kind of layer where there are
    several.
    """
    count = len(state.sizes)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"} and not state.ready_made and not state.size_bias:
        return torch.ones(1, count, dtype=torch.long)  # linear attention, convolutions, chunks: as the model has them
    causal_NN = torch.ones(count, count, dtype=torch.bool).tril()
    origin_N = torch.tensor(state.origins).clamp(min=0)
    there_N = torch.tensor(state.origins) >= 0

    def left(plain_NN: Tensor) -> Tensor:
        """Return what is left of who sees whom both ways."""
        seen_NN = plain_NN[origin_N][:, origin_N] & there_N & there_N.unsqueeze(1)
        return seen_NN & seen_NN.T

    both_NN = left(state.sliding_NN)
    bias_N = torch.tensor(state.sizes).clamp(min=1).float().log() if state.size_bias else torch.zeros(count)

    def additive(visible_NN: Tensor) -> Tensor:
        return torch.where(visible_NN, bias_N, torch.finfo(torch.float32).min)[None, None]

    full_NN = causal_NN | left(state.sees_NN)
    window = getattr(config, "sliding_window", None)
    place_N = torch.arange(count)
    near_NN = place_N.unsqueeze(1) - place_N < (window or count)
    sliding_NN = (causal_NN | both_NN) & near_NN if state.window_cuts else (causal_NN & near_NN) | both_NN
    if state.ready_made or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return {"full_attention": additive(full_NN), "sliding_attention": additive(sliding_NN)}
    return additive(sliding_NN if window and not getattr(config, "layer_types", None) else full_NN)
