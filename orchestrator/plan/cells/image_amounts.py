"""Amounts that some image or video of the data cannot give: found in the row index before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orchestrator import registry
from orchestrator.errors import LlavoltaError
from orchestrator.spec.budgets import tokens_by_layer
from orchestrator.spec.components import CompressorSpec, DataSpec, Grid
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import find_config, rule_of_images, rule_of_videos

# Found by name: the data layer lies above this one, and needs no torch for this.
_OPEN_ROWS = "orchestrator.data.records.row_index:open_rows"
_ROWS_SHOWN = 5
_Rule = TypeVar("_Rule")


@dataclass(frozen=True)
class SizedImages:
    """The images (or videos) of a data set that are of one size, and so become the same units in a model.

    Attributes:
        height: In pixels.
        width: In pixels.
        grids: Their units, each once.
        count: How many there are.
        rows: Indices of their rows, in order.
    """

    height: int
    width: int
    grids: tuple[Grid, ...]
    count: int
    rows: tuple[int, ...]


def images_by_size(data: DataSpec, left_out: Iterable[int], model: ModelSpec) -> tuple[SizedImages, ...]:
    """Return the images of a data set, by size, with the units they become in a model.

    Empty where the rows, the model or what its processor makes of an image are not known here: a run reports what is
    wrong with rows, and refuses an image that is too small when it comes. An image that the processor itself refuses is
    left out.
    """
    config = find_config(model.model_name_or_path, model.revision)
    if config is None:
        return ()
    of_images, of_videos = _or_none(rule_of_images, config.parent), _or_none(rule_of_videos, config.parent)
    if of_images is None and of_videos is None:
        return ()
    try:
        rows = registry.load_object(_OPEN_ROWS)(data, None, left_out)
        shapes = iter(rows.image_shapes.tolist())
    except (ImportError, LlavoltaError, OSError, ValueError):
        return ()
    # In some models an image among others becomes less than it does alone.
    found: dict[tuple[int, int, int, bool], list[int]] = {}
    for number, shown in zip(rows.numbers.tolist(), rows.num_images.tolist(), strict=True):
        of_row = [next(shapes) for _ in range(shown)]
        alone = sum(not frames for frames, *_ in of_row) == 1
        for frames, height, width in of_row:
            found.setdefault((frames, height, width, alone), []).append(number)
    images = []
    for (frames, height, width, alone), numbers in found.items():
        try:
            if frames:
                units = None if of_videos is None else of_videos(frames, height, width)
            else:
                units = None if of_images is None else of_images(height, width, alone)
        except ValueError:
            units = None
        if units is None:
            continue
        grids = tuple(dict.fromkeys(units.grids))
        images.append(SizedImages(height, width, grids, len(numbers), tuple(dict.fromkeys(numbers))))
    return tuple(images)


def _or_none(rule_of: Callable[[Path], _Rule], folder: Path) -> _Rule | None:
    try:
        return rule_of(folder)
    except ValueError:
        return None


def unfit_images(points: Sequence[Mapping[str, Any]], num_layers: int, images: Sequence[SizedImages]) -> str | None:
    """Return why a variant cannot act on some images, and what to do; None where it can on all.

    Args:
        points: Resolved points.
        num_layers: Decoder layers.
        images: Those of the data, by size.
    """
    if not any(point.get("keep_tokens") for point in points):
        return None  # a stride and a share are for images of any size
    specs = [registry.spec_class(registry.COMPRESSORS, point["kind"]).model_validate(dict(point)) for point in points]
    known: dict[Grid, str | None] = {}
    unfit: list[tuple[int, str, SizedImages]] = []
    for some in images:
        for grid in some.grids:
            if grid not in known:
                known[grid] = _refusal(specs, num_layers, grid)
        tokens, reason = min(
            ((grid.tokens, reason) for grid in some.grids if (reason := known[grid]) is not None), default=(0, None)
        )
        if reason is not None:
            unfit.append((tokens, reason, some))
    if not unfit:
        return None
    _, reason, smallest = min(unfit, key=lambda one: one[0])
    count, total = sum(some.count for *_, some in unfit), sum(some.count for some in images)
    rows = sorted({row for *_, some in unfit for row in some.rows})
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN])) + (", ..." if len(rows) > _ROWS_SHOWN else "")
    return (
        f"{reason}: so it is for {count:,} of {total:,} images, in {len(rows):,} rows (row {shown}); the smallest has "
        f"{smallest.height} x {smallest.width} pixels; give keep_ratio or stride, which images of any size have, or a "
        "smaller keep_tokens, or leave those rows out"
    )


def _refusal(specs: Sequence[CompressorSpec], num_layers: int, grid: Grid) -> str | None:
    try:
        tokens_by_layer(specs, num_layers, grid)
    except ValueError as error:
        return str(error)
    return None
