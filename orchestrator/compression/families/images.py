"""What most families share: features of a vision tower take the places of image (and video) placeholders, in order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orchestrator.compression.families.base import Family
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid

Units = tuple[Grid, ...]
"""The units one image or video becomes, in the order of its placeholders."""

_SIZE_NAME = "llavolta_image_size"


class ImagesFamily(Family):
    """A family with `image_token_id` (and perhaps `video_token_id`) in its config and features in order of the batch.

    As it stands, every entry of `pixel_values` becomes one grid of tokens. A family is mostly a few of these
    attributes:

    Attributes:
        language_name: Attribute of the inner model that holds the decoder stack.
        projector_name: Path inside the inner model of the module that maps visual features token by token; None
            where the model has none such.
        sized: Tokens follow from `image_sizes`. `generate` hands the model ready features without these, so while a
            model is attached each image's features carry its size.
        one_size: Images of which a batch holds placeholders only have the size the tower is made for.
        two_towers: Images or videos pass parameters that the others do not.
        pixels_by_row: An entry of `pixel_values` is a row's images, padded to those of the row with most.
        sizes_name: The argument that holds the images' sizes, where units cannot be told without it.
    """

    language_name = "language_model"
    projector_name: ClassVar[str | None] = None
    sized = False
    one_size = True
    pixels_by_row = False
    two_towers = False
    sizes_name: ClassVar[str | None] = None

    @property
    def inner(self) -> Any:
        """What holds tower, projector and decoder: the model inside the top model, or itself where there is none."""
        return getattr(self.model, "model", self.model)

    def find_language_model(self) -> nn.Module:
        """Return `model.<language_name>`."""
        language_model = getattr(self.inner, self.language_name, None)
        if not isinstance(language_model, nn.Module):
            raise self.cannot_serve(f"it has no model.{self.language_name}")
        if self.token_ids[0] is None:
            raise self.cannot_serve("its config has no image_token_id")
        return language_model

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of the image that the model merges into one token."""
        return 1

    @property
    def projector(self) -> nn.Module | None:
        """The module named by `projector_name`."""
        return None if self.projector_name is None else self.inner.get_submodule(self.projector_name)

    @property
    def vision_width(self) -> int | None:
        """Width of the tower times the patches of a token, whose features lie side by side."""
        if self.projector_name is None:
            return None
        return int(self.model.config.vision_config.hidden_size) * self.patches_per_side**2

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels (height, width) of what the vision tower is made for."""
        return pair(self.model.config.vision_config.image_size)

    def grid_of(self, height_pixels: int, width_pixels: int) -> Grid:
        """Return the grid of tokens of an image, tile or frame, from its size in pixels."""
        height, width = pair(self.model.config.vision_config.patch_size)
        side = self.patches_per_side
        return Grid(height_pixels // height // side, width_pixels // width // side)

    @property
    def usual_grid(self) -> Grid:
        """The grid of an image of the size that the vision tower is made for."""
        return self.grid_of(*self.image_size)

    @property
    def token_ids(self) -> tuple[int | None, int | None]:
        """Token ids of image and video placeholders; None where there is none."""
        config = self.model.config
        return getattr(config, "image_token_id", None), getattr(config, "video_token_id", None)

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units of each image the batch brings, in order: by default one for each entry of `pixel_values`,
        or of ready features.
        """
        pixels, features = inputs.get("pixel_values"), ready_features(inputs, "image")
        if pixels is not None:
            return [(self.grid_of(*pixels.shape[-2:]),)] * len(pixels)
        return [(self.usual_grid,)] * (len(features) if features is not None else 0)

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units of each video the batch brings, in order."""
        return []

    @property
    def knows_videos(self) -> bool:
        """True where it says what the units of a video are."""
        return type(self).video_units is not ImagesFamily.video_units

    def units_unseen(self, num_placeholders: int) -> list[Grid]:
        """Return the units of placeholders where the batch brings neither pixels nor features.

        Raises:
            UsageError: images of this family differ in size.
        """
        if not self.one_size:
            raise UsageError(
                f"compression: input_ids hold {num_placeholders} image placeholders but the batch has no images; pass "
                "pixel_values (and image_sizes where the processor gives them)"
            )
        return [self.usual_grid] * (num_placeholders // self.usual_grid.tokens)

    def grids(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """Return the units of images and videos as they stand in the rows."""
        images, videos = self.image_units(inputs), [numbered(units) for units in self.video_units(inputs)]
        if not images and not videos:
            return self.units_unseen(num_placeholders)
        if not images or not videos:
            return [grid for units in images or videos for grid in units]
        ids = inputs["input_ids"].flatten()
        is_video = ids[self.visual_BN(ids)] == self.token_ids[1]
        return list(interleaved(images, videos, is_video))

    def num_visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Return the tokens of all units; of images that `generate` encoded before, whose sizes (`sizes_name`) it
        leaves out, the placeholders.
        """
        is_ready = any(ready_features(inputs, kind) is not None for kind in ("image", "video"))
        if self.sizes_name and inputs.get(self.sizes_name) is None and is_ready:
            return int(self.visual_BN(inputs["input_ids"]).sum())
        return sum(grid.tokens for units in self.image_units(inputs) + self.video_units(inputs) for grid in units)

    def empty_image(self) -> dict[str, Any]:
        """Return the arguments of `get_image_features` for one small image."""
        return {"pixel_values": self.blank(1, self.model.config.vision_config.num_channels, *self.image_size)}

    def blank(self, *shape: int) -> Tensor:
        """Return the pixels of a blank image (ones: some models take an image of zeros for padding)."""
        parameter = next(self.model.parameters())
        return torch.ones(*shape, device=parameter.device, dtype=parameter.dtype)

    def idle_features(self) -> Tensor:
        """Return the features of a blank image."""
        return flat_features(self.inner.get_image_features(**self.empty_image()))

    def idle_video_features(self) -> Tensor:
        """Return features that are computed by the modules a video passes, in their order: most families have the same
        for both.
        """
        return self.idle_features()

    def enter(self) -> None:
        """Features of an image are to carry its size."""
        if self.sized:
            _remember_sizes(self.inner)

    def leave(self) -> None:
        """Take that out again."""
        self.inner.__dict__.pop("get_image_features", None)


