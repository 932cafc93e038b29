"""What a method must hold by itself: shapes, sizes, positions, every image alone, no memory, no global random state."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.compression.protocol import Context, Kept
from orchestrator.spec.components import CompressorSpec, Grid

_VALUES = ("hidden_RND", "attention_BN", "row_keys_RND", "cls_attention_BN", "cls_keys_BND", "tower_keys_BND")
_ROUNDING, _ROUNDINGS = 5e-7, 3
"""Share by which equal values are moved, about what kernels of float32 differ by; and how often."""


@dataclass(frozen=True)
class Call:
    """One call of a method: `method(visual_BND, grid, context)` gave `kept`."""

    spec: CompressorSpec
    method: Any
    visual_BND: Tensor
    grid: Grid
    context: Context
    kept: Kept

    @property
    def enters(self) -> bool:
        """It is the part that adds tokens at the decoder's input."""
        return bool(getattr(self.method, "__name__", "") == "enter")

    def image(self, number: int) -> Call:
        """Return what it says of one of its images."""
        visual_BND, kept = self.visual_BND[number : number + 1], one_of(self.kept, number)
        return replace(self, visual_BND=visual_BND, context=_image_of(self.context, number), kept=kept)


def one_of(kept: Kept, number: int) -> Kept:
    """Return the kept tokens of one image: of an adaptive method as many as it says, which are one row."""
    one, count = slice(number, number + 1), None if kept.counts_B is None else int(kept.counts_B[number])
    return replace(
        kept,
        hidden_BMD=kept.hidden_BMD[one, :count],
        positions_ABM=kept.positions_ABM[:, one, :count],
        sizes_BM=kept.sizes_BM[one, :count],
        sources_BM=kept.sources_BM[one, :count] if kept.sources_BM is not None else None,
        grid=kept.grid if count is None else Grid(1, count),
        counts_B=None,
    )


def method_errors(call: Call) -> Iterator[str]:
    """Yield the errors of a call, in words."""
    if (error := _count_error(call)) is not None:
        yield error
        return
    for one in [call] if call.kept.counts_B is None else map(call.image, range(len(call.visual_BND))):
        yield from _shape_errors(one)
        yield from _size_errors(one)
        yield from _position_errors(one)
        yield from _source_errors(one)
    before = global_random_state()
    visual_BND, copy_BND = call.visual_BND.detach(), call.visual_BND.detach().clone()
    with torch.no_grad():
        again = call.method(visual_BND, call.grid, call.context)
    if not torch.equal(visual_BND, copy_BND):
        yield "it writes into the visual tokens it is given; work on a copy"
    if not same_random_state(before, global_random_state()):
        yield (
            "it draws from a global random state (torch, numpy or random); draw from a generator seeded by the "
            "context's seed, step and sample_indices"
        )
    if again.hidden_BMD.shape != call.kept.hidden_BMD.shape or counts_of(again) != counts_of(call.kept):
        yield (
            f"called twice with the same tokens it kept {_numbers(call.kept)} and then {_numbers(again)} of "
            f"{call.grid.tokens}"
        )
    elif not torch.equal(again.hidden_BMD, call.kept.hidden_BMD.detach()):
        yield "called twice with the same tokens it gave other ones; it remembers something, or draws without a seed"
    else:
        neighbours = list(_neighbour_errors(call))
        yield from neighbours or _tie_errors(call)


def counts_of(kept: Kept) -> list[int]:
    """Return how many tokens each image has."""
    if kept.counts_B is None:
        return [kept.hidden_BMD.shape[1]] * len(kept.hidden_BMD)
    return [int(count) for count in kept.counts_B]


def _numbers(kept: Kept) -> str:
    return ", ".join(map(str, dict.fromkeys(counts_of(kept))))


