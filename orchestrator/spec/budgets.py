"""Amounts in one currency: visual tokens as the mean over decoder layers (LLaVolta section 4, tokens per layer)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import takewhile

from orchestrator.spec.components import CompressorSpec, Grid

TOLERANCE = Fraction(1, 50)
SHARES = 1000

Images = Sequence[tuple[float, Sequence[Grid]]]
"""Images of several sizes: the share of each kind, and the units it becomes."""


def units_for(points: Sequence[CompressorSpec], grids: Sequence[Grid]) -> Sequence[Grid]:
    """Return the units of an image or a video as a variant's points get them: where one acts across frames, the
    numbered frames of a video are one unit, one below the other.
    """
    if not any(grid.frame for grid in grids) or not any(point.across_frames for point in points):
        return grids
    frames = [grid for grid in grids if grid.tokens > 1]
    whole = Grid(sum(grid.height for grid in frames), frames[0].width, len(frames))
    return [whole, *(grid for grid in grids if grid.tokens == 1)]


def kept_grid(point: CompressorSpec, grid: Grid) -> Grid:
    """Return what a point leaves of a unit; of several frames of a video, frame by frame unless it acts across them."""
    if grid.frames == 1 or point.across_frames:
        return point.kept_grid(grid)
    one = point.kept_grid(_frame(grid))
    return Grid(one.height * grid.frames, one.width, grid.frames)


def _tokens_before(point: CompressorSpec, grid: Grid) -> int:
    if grid.frames == 1 or point.across_frames:
        return point.tokens_before(grid)
    return point.tokens_before(_frame(grid)) * grid.frames


def _frame(grid: Grid) -> Grid:
    return Grid(grid.height // grid.frames, grid.width)


def tokens_by_layer(points: Sequence[CompressorSpec], num_layers: int, grid: Grid) -> list[int]:
    """Return the visual tokens of one image in each decoder layer; each point acts on what the one before left.

    Args:
        points: A variant's points; those in the vision tower (in their order) and at the projector act before layer 0.
        num_layers: Decoder layers.
        grid: The image's visual tokens.

    Raises:
        ValueError: a method cannot take its amount, or a point lies beyond the last layer.
    """
    by_layer = [grid.tokens] * num_layers
    left = grid
    for point in sorted(points, key=lambda point: point.sort_key(num_layers)):
        layer = point.layer_index(num_layers)
        if layer >= num_layers:
            raise ValueError(f"layer {layer} is beyond the model's {num_layers} layers")
        more = _tokens_before(point, left) - left.tokens
        left = kept_grid(point, left)
        by_layer[:layer] = [tokens + more for tokens in by_layer[:layer]]
        by_layer[layer:] = [left.tokens] * (num_layers - layer)
    return by_layer


def keys_by_layer(points: Sequence[CompressorSpec], num_layers: int, grid: Grid) -> list[int]:
    """Return the visual tokens of one image that are keys and values alone in each decoder layer (`keys_only`)."""
    by_layer = [0] * num_layers
    left = grid
    for point in sorted(points, key=lambda point: point.sort_key(num_layers)):
        kept = kept_grid(point, left)
        if point.keys_only:
            layer = point.layer_index(num_layers)
            by_layer[layer:] = [tokens + left.tokens - kept.tokens for tokens in by_layer[layer:]]
        left = kept
    return by_layer


def layer_average(points: Sequence[CompressorSpec], num_layers: int, grid: Grid) -> Fraction:
    """Return the visual tokens of one image, mean over decoder layers."""
    return Fraction(sum(tokens_by_layer(points, num_layers, grid)), num_layers)


def solve_layer_average(
    point: CompressorSpec, num_layers: int, grid: Grid, variant: Sequence[CompressorSpec] = ()
) -> CompressorSpec:
    """Return the point with `keep_tokens` in place of `layer_average_tokens`, as near to it as the method can come.

    `(layer * tokens before + (num_layers - layer) * keep) / num_layers = average`, exactly or to the nearest amount.

    Args:
        point: The point.
        num_layers: Decoder layers.
        grid: The image's visual tokens.
        variant: All points of the variant where there are others, which take no amount; the mean is the variant's.

    Raises:
        ValueError: the layers before the point alone hold more, more tokens are asked for than there are, or the
            nearest amount the method can take is more than 2 % off.
    """
    average = point.layer_average_tokens
    assert average is not None
    layer = point.layer_index(num_layers)

    def keeping(keep: int) -> CompressorSpec:
        return point.model_copy(update={"keep_tokens": keep, "layer_average_tokens": None})

    def average_with(keep: int) -> Fraction:
        points = [keeping(keep) if one is point else one for one in variant or [point]]
        return layer_average(points, num_layers, whole)

    whole = grid
    for other in takewhile(lambda one: one is not point, variant):
        grid = other.kept_grid(grid)

    # The mean is a straight line over the amount, also where a method adds tokens in proportion to it on the way.
    few, many = point.nearest_amount(1, grid), point.nearest_amount(grid.tokens, grid)
    least, most = (average_with(keep) for keep in (few, many))
    if not least <= average <= most:
        raise ValueError(
            f"layer_average_tokens {average} cannot be reached at layer {layer} of {num_layers}: "
            f"the mean lies between {float(least):.1f} and {float(most):g}"
        )
    wanted = few + (average - least) * (many - few) / (most - least) if many > few else Fraction(few)
    keep = point.nearest_amount(int(wanted + Fraction(1, 2)), grid)
    reached = average_with(keep)
    if abs(reached - average) > TOLERANCE * average:
        raise ValueError(
            f"{point.kind} at layer {layer} cannot come within 2 % of layer_average_tokens {average}: the nearest is "
            f"{float(reached):.1f}, with keep_tokens {keep}"
        )
    return keeping(keep)


def mean_layer_average(points: Sequence[CompressorSpec], num_layers: int, images: Images) -> float:
    """Return the visual tokens of an image, mean over decoder layers and images."""
    known: dict[Grid, int] = {}
    total = 0.0
    for share, units in images:
        for grid in units_for(points, units):
            if grid not in known:
                known[grid] = sum(tokens_by_layer(points, num_layers, grid))
            total += share * known[grid]
    return total / num_layers


def solve_mean_layer_average(
    point: CompressorSpec, num_layers: int, images: Images, variant: Sequence[CompressorSpec] = ()
) -> CompressorSpec:
    """Return the point with `keep_ratio` (in thousandths) in place of `layer_average_tokens`, the mean over images of
    several sizes; with `keep_tokens` for a method that takes no share.

    Raises:
        ValueError: no amount comes within 2 %.
    """
    average = point.layer_average_tokens
    assert average is not None

    def with_amount(name: str, value: int | str) -> CompressorSpec:
        fields = point.model_dump(mode="json") | {"layer_average_tokens": None, name: value}
        return type(point).model_validate(fields)

    def keeping(number: int) -> CompressorSpec:
        return with_amount("keep_ratio", str(Fraction(number, SHARES)))

    most = SHARES
    try:
        keeping(most)
    except ValueError:  # it takes tokens alone, and leaves no more than the smallest unit has
        most = min(grid.tokens for _, units in images for grid in units)

        def keeping(number: int) -> CompressorSpec:
            return with_amount("keep_tokens", number)

    def reached(number: int) -> float:
        points = [keeping(number) if one is point else one for one in variant or [point]]
        return mean_layer_average(points, num_layers, images)

    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(middle) < average else (low, middle)
    number = min((low, high), key=lambda each: abs(reached(each) - average))
    if abs(reached(number) - average) > TOLERANCE * average:
        raise ValueError(
            f"layer_average_tokens {average} cannot be reached at layer {point.layer_index(num_layers)} of "
            f"{num_layers} within 2 %: over the measured images the mean lies between {reached(1):.1f} and "
            f"{reached(most):.1f}, and the nearest is {reached(number):.1f}"
        )
    return keeping(number)