def numbered(units: Units) -> Units:
    """Return the units of a video with their numbers as frames; those of one token (newline, CLS) are none."""
    number = count()
    return tuple(replace(grid, frame=next(number)) if grid.tokens > 1 else grid for grid in units)


def pair(size: Any) -> tuple[int, int]:
    """Return the height and width of what a config gives as one number or two."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def ready_features(inputs: Mapping[str, Any], kind: str) -> Any:
    """Return the features of `image` or `video` that the caller (or `generate`) computed before; None where there are
    none.
    """
    ready = inputs.get("mm_encoder_outputs")
    output = ready.get(kind) if isinstance(ready, Mapping) else None
    return None if output is None else getattr(output, "pooler_output", output)


def flat_features(output: Any) -> Tensor:
    """Return the result of `get_image_features` (a tensor, several, or an output that holds them) as L x D."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([one.flatten(0, -2) for one in features])


def size_of(features: Tensor) -> tuple[int, int] | None:
    """Return the size in pixels (height, width) of the image that features were computed from while the model was
    attached.
    """
    remembered = getattr(features, _SIZE_NAME, None)
    if remembered is None:
        return None
    sizes, number = remembered
    return pair(torch.as_tensor(sizes)[number].tolist())


def sizes_of_images(inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the sizes in pixels of the batch's images, from `image_sizes` or the features that carry them.

    Raises:
        UsageError: neither holds them.
    """
    ready = ready_features(inputs, "image")
    if ready is None and inputs.get("pixel_values") is None:
        return []
    given = inputs.get("image_sizes")
    if given is not None:
        return [pair(size) for size in torch.as_tensor(given).tolist()]
    sizes = [size_of(one) for one in ready] if ready is not None else [None]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        raise UsageError(
            "compression: the sizes of the images are not known; pass image_sizes, or features that the model's "
            "get_image_features computed after attach()"
        )
    return known


def interleaved(images: Sequence[Units], videos: Sequence[Units], is_video_P: Tensor) -> Iterator[Grid]:
    """Return the units in the order of the placeholders.

    Args:
        images: Units of each image.
        videos: Units of each video.
        is_video_P: For each placeholder of the batch whether it is a video's.

    Raises:
        UsageError: placeholders and inputs do not match.
    """
    left = {False: list(reversed(images)), True: list(reversed(videos))}
    kinds, place = is_video_P.tolist(), 0
    while place < len(kinds):
        video = kinds[place]
        if not left[video]:
            raise UsageError(
                f"compression: input_ids hold more {'video' if video else 'image'} placeholders than the batch's "
                f"{len(videos if video else images)} {'videos' if video else 'images'} have visual tokens"
            )
        units = left[video].pop()
        place += sum(grid.tokens for grid in units)
        yield from units
    for units in reversed(left[False] + left[True]):  # more than placeholders: an error where both are counted
        yield from units


def _remember_sizes(inner: Any) -> None:
    original = type(inner).get_image_features
    signature = inspect.signature(original)

    @functools.wraps(original)  # generate() reads the signature
    def remembering(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        sizes = signature.bind(self, *args, **kwargs).arguments.get("image_sizes", kwargs.get("image_sizes"))
        features = getattr(output, "pooler_output", None)
        if sizes is not None and isinstance(features, (list, tuple)):
            for number, one in enumerate(features):
                # Kept as they came: reading them would wait for the device, and most forwards need not know.
                setattr(one, _SIZE_NAME, (sizes, number))
        return output

    inner.__dict__["get_image_features"] = MethodType(remembering, inner)