def _count_error(call: Call) -> str | None:
    """Return what is wrong with how many tokens each image has, where a method says so and where it must."""
    counts_B, most = call.kept.counts_B, call.kept.hidden_BMD.shape[1]
    if not call.spec.adaptive or call.enters:
        return "it gives counts_B, and its spec does not say `adaptive`" if counts_B is not None else None
    if counts_B is None:
        return "its spec says `adaptive`, and it gives no counts_B"
    if counts_B.shape != (len(call.visual_BND),) or counts_B.is_floating_point():
        return f"counts_B is {counts_B.dtype} of shape {tuple(counts_B.shape)}, not an integer for each image"
    if most > (said := call.spec.kept_tokens(call.grid)):
        return f"kept_tokens({call.grid}) says {said} tokens are the most, compress gave {most}"
    if min(counts_of(call.kept)) < 1 or max(counts_of(call.kept)) > most:
        return f"counts_B says {_numbers(call.kept)} of {most} tokens; an image keeps at least one and at most all"
    if call.kept.sources_BM is None or call.kept.grid is not None:
        return "an adaptive method gives sources_BM, and no grid"
    return None


def always_alike(calls: Sequence[Call]) -> bool:
    """Return whether an adaptive method left as many tokens of all images of a grid: those of the calls, and images
    of equal tokens, of unlike ones, and of a few that stand out.
    """
    found = set()
    for call in calls:
        size, generator = call.visual_BND.shape, torch.Generator().manual_seed(0)
        unlike_BND = torch.randn(size, generator=generator).to(call.visual_BND)
        few_BN1 = (torch.arange(size[1]) < max(1, size[1] // 8)).to(call.visual_BND).unsqueeze(1)
        equal_BND = call.visual_BND.detach()[:, :1].expand(size)
        with torch.no_grad():
            for visual_BND in (equal_BND, unlike_BND, unlike_BND * (1 + 100 * few_BN1)):
                kept = call.method(visual_BND, call.grid, with_values(call.context, _spread_as(visual_BND)))
                found |= {(call.grid, count) for count in [*counts_of(kept), *counts_of(call.kept)]}
    return len({grid for grid, _ in found}) == len(found)


def _spread_as(visual_BND: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a change of a context's values that makes those of the visual tokens as unequal as the tokens are."""
    norm_BN = visual_BND.norm(dim=2) / visual_BND.norm(dim=2).mean(1, keepdim=True)

    def change(values: Tensor) -> Tensor:
        if values.shape[:2] != norm_BN.shape:
            return values.detach()
        return values.detach() * norm_BN.reshape(*norm_BN.shape, *[1] * (values.ndim - 2))

    return change


def _shape_errors(call: Call) -> Iterator[str]:
    kept, images = call.kept, len(call.visual_BND)
    count = kept.hidden_BMD.shape[1]
    axes = len(call.context.positions_ABN)
    for name, shape in (
        ("hidden_BMD", (images, count, call.visual_BND.shape[2])),
        ("positions_ABM", (axes, images, count)),
        ("sizes_BM", (images, count)),
        *((("sources_BM", (images, count)),) if kept.sources_BM is not None else ()),
    ):
        values = getattr(kept, name)
        if tuple(values.shape) != shape:
            yield f"{name} has the shape {tuple(values.shape)} instead of {shape}"
        elif name == "positions_ABM" and values.dtype == call.context.positions_ABN.dtype:
            continue  # Qwen3-Omni counts the time of frames in fractions
        elif name != "hidden_BMD" and values.is_floating_point():
            yield f"{name} holds {values.dtype}, not integers"
    if call.enters:
        if count != call.spec.tokens_before(call.grid):
            yield f"tokens_before({call.grid}) says {call.spec.tokens_before(call.grid)}, enter gave {count} tokens"
        return
    said = call.spec.kept_tokens(call.grid)
    if count != said and not call.spec.adaptive:
        yield f"kept_tokens({call.grid}) says {said} tokens, compress gave {count}"
    if kept.grid is not None and kept.grid.tokens != count:
        yield f"the grid it returned, {kept.grid}, has {kept.grid.tokens} tokens, not {count}"
    left = kept.grid or Grid(1, count)
    if said == count < call.grid.tokens and left != call.spec.kept_grid(call.grid):
        yield f"kept_grid({call.grid}) says {call.spec.kept_grid(call.grid)}, compress left {left}"


def _size_errors(call: Call) -> Iterator[str]:
    sizes_BM, before_BN = call.kept.sizes_BM, call.context.sizes_BN
    if sizes_BM.shape != call.kept.hidden_BMD.shape[:2] or call.enters or not sizes_BM.numel():
        return
    if int(sizes_BM.min()) < 1:
        yield f"sizes_BM holds {int(sizes_BM.min())}; every token stands for at least one"
    most = int((sizes_BM.sum(1) - before_BN.sum(1)).max())
    if most > 0:
        yield (
            f"sizes_BM of an image sum to {most} more than the {int(before_BN.sum(1)[0])} tokens it stood for before"
        )


def _position_errors(call: Call) -> Iterator[str]:
    positions_ABM, before_ABN = call.kept.positions_ABM, call.context.positions_ABN
    if positions_ABM.shape[:2] != before_ABN.shape[:2] or call.enters or call.kept.renumber:
        return
    if positions_ABM.shape[2] != call.kept.hidden_BMD.shape[1]:
        return
    low_AB1, high_AB1 = before_ABN.amin(2, keepdim=True), before_ABN.amax(2, keepdim=True)
    if bool(((positions_ABM < low_AB1) | (positions_ABM > high_AB1)).any()):
        yield (
            f"positions_ABM holds ids from {int(positions_ABM.min())} to {int(positions_ABM.max())}, outside of the "
            f"image's own ({int(before_ABN.min())} to {int(before_ABN.max())})"
        )
        return
    # A token that is kept as it was keeps its position id.
    for image, place, token in _kept_as_they_were(call):
        if bool((positions_ABM[:, image, place] != before_ABN[:, image, token]).any()):
            yield (
                f"token {token} is kept as it was but with the position id {positions_ABM[:, image, place].tolist()} "
                f"instead of {before_ABN[:, image, token].tolist()}; gather positions with the tokens (protocol.take)"
            )
            return


def _source_errors(call: Call) -> Iterator[str]:
    sources_BM, tokens = call.kept.sources_BM, call.context.sizes_BN.shape[1]
    if sources_BM is None or sources_BM.shape != call.kept.hidden_BMD.shape[:2] or not sources_BM.numel():
        return
    if int(sources_BM.min()) < -1 or int(sources_BM.max()) >= tokens:
        yield (
            f"sources_BM holds numbers from {int(sources_BM.min())} to {int(sources_BM.max())}; each is one of the "
            f"image's {tokens} tokens (0 to {tokens - 1}), or -1 for a new token"
        )
        return
    steps_BM = sources_BM.diff(dim=1)
    if call.kept.in_place and (int(sources_BM.min()) < 0 or bool((steps_BM <= 0).any())):
        yield f"it says in_place, and sources_BM of an image, {sources_BM[0].tolist()}, does not rise from 0 on"
        return
    for image, place, token in _kept_as_they_were(call):
        if int(sources_BM[image, place]) != token:
            yield (
                f"token {token} is kept as it was, and sources_BM says that it stands in place of token "
                f"{int(sources_BM[image, place])}; gather sources with the tokens (protocol.take)"
            )
            return


def _kept_as_they_were(call: Call) -> Iterator[tuple[int, int, int]]:
    """Yield image, place and number of each token that is kept as it was and has no equal among the image's."""
    if not call.visual_BND.shape[1] == call.context.positions_ABN.shape[2] == call.grid.tokens:
        return  # features of a smaller or resized image: other tokens than those the context speaks of
    same_BMN = (call.kept.hidden_BMD.detach().unsqueeze(2) == call.visual_BND.detach().unsqueeze(1)).all(3)
    for image, place, token in same_BMN.nonzero().tolist():
        if int(same_BMN[image, place].sum()) == 1:
            yield image, place, token


def _neighbour_errors(call: Call) -> Iterator[str]:
    """Compare every image among others with itself alone; the images here are of different rows and samples."""
    images = len(call.visual_BND)
    if images < 2 or not call.kept.hidden_BMD.numel():
        return
    rows = torch.arange(images)
    apart = replace(call.context, rows_B=rows, sample_indices=tuple(range(5, 5 + images)), **_row_of_each(call.context))
    with torch.no_grad():
        together = call.method(call.visual_BND.detach(), call.grid, apart)
        for image in range(images):
            one = slice(image, image + 1)
            alone = call.method(call.visual_BND[one].detach(), call.grid, _image_of(apart, image))
            mine, its = one_of(together, image), one_of(alone, 0)
            differs = mine.hidden_BMD.shape[1] != its.hidden_BMD.shape[1]
            if not differs:
                scale = max(1.0, float(call.visual_BND.detach().abs().max()))
                gap = float((mine.hidden_BMD - its.hidden_BMD).abs().max())
                differs = gap > 1e-4 * scale or not torch.equal(mine.positions_ABM, its.positions_ABM)
            if differs:
                yield (
                    f"image {image} of {images} comes out otherwise than alone; an image must not depend on the "
                    "others of the batch"
                )
                return


def _tie_errors(call: Call) -> Iterator[str]:
    """Check that among tokens equal up to rounding the choice does not depend on the rounding."""
    generator = torch.Generator().manual_seed(0)

    def equal(values: Tensor) -> Tensor:
        same = values.detach()[:, :1].expand_as(values)
        return same * (1 + _ROUNDING * (2 * torch.rand(same.shape, generator=generator).to(same) - 1))

    first: list[Kept] | None = None
    for _ in range(_ROUNDINGS):
        with torch.no_grad():
            context = with_values(call.context, equal)
            kept = call.method(equal(call.visual_BND), call.grid, context)
        images = [one_of(kept, image) for image in range(len(call.visual_BND))]
        first = first or images
        parts = ("sources_BM", "positions_ABM", "sizes_BM")
        if any(
            getattr(one, name) is not None and not torch.equal(getattr(one, name), getattr(other, name))
            for one, other in zip(images, first, strict=True)
            for name in parts
        ):
            yield (
                "among equal tokens its choice hangs on the last bits, which differ from machine to machine; choose "
                "with plugin.top_tokens, plugin.argmax or plugin.argmin (of equal ones the first), and give them "
                "`scale` where a score can be near 0: 1 for cosines, the tokens' norm for distances; a score equals "
                "a threshold where they differ by no more than plugin.TOLERANCE of that scale"
            )
            return


def with_values(context: Context, change: Callable[[Tensor], Tensor]) -> Context:
    """Return a context with all values that a method may choose by changed."""
    found = {name: getattr(context, name) for name in _VALUES}
    changed: dict[str, Any] = {name: change(values) for name, values in found.items() if values is not None}
    return replace(context, **changed)


def _row_of_each(context: Context) -> dict[str, Any]:
    """Return the context's fields of rows, a row for each image."""
    fields = ("hidden_RND", "text_RN", "row_keys_RND")
    found = {name: getattr(context, name) for name in fields}
    return {name: values[context.rows_B] for name, values in found.items() if values is not None}


def _image_of(context: Context, image: int) -> Context:
    one = slice(image, image + 1)
    images = ("sizes_BN", "columns_BN", "attention_BN", "cls_attention_BN", "cls_keys_BND", "tower_keys_BND")
    values = {name: getattr(context, name)[one] for name in images if getattr(context, name) is not None}
    rows = {name: values[one] for name, values in _row_of_each(context).items()}
    return replace(
        context,
        positions_ABN=context.positions_ABN[:, one],
        rows_B=torch.zeros(1, dtype=torch.long),
        sample_indices=context.sample_indices[one],
        **values,
        **rows,
    )


def global_random_state() -> tuple[Any, ...]:
    """Return the states of torch's, numpy's and Python's global generators."""
    return torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()


def same_random_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Return whether nothing was drawn between two states."""
    return torch.equal(one[0], other[0]) and one[1:] == other[1:]
