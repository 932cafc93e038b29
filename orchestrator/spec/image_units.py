"""What an image or a video becomes in a model: its units of visual tokens, by plain arithmetic on the model's files.

Each function repeats what an image processor of transformers and the model do to an image of height x width, without
either; tests hold them to both, on many sizes. The settings come from `processor_config.json` or
`preprocessor_config.json` beside the config, with the defaults of the processor's class.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.spec.components import Grid

Settings = Mapping[str, Any]
_NEWLINE = Grid(1, 1)
_MAX_SIDE = 4096  # of Idefics3's and SmolVLM's processors, in pixels


@dataclass(frozen=True)
class ImageUnits:
    """An image, or a video, as the model gets it.

    Attributes:
        grids: Its units of visual tokens (tiles, the whole image, frames), in the order of their placeholders.
        tower: Tokens inside the vision tower, one number for each sequence that attends to itself.
        features: Tokens the projector gives, before any are cut off and newlines added.
        markers: Text tokens that the processor writes beside the placeholders (ends of rows, names of tiles).
        windows: Tokens of each window, where layers of the tower attend within windows.
        frames: Units that are frames of a video (their grids say which); 0 of an image.
    """

    grids: tuple[Grid, ...]
    tower: tuple[int, ...]
    features: int
    markers: int = 0
    windows: tuple[int, ...] = ()
    frames: int = 0

    @property
    def tokens(self) -> int:
        """Visual tokens of the image before compression."""
        return sum(grid.tokens for grid in self.grids)


ImageRule = Callable[[int, int, bool], ImageUnits]
"""`(height, width, alone)`: pixels of an image, and whether it is the only one of its row."""


def image_rule(config: Settings, vision: Settings, processor: Settings | None) -> ImageRule:
    """Return what a model makes of an image.

    Args:
        config: The model's config with the defaults of its class.
        vision: Its vision config, likewise.
        processor: The settings of `processor_settings`; None where the files are not here.

    Raises:
        ValueError: the type's arithmetic is not known, or the settings are not here or not what it is for.
    """
    kind = config["model_type"]
    rule = _PIXTRAL if vision.get("model_type") == "pixtral" and kind != "lighton_ocr" else _RULES.get(kind)
    if rule is None:
        raise ValueError(f"what an image becomes in {kind} is not known here")
    if processor is None:
        raise ValueError(f"an image of {kind} becomes what its processor makes of it, whose settings are not here")
    return rule.make(config, vision, rule.settings(processor))


VideoRule = Callable[[int, int, int], ImageUnits]
"""`(frames, height, width)`: frames that are taken of a video, and their pixels."""


def video_rule(config: Settings, vision: Settings, videos: Settings | None) -> VideoRule:
    """Return what a model makes of a video.

    Args:
        config: The model's config with the defaults of its class.
        vision: Its vision config, likewise.
        videos: The settings of `video_settings`; None where the files are not here.

    Raises:
        ValueError: the type's arithmetic is not known, or the settings are not here or not what it is for.
    """
    kind = config["model_type"]
    make = _VIDEO_RULES.get(kind)
    if make is None:
        raise ValueError(f"what a video becomes in {kind} is not known here")
    if videos is None:
        raise ValueError(f"a video of {kind} becomes what its processor makes of it, whose settings are not here")
    if videos.get("do_resize") is False:
        raise ValueError("the video processor does not resize frames here (do_resize: false)")
    return make(config, vision, videos)


def video_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of a folder's video processor: as transformers reads them, those in `processor_config.json`
    before `video_preprocessor_config.json` before `preprocessor_config.json`. None where there is none.
    """
    found = (_read(folder / "processor_config.json") or {}).get("video_processor")
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        found = found if isinstance(found, dict) else _read(folder / name)
    return None if found is None else {name: value for name, value in found.items() if value is not None}


