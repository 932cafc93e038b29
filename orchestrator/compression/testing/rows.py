"""A batch as the plain model hands it to its decoder, taken apart into rows without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orchestrator.compression.families import Family
from orchestrator.compression.protocol import IGNORED
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
        ready_made: The plain model hands its decoder ready-made masks.
        size_bias: Attention logits of a key are raised by the logarithm of its size.
        extras: Further keyword arguments for the first layers (features that enter there).
        cls_N: What the tower's CLS token paid to each visual token, by original column; None where nobody asks.
        cls_keys_Nd: Their keys in the tower, likewise.
    """

    number: int
    hidden_ND: Tensor
    positions_AN: Tensor
    sizes: tuple[int, ...]
    origins: tuple[int, ...]
    labels: tuple[int, ...]
    units: tuple[Unit, ...]
    sees_NN: Tensor
    window_cuts: bool = True
    ready_made: bool = False
    size_bias: bool = False
    extras: Mapping[str, Any] = field(default_factory=dict)
    cls_N: Tensor | None = None
    cls_keys_Nd: Tensor | None = None

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

    handle = language_model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    except Reached:
        pass
    finally:
        handle.remove()
    return {name: value for name, value in seen.items() if value is not None}


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
        sees_NN, window_cuts = _plain_mask(mask, row, real_N)
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


def _plain_mask(mask: Any, row: int, real_N: Tensor) -> tuple[Tensor, bool]:
    """Return who sees whom in a row, and whether a sliding window cuts what tokens of one block see."""
    count = int(real_N.sum())
    causal_NN = torch.ones(count, count, dtype=torch.bool).tril()
    full = mask.get("full_attention") if isinstance(mask, dict) else mask
    sees_NN = causal_NN if not isinstance(full, Tensor) or full.ndim != 4 else _row_of(full, row, real_N)
    sliding = mask.get("sliding_attention") if isinstance(mask, dict) else None
    if not isinstance(sliding, Tensor):
        return sees_NN, True
    both_NN = sees_NN & sees_NN.T & ~torch.eye(count, dtype=torch.bool)
    lost_NN = both_NN & ~_row_of(sliding, row, real_N)
    return sees_NN, bool(lost_NN.any()) or not bool(both_NN.any())


def _row_of(mask_B1NN: Tensor, row: int, real_N: Tensor) -> Tensor:
    mask_NN = mask_B1NN[min(row, len(mask_B1NN) - 1), 0][real_N][:, real_N]
    return mask_NN if mask_NN.dtype == torch.bool else mask_NN > -1


def _extras(given: Mapping[str, Any], row: int, real_N: Tensor) -> dict[str, Any]:
    """Return what else the decoder is given: a row's part of what counts tokens, or visual tokens (lists beside a
    mask).
    """
    shape = given["inputs_embeds"].shape[:2]
    masks = [
        one for one in given.values() if isinstance(one, Tensor) and one.dtype == torch.bool and one.shape == shape
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
    return extras


class _Token(NamedTuple):
    """What a row holds at one place."""

    hidden_D: Tensor
    position_A: Tensor
    size: int
    origin: int
    label: int


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
            facts = state.sizes[column], state.origins[column], state.labels[column]
            found = [_Token(state.hidden_ND[column], position_A, *facts)]
        else:
            found = _kept_at(state, unit, kept_of[unit.columns], column, moved)
            if column == unit.columns[-1]:
                moved += max(0, kept_of[unit.columns].hidden_BMD.shape[1] - len(unit.columns))
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
    )


def _kept_at(state: RowState, unit: Unit, kept: Any, column: int, moved: int) -> list[_Token]:
    """Return the kept tokens that stand where a unit's token was; added ones stand where its last was."""
    before, tokens, count = unit.columns.index(column), len(unit.columns), kept.hidden_BMD.shape[1]
    chosen = [m for m in range(min(count, tokens)) if m * tokens // min(count, tokens) == before]
    if before == tokens - 1:
        chosen += range(tokens, count)
    found = []
    for m in chosen:
        source = source_of(kept, m, tokens)
        origin = state.origins[unit.columns[source]] if source >= 0 else -1
        position_A = kept.positions_ABM[:, 0, m] + moved
        found.append(_Token(kept.hidden_BMD[0, m], position_A, int(kept.sizes_BM[0, m]), origin, IGNORED))
    return found


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
