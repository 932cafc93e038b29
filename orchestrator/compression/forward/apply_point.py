"""One point on the visual tokens of a batch: the method's calls group by group, and one call of what it learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.layout import ImageGroup
from orchestrator.compression.protocol import Context, Enters, Kept, Point
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid

Visuals = tuple[Tensor, Grid, Context]


def apply_point(point: Point, groups: Sequence[Visuals], module: nn.Module | None, fill: bool = False) -> list[Kept]:
    """Return the tokens that a method keeps of each group of units, sources and grids filled in.

    Units of one token stay as they are, but for a method that keeps none.

    Args:
        point: The method at its place.
        groups: Visual tokens (units x tokens x width), grid and context of each group of units of one grid.
        module: The learned module, or None. It is called once whatever the number of groups: ranks whose batches have
            other grids must gather its parameters equally often.
        fill: An adaptive method leaves the most that its spec allows, by repeating tokens: for measuring memory.

    Raises:
        UsageError: the method cannot take a grid, or returned something that is no compression.
    """
    kept = [_whole(*group) for group in groups]
    least = 1 if point.spec.keeps_none else 2
    chosen = [number for number, (_, _, context) in enumerate(groups) if context.sizes_BN.shape[1] >= least]
    if module is None:
        for number in chosen:
            kept[number] = _one(point, *groups[number], fill)
        return kept
    if not chosen:
        return [replace(kept[0], hidden_BMD=call_idle(module, kept[0].hidden_BMD)), *kept[1:]]
    inside = _without_hooks(module)

    def work(flat_LD: Tensor) -> Tensor:
        parts = flat_LD.split([groups[number][0].shape[:2].numel() for number in chosen])
        for number, part_LD in zip(chosen, parts, strict=True):
            visual_BND, grid, context = groups[number]
            visual_BND = part_LD.unflatten(0, visual_BND.shape[:2])
            kept[number] = _one(point, visual_BND, grid, replace(context, module=inside), fill)
        return torch.cat([kept[number].hidden_BMD.flatten(0, 1).to(flat_LD.dtype) for number in chosen])

    flat_LD = call_once(module, work, torch.cat([groups[number][0].flatten(0, 1) for number in chosen]))
    parts = flat_LD.split([kept[number].hidden_BMD.shape[:2].numel() for number in chosen])
    for number, part_LD in zip(chosen, parts, strict=True):
        kept[number] = replace(kept[number], hidden_BMD=part_LD.unflatten(0, kept[number].hidden_BMD.shape[:2]))
    return kept


def call_idle(module: nn.Module, hidden: Tensor) -> Tensor:
    """Pass hidden states by a learned module that has nothing to do, so that its parameters get gradients of zero."""

    def work(hidden: Tensor) -> Tensor:
        zero = torch.stack([(0.0 * parameter).sum().float() for parameter in module.parameters()]).sum()
        return hidden + zero.to(hidden)

    return call_once(module, work, hidden)


def call_once(module: nn.Module, work: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Call a module with `work` in the place of its forward: its hooks (ZeRO-3, DDP) see one tensor in, one out."""
    module.__dict__["forward"] = work
    try:
        result: Tensor = module(hidden)
    finally:
        del module.__dict__["forward"]
    return result


def _without_hooks(module: nn.Module) -> nn.Module:
    """Return the same module (parameters, submodules, forward) for calls inside `call_once`."""
    view: Any = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    for name in [name for name in view.__dict__ if name.endswith("_hooks")]:
        view.__dict__[name] = type(view.__dict__[name])()
    return view


def _whole(visual_BND: Tensor, grid: Grid, context: Context) -> Kept:
    every_BN = torch.arange(visual_BND.shape[1], device=visual_BND.device).expand(len(visual_BND), -1)
    return Kept(visual_BND, context.positions_ABN, context.sizes_BN, every_BN, grid)


def kept_by(point: Point, method: Callable[..., Any], *visuals: Any) -> Kept:
    """Return what `compress` or `enter` of a method keeps of a group of units.

    Raises:
        UsageError: it returned something else.
    """
    kept = method(*visuals)
    if not isinstance(kept, Kept):
        raise UsageError(
            f"compression: {point.spec.kind} at {point.place}: {method.__name__}() returned a {type(kept).__name__}; "
            "return a plugin.Kept, for example plugin.take(visual_BND, index_BM, context)"
        )
    return kept