def processor_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of a folder's processor, those of its image processor under `image_processor`.

    `processor_config.json` counts before `preprocessor_config.json`, as in transformers. None where there is neither.
    """
    whole = _read(folder / "processor_config.json") or {}
    images = whole.get("image_processor")
    if not isinstance(images, dict):
        images = _read(folder / "preprocessor_config.json")
    return None if images is None else {**whole, "image_processor": images}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class _Rule:
    """An image processor.

    Attributes:
        make: Returns the rule of `(config, vision, settings)`.
        defaults: Of the image processor's class, as far as they count.
        classes: Names of the classes it is for, without a backend's ending; a file that names another is refused.
        own: Defaults of the processor around it, under the same names as in its file.
        forced: What the processor sets whatever the file says.
    """

    make: Callable[[Settings, Settings, Settings], ImageRule]
    defaults: Settings
    classes: tuple[str, ...]
    own: Settings | None = None
    forced: Settings | None = None

    def settings(self, processor: Settings) -> Settings:
        """Return the settings with defaults filled in.

        Raises:
            ValueError: the file names another processor, or asks for no resizing.
        """
        given = {name: value for name, value in processor["image_processor"].items() if value is not None}
        name = str(given.get("image_processor_type", self.classes[0]))
        if name.removesuffix("Fast").removesuffix("Pil") not in self.classes:
            raise ValueError(f"the sizes that {name} makes of images are not known here; known: {self.classes[0]}")
        if given.get("do_resize") is False:
            raise ValueError(f"{name} does not resize images here (do_resize: false), so their tokens are not known")
        around = {**(self.own or {}), **{n: processor[n] for n in self.own or {} if processor.get(n) is not None}}
        return {**self.defaults, **given, **(self.forced or {}), "processor": around}


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        return int(value["height"]), int(value["width"])
    if isinstance(value, list | tuple):
        return int(value[0]), int(value[1])
    return int(value), int(value)


def _edge(value: Any) -> int:
    """Return the side of a size given as a number or as `longest_edge`."""
    return int(value["longest_edge"] if isinstance(value, Mapping) else value)


def _down(size: float, factor: int) -> int:
    return max(factor, math.floor(size / factor) * factor)


def _up(size: float, factor: int) -> int:
    return math.ceil(size / factor) * factor


def _within(height: int, width: int, factor: int, least: float, most: float, frames: int = 1) -> tuple[int, int]:
    """Return the nearest multiples of `factor` whose area is within bounds (Qwen2-VL's `smart_resize`)."""
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"an image of {height} x {width} pixels is refused by its processor: a side is over 200 times")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if frames * rows * columns > most:
        beta = math.sqrt((frames * height * width) / most)
        return _down(height / beta, factor), _down(width / beta, factor)
    if frames * rows * columns < least:
        beta = math.sqrt(least / (frames * height * width))
        return _up(height * beta, factor), _up(width * beta, factor)
    return rows, columns


def _bounds(settings: Settings) -> tuple[int, int]:
    """Return the least and the most pixels of an image; both have two names."""
    size = settings["size"]
    least, most = settings.get("min_pixels", size.get("shortest_edge")), settings.get("max_pixels")
    most = size.get("longest_edge") if most is None else most
    if not least or not most:
        raise ValueError(f"size {size} names no shortest_edge and longest_edge")
    return int(least), int(most)


def _window_lengths(grid: Grid, side: int, patches: int) -> tuple[int, ...]:
    """Return the patches of each window of `side` x `side` tokens (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1)."""

    def parts(length: int) -> list[int]:
        return [min(side, length - start) for start in range(0, length, side)]

    return tuple(rows * columns * patches for rows in parts(grid.height) for columns in parts(grid.width))


