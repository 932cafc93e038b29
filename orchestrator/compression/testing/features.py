"""Points at the projector in the plain computation: unit by unit on what the tower gave, then the projector itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.families import Family
from orchestrator.compression.protocol import Context, Kept, Point, Resizes
from orchestrator.compression.testing.rows import Reached, RowState, Unit, grid_left, source_of, spliced
from orchestrator.spec.components import Grid

Apply = Callable[[Point, Tensor, Grid, Context], Kept]


def tower_features(family: Family, batch: Mapping[str, Any], resize: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return what the tower of a plain model hands to the projector for a batch: features of all images, one after
    the other.

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
    try:
        family.model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen[0].flatten(0, -2) if seen else torch.zeros(0, 0)


def before_projector(
    family: Family, batch: Mapping[str, Any], states: Sequence[RowState], points: Sequence[Point], apply: Apply
) -> list[RowState]:
    """Return the rows at the decoder's input after the points at the projector.

    Args:
        family: Adapter of the plain model.
        batch: Keyword arguments of the model's forward.
        states: The rows as the plain model makes them.
        points: The points at the projector, in their order.
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
    offset, done = 0, []
    for state in states:
        parts: list[tuple[Unit, Kept]] = []
        for grid in dict.fromkeys(unit.grid for unit in state.units):
            members = [unit for unit in state.units if unit.grid == grid]
            places = [_offset_of(state, unit, offset) for unit in members]
            visual_BND = torch.stack(
                [features_LD[round(share * start) : round(share * (start + grid.tokens))] for start in places]
            )
            parts += _kept(state, members, visual_BND, points, apply)
        offset += sum(len(unit.columns) for unit in state.units)
        mapped = [(unit, _mapped(state, unit, kept, projector, factor)) for unit, kept in parts]
        done.append(spliced(state, mapped) if mapped else state)
    return done


def _offset_of(state: RowState, unit: Unit, offset: int) -> int:
    before = state.units[: [other.columns for other in state.units].index(unit.columns)]
    return offset + sum(len(other.columns) for other in before)


def _factor(states: Sequence[RowState], projected_LD: Tensor) -> float:
    """Return what the plain model multiplies the projector's output with before the decoder (1 in most)."""
    embeds_LD = torch.cat([state.hidden_ND[list(unit.columns)] for state in states for unit in state.units])
    if embeds_LD.shape != projected_LD.shape:
        raise AssertionError(
            f"the projector gives {tuple(projected_LD.shape)} features, the rows hold {tuple(embeds_LD.shape)}"
        )
    factor = float(((embeds_LD * projected_LD).sum() / projected_LD.square().sum()).detach())
    if not torch.allclose(embeds_LD, factor * projected_LD, atol=1e-4):
        raise AssertionError("visual tokens at the decoder's input are no multiple of what the projector gives")
    return factor


def _kept(
    state: RowState, members: Sequence[Unit], visual_BND: Tensor, points: Sequence[Point], apply: Apply
) -> list[tuple[Unit, Kept]]:
    """Return what is left of a row's units of one grid, unit by unit; positions and sources count in the unit."""
    images, tokens = len(members), len(members[0].columns)
    place_BN = torch.arange(tokens).expand(images, -1)
    kept = Kept(visual_BND, place_BN.unsqueeze(0), torch.ones_like(place_BN), place_BN, members[0].grid)
    for point in points:
        context = Context(
            layer=0,
            positions_ABN=kept.positions_ABM,
            sizes_BN=kept.sizes_BM,
            rows_B=torch.zeros(images, dtype=torch.long),
            sample_indices=(state.number,) * images,
        )
        if "cls" in point.spec.needs and state.cls_N is not None and state.cls_keys_Nd is not None:
            columns_BN = torch.tensor([unit.columns for unit in members])
            attention_BN, keys_BND = state.cls_N[columns_BN], state.cls_keys_Nd[columns_BN]
            context = replace(context, cls_attention_BN=attention_BN, cls_keys_BND=keys_BND)
        before, grid = kept, kept.grid
        assert grid is not None
        kept = apply(point, kept.hidden_BMD, grid, context)
        sources = [
            [source_of(kept, m, before.positions_ABM.shape[2], image) for m in range(kept.hidden_BMD.shape[1])]
            for image in range(images)
        ]
        assert before.sources_BM is not None
        kept = replace(
            kept,
            grid=grid_left(kept, grid),
            sources_BM=before.sources_BM.gather(1, torch.tensor(sources)),
            renumber=kept.renumber or before.renumber,
            size_bias=kept.size_bias or before.size_bias,
        )
    return [(unit, one_of(kept, image)) for image, unit in enumerate(members)]


def _mapped(state: RowState, unit: Unit, kept: Kept, projector: Any, factor: float) -> Kept:
    """Return what the decoder gets of one unit."""
    positions_AN = state.positions_AN[:, list(unit.columns)]
    return replace(
        kept,
        hidden_BMD=factor * projector(kept.hidden_BMD),
        positions_ABM=positions_AN[:, kept.positions_ABM[0, 0]].unsqueeze(1),
    )


def one_of(kept: Kept, number: int) -> Kept:
    """Return what a method kept of one image."""
    one = slice(number, number + 1)
    return replace(
        kept,
        hidden_BMD=kept.hidden_BMD[one],
        positions_ABM=kept.positions_ABM[:, one],
        sizes_BM=kept.sizes_BM[one],
        sources_BM=kept.sources_BM[one] if kept.sources_BM is not None else None,
    )