def by_count(group: ImageGroup, kept: Kept) -> list[tuple[ImageGroup, Kept, Tensor | slice]]:
    """Return a group and what is left of it in parts of equally many tokens an image, without padding.

    Returns:
        The images of a part, what is left of them, and their numbers in the group on the device of their tokens.
    """
    if kept.counts_B is None:
        return [(group, kept, slice(None))]
    counts_I = kept.counts_B.cpu()  # rows get their lengths on the host
    parts: list[tuple[ImageGroup, Kept, Tensor | slice]] = []
    for count in counts_I.unique().tolist():
        of_I = (counts_I == count).nonzero().squeeze(1)
        on_I = of_I.to(kept.hidden_BMD.device)
        sources_BM = kept.sources_BM
        left = replace(
            kept,
            hidden_BMD=kept.hidden_BMD[on_I, :count],
            positions_ABM=kept.positions_ABM[:, on_I, :count],
            sizes_BM=kept.sizes_BM[on_I, :count],
            sources_BM=sources_BM[on_I, :count] if sources_BM is not None else None,
            grid=Grid(1, count),
            counts_B=None,
        )
        images = replace(
            group, rows_I=group.rows_I[of_I], columns_IN=group.columns_IN[of_I], frames_I=group.frames_I[of_I]
        )
        parts.append((images, left, on_I))
    return parts


def _one(point: Point, visual_BND: Tensor, grid: Grid, context: Context, fill: bool) -> Kept:
    """Call the method; sources and grid that it does not name are those that the protocol states."""
    compressor = point.compressor
    method = compressor.enter if isinstance(compressor, Enters) and point.enters else compressor.compress
    try:
        kept = kept_by(point, method, visual_BND, grid, context)
    except ValueError as error:
        raise UsageError(f"compression: {point.spec.kind} at {point.place}: {error}") from error
    count, tokens = kept.hidden_BMD.shape[1], visual_BND.shape[1]
    least = 0 if point.spec.keeps_none else 1
    if count < least or (count > tokens and not point.enters):
        raise UsageError(
            f"compression: {point.spec.kind} at {point.place} returned {count} tokens of {tokens}; a method keeps at "
            "least one (unless its spec says `keeps_none`) and at most all"
        )
    said = count if point.enters else point.spec.kept_tokens(grid)
    if point.spec.adaptive and not point.enters:
        return _counted(point, kept, said, fill)
    if kept.counts_B is not None:
        raise UsageError(
            f"compression: {point.spec.kind} at {point.place} returned counts_B, and its spec does not say `adaptive`; "
            "say so, since plan and costs take kept_tokens for the number it keeps"
        )
    if count != said:
        raise UsageError(
            f"compression: {point.spec.kind} at {point.place} returned {count} tokens of {tokens}, and its kept_tokens "
            f"says {said}; make both agree, since plan and costs count with kept_tokens"
        )
    if kept.grid is None:
        kept = replace(kept, grid=grid if count == tokens else Grid(1, count))
    if kept.sources_BM is None:
        before = context.sizes_BN.shape[1]  # of a resized image more than it brings tokens
        number_M = torch.arange(count, device=visual_BND.device)
        source_M = number_M * before // count if count <= before else number_M.masked_fill(number_M >= before, -1)
        kept = replace(kept, sources_BM=source_M.expand(len(visual_BND), -1))
    return kept


def _counted(point: Point, kept: Kept, most: int, fill: bool) -> Kept:
    """Return what an adaptive method keeps, its counts held against what it said is the most."""
    count, counts_B = kept.hidden_BMD.shape[1], kept.counts_B
    if counts_B is None or kept.sources_BM is None or kept.grid is not None:
        raise UsageError(
            f"compression: {point.spec.kind} at {point.place} is adaptive: give counts_B and sources_BM, and no grid"
        )
    if count > most:
        raise UsageError(
            f"compression: {point.spec.kind} at {point.place} returned up to {count} tokens an image, and its "
            f"kept_tokens says {most} are the most; plan, costs and memory count with kept_tokens"
        )
    if int(counts_B.min()) < 1 or int(counts_B.max()) > count:
        raise UsageError(
            f"compression: {point.spec.kind} at {point.place} returned counts_B from {int(counts_B.min())} to "
            f"{int(counts_B.max())} of {count} tokens; an image keeps at least one and at most all"
        )
    if not fill:
        return kept
    index_M = torch.arange(most, device=kept.hidden_BMD.device).clamp(max=count - 1)
    return replace(
        kept,
        hidden_BMD=kept.hidden_BMD[:, index_M],
        positions_ABM=kept.positions_ABM[:, :, index_M],
        sizes_BM=kept.sizes_BM[:, index_M],
        sources_BM=kept.sources_BM[:, index_M],
        in_place=False,
        counts_B=torch.full_like(counts_B, most),
    )