def _qwen(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    patch, merge = int(settings["patch_size"]), int(settings["merge_size"])
    least, most = _bounds(settings)
    windows = vision.get("window_size")

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        rows, columns = _within(height, width, patch * merge, least, most)
        return _merged(rows // patch, columns // patch, merge, windows and windows // merge // patch)

    return rule


def _merged(rows: int, columns: int, merge: int, window: int | None = None) -> ImageUnits:
    """Return an image of one unit whose patches merge into tokens."""
    grid = Grid(rows // merge, columns // merge)
    lengths = _window_lengths(grid, window, merge * merge) if window else ()
    return ImageUnits((grid,), (rows * columns,), grid.tokens, windows=lengths)


def _glm(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    patch, merge, frames = (int(settings[name]) for name in ("patch_size", "merge_size", "temporal_patch_size"))
    # GLM's processor knows no min_pixels and max_pixels.
    least, most = _bounds({"size": settings["size"]})
    factor = patch * merge

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        rows, columns = _within(height, width, factor, least, most, frames)
        return _merged(rows // patch, columns // patch, merge)

    return rule


def _pixtral(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    patch = int(settings["processor"]["patch_size"])
    merge = int(config.get("spatial_merge_size", 1))
    size = settings["size"]
    most = _pair(size if isinstance(size, Mapping) and "height" in size else _edge(size))
    factor = patch * int(settings["processor"]["spatial_merge_size"])

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        ratio = max(height / most[0], width / most[1])
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        rows, columns = -(-height // factor) * factor // patch, -(-width // factor) * factor // patch
        grid = Grid(rows // merge, columns // merge)
        breaks = grid.height if settings["processor"]["breaks"] else 0  # a break or end for each row
        return ImageUnits((grid,), (rows * columns,), grid.tokens, markers=breaks)

    return rule


def _best_resolution(height: int, width: int, resolutions: list[list[int]]) -> tuple[int, int]:
    """Return the resolution that keeps most of an image and wastes least (LLaVA-NeXT)."""
    best, most, least_wasted = (0, 0), 0, math.inf
    for rows, columns in resolutions:
        scale = min(columns / width, rows / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * columns - effective
        if effective > most or (effective == most and wasted < least_wasted):
            best, most, least_wasted = (int(rows), int(columns)), effective, wasted
    return best


def _unpadded(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns of packed tiles without those that only padding fills."""
    if width / height > columns / rows:
        return rows - (rows - int(round(height * (columns / width), 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * (rows / height), 7))) // 2 * 2


_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_PINPOINTS = [[rows * 384, columns * 384] for rows in range(1, 7) for columns in range(1, 7)]


def _next(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    resolutions = [list(each) for each in config.get("image_grid_pinpoints") or _NEXT_PINPOINTS]
    if settings.get("image_grid_pinpoints", resolutions) != resolutions:
        raise ValueError("the processor's image_grid_pinpoints are not the model's, so the model refuses its images")
    size = _pair(vision["image_size"])[0]
    side = size // _pair(vision["patch_size"])[0]
    patches = side * side
    inside = patches + ("clip" in vision["model_type"])
    if config.get("downsample_rate"):
        side = int(side * Fraction(config["downsample_rate"]))
    cap = config.get("vision_aspect_ratio")  # LLaVA-OneVision

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        tile = Grid(side, side)
        if cap is not None and not alone:
            return ImageUnits((tile, _NEWLINE), (inside,), patches)
        best_height, best_width = _best_resolution(height, width, resolutions)
        tiles = 1 + -(-best_height // size) * -(-best_width // size)
        rows, columns = _unpadded(height, width, best_height // size * side, best_width // size * side)
        if cap is not None:
            ratio = math.sqrt(rows * columns / (int(str(cap).rpartition("_")[2]) * side**2))
            rows, columns = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
        # The newline that the model adds ends each row.
        return ImageUnits((tile, Grid(rows, columns + 1)), (inside,) * tiles, tiles * tile.tokens)

    return rule


def _fixed(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    side = _pair(vision["image_size"])[0] // _pair(vision["patch_size"])[0]
    if config["vision_feature_select_strategy"] != "default":
        raise ValueError("the CLS token of an image is a visual token here (vision_feature_select_strategy)")
    image = ImageUnits((Grid(side, side),), (side * side + 1,), side * side)
    return lambda height, width, alone: image


@lru_cache(maxsize=16)
def _arrangements(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Return the (columns, rows) of `least` to `most` tiles, by their number."""
    sides = range(1, most + 1)
    found = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return tuple(sorted(found, key=lambda tiles: tiles[0] * tiles[1]))


def _closest_shape(height: int, width: int, tile_pixels: int, least: int, most: int) -> int:
    """Return the number of tiles whose shape is closest to an image's; of equal ones the most it can fill by half."""
    best, best_difference, aspect = (1, 1), math.inf, width / height
    for columns, rows in _arrangements(least, most):
        difference = abs(aspect - columns / rows)
        fills = width * height > 0.5 * tile_pixels * columns * rows
        if difference < best_difference or (difference == best_difference and fills):
            best, best_difference = (columns, rows), difference
    return best[0] * best[1]


def _least_scaling(height: int, width: int, side: int, most: int) -> int:
    """Return the number of tiles that an image must be enlarged least to fit, or else shrunk least (Cohere2 Vision)."""
    scales = [
        (min(columns * side / width, rows * side / height), columns * rows) for columns, rows in _arrangements(1, most)
    ]
    larger = [each for each in scales if each[0] >= 1]
    return min(larger, key=lambda each: each[0])[1] if larger else max(scales, key=lambda each: each[0])[1]


def _least_covering(height: int, width: int, side: int, most: int, wanted: float = 0.9) -> int:
    """Return the fewest tiles that cover 90 % of an image at its resolution (Ovis2, arXiv 2405.20797)."""

    def covered(rows: int, columns: int) -> float:
        total = 0.0
        for row in range(rows):
            for column in range(columns):
                high = height - row * (height // rows) if row == rows - 1 else height // rows
                wide = width - column * (width // columns) if column == columns - 1 else width // columns
                long, short = max(high, wide), min(high, wide)
                total += short / long * side * side if long > side else long * short
        return total / (width * height)

    found = [(one * other, covered(one, other)) for one, other in _arrangements(1, most)]
    enough = [each for each in found if each[1] > wanted]
    if enough:
        return min(enough, key=lambda each: (each[0], -each[1]))[0]
    return min(found, key=lambda each: (-each[1], each[0]))[0]


_Markers = Callable[[int], int]


def _tiles(
    count: Callable[[int, int, tuple[int, int], Settings], int],
    side: Callable[[Settings, Settings], int],
    markers: _Markers,
) -> Callable[[Settings, Settings, Settings], ImageRule]:
    """Return the rule of square tiles, and the whole image as one more where there are several.

    Args:
        count: Tiles of `(height, width, size of a tile, settings)`.
        side: Patches along a side of a token, of `(config, vision)`.
        markers: Text tokens beside so many units.
    """

    def make(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
        size, merge = _pair(settings["size"]), side(config, vision)
        patch = _pair(vision["patch_size"])
        rows, columns = size[0] // patch[0], size[1] // patch[1]
        inside = rows * columns + (vision["model_type"] in ("internvl_vision", "llama4_vision_model"))
        grid = Grid(rows // merge, columns // merge)
        crops = settings["crop_to_patches"] and int(settings["max_patches"]) > 1

        def rule(height: int, width: int, alone: bool) -> ImageUnits:
            tiles = count(height, width, size, settings) if crops else 1
            units = tiles + (tiles > 1)
            return ImageUnits((grid,) * units, (inside,) * units, units * grid.tokens, markers(units))

        return rule

    return make


def _by_shape(height: int, width: int, size: tuple[int, int], settings: Settings) -> int:
    return _closest_shape(height, width, size[0] * size[1], int(settings["min_patches"]), int(settings["max_patches"]))


def _by_scaling(height: int, width: int, size: tuple[int, int], settings: Settings) -> int:
    return _least_scaling(height, width, size[0], int(settings["max_patches"]))


def _by_covering(height: int, width: int, size: tuple[int, int], settings: Settings) -> int:
    if not settings["use_covering_area_grid"]:
        return _by_shape(height, width, size, settings)
    return _least_covering(height, width, size[0], int(settings["max_patches"]))


def _downsampled(config: Settings, vision: Settings) -> int:
    return int(config["downsample_factor"])


def _idefics(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    tile = _edge(settings["max_image_size"])
    patches = tile // _pair(vision["patch_size"])[0]
    side = patches // int(config["scale_factor"])
    size, splits = settings["size"], bool(settings["do_image_splitting"])

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        rows = columns = 0
        if splits:
            rows, columns = _idefics_tiles(height, width, size, tile)
        tiles = rows * columns
        # Of tiles: two tags each, a line end after each row, an empty line; then tags around the whole image.
        markers = 3 + (2 * tiles + rows if tiles else 0)
        units = tiles + 1
        return ImageUnits((Grid(side, side),) * units, (patches * patches,) * units, units * side * side, markers)

    return rule


def _idefics_tiles(height: int, width: int, size: Settings, tile: int) -> tuple[int, int]:
    """Return the rows and columns of tiles; 0, 0 where the image is one."""
    if size.get("longest_edge"):
        height, width = _longest(height, width, int(size["longest_edge"]))
    else:
        height, width = _pair(size)
    aspect = width / height
    if width >= height:
        width = _up(width, tile)
        height = _up(int(width / aspect), tile)
    else:
        height = _up(height, tile)
        width = _up(int(height * aspect), tile)
    return (height // tile, width // tile) if height > tile or width > tile else (0, 0)


def _longest(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return the size whose longer side is `longest`, the other one even, and at most 4096."""
    aspect = width / height
    if width >= height:
        height, width = int(longest / aspect), longest
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    if max(height, width) <= _MAX_SIDE:
        return height, width
    aspect = width / height
    if width >= height:
        return max(int(_MAX_SIDE / aspect), 1), _MAX_SIDE
    return _MAX_SIDE, max(int(_MAX_SIDE * aspect), 1)


def _lfm2(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    merge, patch = int(settings["downsample_factor"]), int(settings["encoder_patch_size"])
    factor, tile = merge * patch, int(settings["tile_size"])
    fewest, most = int(settings["min_image_tokens"]), int(settings["max_image_tokens"])
    tolerated = most * factor**2 * float(settings["max_pixels_tolerance"])
    bounds = (int(settings["min_tiles"]), int(settings["max_tiles"]))
    splits = bool(settings["do_image_splitting"]) and bounds != (1, 1)
    # Every row of patches is padded to this length.
    padded = max(most * merge**2, (tile // patch) ** 2 if settings["do_image_splitting"] else 0)
    tags = bool(settings["processor"]["use_image_special_tokens"])
    in_tile = Grid(tile // patch // merge, tile // patch // merge)

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        rounded = [round(size / factor) * factor for size in (height, width)]
        large = math.prod(max(patch, size) for size in rounded) > tolerated
        tiles = _closest_shape(height, width, tile * tile, *bounds) if large and splits else 1
        rows, columns = _lfm2_resized(height, width, factor, fewest * factor**2, most * factor**2)
        whole = Grid(rows // factor, columns // factor)
        grids = (whole,) if tiles == 1 else (in_tile,) * tiles + ((whole,) if settings["use_thumbnail"] else ())
        if large and splits and tiles == 1:
            grids = (in_tile,)
        markers = (2 + (len(grids) if tiles > 1 else 0)) if tags else 0
        inside = tuple(max(padded, grid.tokens * merge**2) for grid in grids)
        return ImageUnits(grids, inside, sum(grid.tokens for grid in grids), markers)

    return rule


def _lfm2_resized(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    rows, columns = (max(factor, round(size / factor) * factor) for size in (height, width))
    if rows * columns > most:
        beta = math.sqrt((height * width) / most)
        return _down(height / beta, factor), _down(width / beta, factor)
    if rows * columns < least:
        beta = math.sqrt(least / (height * width))
        return _up(height * beta, factor), _up(width * beta, factor)
    return rows, columns


def _gemma4(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    patch, pool = int(settings["patch_size"]), int(settings["pooling_kernel_size"])
    side, most = patch * pool, int(settings["max_soft_tokens"])
    patches = most * pool**2  # of the tower, padding included

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        factor = math.sqrt(patches * patch**2 / (height * width))
        rows, columns = math.floor(factor * height / side), math.floor(factor * width / side)
        if not rows and not columns:
            raise ValueError(
                f"an image of {height} x {width} pixels is refused by its processor: nothing is left of it"
            )
        if not rows:
            rows, columns = 1, min(width // height, most)
        elif not columns:
            rows, columns = min(height // width, most), 1
        grid = Grid(rows, columns)
        return ImageUnits((grid,), (patches,), grid.tokens, markers=2)

    return rule


def _single(value: float) -> float:
    """Return a number in single precision, in which some processors compare."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _llama4_tiles(height: int, width: int, size: tuple[int, int], settings: Settings) -> int:
    """Return the tiles of the canvas that an image must be enlarged least to fill, or else shrunk least."""
    scales = []
    for columns, rows in _arrangements(1, int(settings["max_patches"])):
        scales.append((_single(min(rows * size[0] / height, columns * size[1] / width)), columns * rows))
    larger = [scale for scale, _ in scales if scale >= 1]
    best = (max if settings["resize_to_max_canvas"] else min)(larger) if larger else max(scales)[0]
    return min(tiles for scale, tiles in scales if scale == best)


def _step(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    whole, local, patch = _pair(settings["size"])[0], int(settings["patch_size"]), _pair(vision["patch_size"])[0]
    largest = int(settings["max_image_size"])
    if whole // patch % 4 or local // patch % 4:
        raise ValueError(f"views of {whole} and {local} pixels are no multiples of four patches of {patch}")
    view, full = Grid(*(local // patch // 4,) * 2), Grid(*(whole // patch // 4,) * 2)

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        columns, rows = _step_views(width, height, whole, local, largest)
        count = columns * rows
        grids = (view,) * count + (full,)
        inside = tuple(16 * grid.tokens for grid in grids)
        # Each view begins and ends, and so does the whole; a newline ends each row of views but the last.
        markers = 2 * len(grids) + max(0, rows - 1)
        return ImageUnits(grids, inside, sum(grid.tokens for grid in grids), markers)

    return rule


def _step_views(width: int, height: int, whole: int, local: int, largest: int) -> tuple[int, int]:
    """Return the columns and rows of an image's local views; 0, 0 where it is the whole alone."""
    if min(width, height) < 32 and max(width / height, height / width) > 4:
        width = height = max(width, height)
    if max(height, width) > largest:
        scale = largest / max(height, width)
        width, height = int(width * scale), int(height * scale)
    short, long = min(height, width), max(height, width)
    if long <= whole:
        window = short if long / short > 1.5 else 0
    else:
        window = min(short, local) if long / short > 4 else local
    if not window:
        return 0, 0
    columns, rows = (
        max(1, size // window + (size >= window and size % window > 0.2 * window)) for size in (width, height)
    )
    return columns, rows


def _sam(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    size, patch = _pair(settings["size"]), _pair(vision["patch_size"])[0]
    side, window = size[0] // patch, int(vision["window_size"])
    grid = Grid(-(-side // 4), -(-side // 4))
    crops = settings["crop_to_patches"] and int(settings["max_patches"]) > 1

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        tiles = _by_shape(height, width, size, settings) if crops else 1
        units = tiles + (tiles > 1)
        windows = (window * window,) * (units * (-(-side // window)) ** 2)
        return ImageUnits((grid,) * units, (side * side,) * units, units * grid.tokens, windows=windows)

    return rule


def _molmo2(config: Settings, vision: Settings, settings: Settings) -> ImageRule:
    crop, patch = _pair(settings["size"])[0], int(settings["patch_size"])
    if tuple(settings["pooling_size"]) != (2, 2):
        raise ValueError(f"Molmo 2 pools {settings['pooling_size']} patches here, and the cost of 2 x 2 alone is known")
    side, margin = crop // patch, sum(settings["overlap_margins"])
    low, most = Grid(*(-(-side // 2),) * 2), int(settings["max_crops"])
    ends = bool(settings["processor"]["image_use_col_tokens"])  # of rows, by tokens of text
    single = settings["processor"]["use_single_crop_col_tokens"]
    ends_low = ends if single is None else bool(single)

    def rule(height: int, width: int, alone: bool) -> ImageUnits:
        rows, columns = _crops_of(height - margin * patch, width - margin * patch, (side - margin) * patch, most)
        high = Grid(*(-(-(number * (side - margin) + margin) // 2) for number in (rows, columns)))
        crops = 1 + rows * columns
        markers = 4 + (low.height if ends_low else 0) + (high.height if ends else 0)
        return ImageUnits((low, high), (side * side,) * crops, low.tokens + high.tokens, markers)

    return rule


def _crops_of(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """Return the rows and columns of crops: those an image must be enlarged least to fill, or else shrunk least."""

    def scale(length: int, size: int) -> float:
        return _single(length / size) if size else math.inf

    found = sorted((rows * columns, rows, columns) for columns, rows in _arrangements(1, most))
    scales = [min(scale(rows * window, height), scale(columns * window, width)) for _, rows, columns in found]
    if all(each < 1 for each in scales):
        best = scales.index(max(scales))
    else:
        wanted = [1e10 if each < 1 else each for each in scales]
        best = wanted.index(min(wanted))
    return found[best][1:]


_QWEN_SETTINGS = {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "merge_size": 2,
}
_QWEN = _Rule(_qwen, _QWEN_SETTINGS, ("Qwen2VLImageProcessor",))
_VIDEO_LLAMA = _Rule(_qwen, {**_QWEN_SETTINGS, "merge_size": 1}, ("VideoLlama3ImageProcessor",))
_GLM = _Rule(
    _glm,
    {
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    },
    ("Glm46VImageProcessor", "Glm4vImageProcessor"),
)
_PIXTRAL = _Rule(
    _pixtral,
    {"size": {"longest_edge": 1024}},
    ("PixtralImageProcessor",),
    {"patch_size": 16, "spatial_merge_size": 1, "breaks": True},
)
_LIGHTON = replace(_PIXTRAL, own={"patch_size": 14, "spatial_merge_size": 2, "breaks": False})
_NEXT = _Rule(_next, {}, ("LlavaNextImageProcessor",))
_CROPS = {"size": {"height": 384, "width": 384}, "crop_to_patches": False, "min_patches": 1, "max_patches": 12}


def _crops(
    count: Callable[[int, int, tuple[int, int], Settings], int],
    side: Callable[[Settings, Settings], int],
    markers: _Markers,
    name: str,
    forced: Settings | None = None,
    **defaults: Any,
) -> _Rule:
    return _Rule(_tiles(count, side, markers), {**_CROPS, **defaults}, (name,), forced=forced)


_ALWAYS = {"crop_to_patches": True}
_IDEFICS_SETTINGS = {
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
}
_LFM2_SETTINGS = {
    "downsample_factor": 2,
    "encoder_patch_size": 16,
    "tile_size": 512,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "max_pixels_tolerance": 2.0,
    "min_tiles": 2,
    "max_tiles": 10,
    "do_image_splitting": True,
    "use_thumbnail": True,
}

_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        (
            *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
            *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
        ),
        _QWEN,
    ),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr"), _GLM),
    "video_llama_3": _VIDEO_LLAMA,
    "mistral3": _PIXTRAL,
    "llava_next": _NEXT,
    "llava_next_video": _NEXT,
    "granite4_vision": _NEXT,
    "llava_onevision": _Rule(_next, {}, ("LlavaOnevisionImageProcessor",)),
    "video_llava": _Rule(_fixed, {}, ("VideoLlavaImageProcessor", "CLIPImageProcessor")),
    "internvl": _crops(
        _by_shape,
        lambda config, vision: round(1 / config["downsample_ratio"]),
        lambda units: 2,
        "GotOcr2ImageProcessor",
        _ALWAYS,
    ),
    "aya_vision": _crops(_by_shape, _downsampled, lambda units: units + 2, "GotOcr2ImageProcessor", _ALWAYS),
    "cohere2_vision": _crops(
        _by_scaling,
        _downsampled,
        lambda units: units + 2,
        "Cohere2VisionImageProcessor",
        size={"height": 512, "width": 512},
        crop_to_patches=True,
    ),
    "ovis2": _crops(
        _by_covering,
        lambda config, vision: int(vision["hidden_stride"]),
        # Begin, grid and end; between tiles, not after the last.
        lambda units: 3 if units == 1 else units + 1,
        "Ovis2ImageProcessor",
        use_covering_area_grid=True,
    ),
    "idefics3": _Rule(_idefics, _IDEFICS_SETTINGS, ("Idefics3ImageProcessor",)),
    "smolvlm": _Rule(_idefics, _IDEFICS_SETTINGS, ("SmolVLMImageProcessor",)),
    "lighton_ocr": _LIGHTON,
    "gemma4": _Rule(
        _gemma4, {"patch_size": 16, "max_soft_tokens": 280, "pooling_kernel_size": 3}, ("Gemma4ImageProcessor",)
    ),
    "llama4": _crops(
        _llama4_tiles,
        lambda config, vision: round(1 / vision["pixel_shuffle_ratio"]),
        # Begin, whole and end; a separator after each tile.
        lambda units: 3 if units == 1 else units + 2,
        "Llama4ImageProcessor",
        _ALWAYS,
        size={"height": 336, "width": 336},
        max_patches=16,
        resize_to_max_canvas=False,
    ),
    "step3p7": _Rule(
        _step,
        {"size": {"height": 728, "width": 728}, "patch_size": 504, "max_image_size": 3024},
        ("Step3p7ImageProcessor",),
    ),
    "got_ocr2": _Rule(_sam, _CROPS | {"size": {"height": 1024, "width": 1024}}, ("GotOcr2ImageProcessor",)),
    "pp_chart2table": _Rule(
        _sam,
        _CROPS | {"size": {"height": 1024, "width": 1024}},
        ("PPChart2TableImageProcessor",),
        forced={"crop_to_patches": False},
    ),
    "molmo2": _Rule(
        _molmo2,
        {"size": {"height": 378, "width": 378}, "patch_size": 14, "pooling_size": (2, 2), "max_crops": 8}
        | {"overlap_margins": (4, 4)},
        ("Molmo2ImageProcessor",),
        {"image_use_col_tokens": True, "use_single_crop_col_tokens": None},
    ),
    "lfm2_vl": _Rule(_lfm2, _LFM2_SETTINGS, ("Lfm2VlImageProcessor",), {"use_image_special_tokens": True}),
}


def _frames(grid: Grid, frames: int) -> tuple[Grid, ...]:
    """Return the frames of a video, numbered."""
    return tuple(replace(grid, frame=frame) for frame in range(frames))


def _frame_side(vision: Settings, videos: Settings, default: Settings) -> int:
    """Return the patches along a side of a frame.

    Raises:
        ValueError: frames are not of the size that the vision tower is made for, so that the model refuses them.
    """
    size = {**default, **videos}
    final = size["crop_size"] if size.get("do_center_crop") else size["size"]
    pixels = _pair(vision["image_size"])
    found = _pair(final) if not isinstance(final, Mapping) or "height" in final else None
    if found != pixels:
        raise ValueError(
            f"the video processor makes frames of {final}, and the vision tower takes {pixels[0]} x {pixels[1]} pixels"
        )
    return pixels[0] // _pair(vision["patch_size"])[0]


_CROPPED = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}


def _onevision_video(config: Settings, vision: Settings, videos: Settings) -> VideoRule:
    side = _frame_side(vision, videos, {"size": {"height": 384, "width": 384}})
    frame = Grid(-(-side // 2), -(-side // 2))  # pooled by two, what that does not divide rounded up

    def rule(frames: int, height: int, width: int) -> ImageUnits:
        patches = side * side
        return ImageUnits((*_frames(frame, frames), _NEWLINE), (patches,) * frames, frames * patches, frames=frames)

    return rule


def _next_video(config: Settings, vision: Settings, videos: Settings) -> VideoRule:
    side = _frame_side(vision, videos, _CROPPED)
    if config.get("spatial_pool_mode", "average") not in ("average", "max"):
        raise ValueError("its video pooling learns, and the cost of that is not known")
    pooled = side // int(config.get("spatial_pool_stride", 2))
    frame = Grid(pooled, pooled)

    def rule(frames: int, height: int, width: int) -> ImageUnits:
        inside = side * side + ("clip" in vision["model_type"])
        return ImageUnits(_frames(frame, frames), (inside,) * frames, frames * frame.tokens, frames=frames)

    return rule


def _video_llava(config: Settings, vision: Settings, videos: Settings) -> VideoRule:
    side = _frame_side(vision, videos, _CROPPED)

    def rule(frames: int, height: int, width: int) -> ImageUnits:
        # Of each frame the CLS token, alone, and its patches.
        grids = tuple(unit for grid in _frames(Grid(side, side), frames) for unit in (_NEWLINE, grid))
        inside = side * side + 1
        return ImageUnits(grids, (inside,) * frames, frames * inside, frames=frames)

    return rule


def _qwen2_video(config: Settings, vision: Settings, videos: Settings) -> VideoRule:
    settings = {"size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}, "patch_size": 14, **videos}
    patch, merge = int(settings["patch_size"]), int(settings.get("merge_size", 2))
    every = int(settings.get("temporal_patch_size", 2))
    least, most = _bounds(settings)
    if settings.get("cap_pixels_per_frame"):
        raise ValueError("cap_pixels_per_frame bounds a video's pixels by its length, and that is not known here")
    windows = vision.get("window_size")

    def rule(frames: int, height: int, width: int) -> ImageUnits:
        rows, columns = _within(height, width, patch * merge, least, most)
        one = _merged(rows // patch, columns // patch, merge, windows and windows // merge // patch)
        times = -(-frames // every)  # the last frame is repeated to fill a temporal patch
        grids = _frames(one.grids[0], times)
        return ImageUnits(grids, one.tower * times, times * one.features, windows=one.windows * times, frames=times)

    return rule


_VIDEO_RULES: dict[str, Callable[[Settings, Settings, Settings], VideoRule]] = {
    "llava_onevision": _onevision_video,
    "llava_next_video": _next_video,
    "video_llava": _video_llava,
    "qwen2_vl": _qwen2_video,
    "qwen2_5_vl": _qwen2_video,
}
"""Types whose videos are counted. Qwen3-VL writes time stamps between frames, whose tokens depend on the file."""
