"""A row's images through the model's own processor: the text that stands for each, and the tensors."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from PIL import Image

from orchestrator.data.processing.templates import takes_suffix
from orchestrator.data.records.image_files import BadImage, image_size, open_image, pad_to_square
from orchestrator.data.rows import ImageRef
from orchestrator.errors import DataError, UsageError

Value = TypeVar("Value")
PIXEL_CACHE_BYTES = 512 * 2**20
TEXT_CACHE_BYTES = 64 * 2**20
IMAGE_THREADS = 4
# Any two differ in every respect that may matter to an image processor.
_PROBE_SIZES = ((336, 336), (100, 700), (1500, 1000))
# Outputs of a processor that are not image inputs.
_OF_THE_TEXT = {
    "input_ids",
    "attention_mask",
    "labels",
    "token_type_ids",
    "mm_token_type_ids",
    "text_replacement_offsets",
}

Tensors = dict[str, torch.Tensor]
Sizes = tuple[tuple[int, int], ...]


class BoundedCache(Generic[Value]):
    """A least-recently-used cache; threads may share it.

    Args:
        max_bytes: Maximum size of all values; a larger value is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Value | None:
        """Return the value, or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Keep a value of `num_bytes`."""
        if num_bytes > self._max_bytes:
            return
        with self._lock:
            if key in self._values:
                self._bytes -= self._values.pop(key)[1]
            self._values[key] = (value, num_bytes)
            self._bytes += num_bytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._values.popitem(last=False)[1][1]


@dataclass(frozen=True)
class ImageText:
    """The text that stands for one image, each run of visual placeholders written as a single one.

    Attributes:
        text: Placeholders and the family's markers: separators of tiles or rows, begin and end.
        runs: Number of visual tokens that each placeholder of `text` stands for.
    """

    text: str
    runs: tuple[int, ...]

    @property
    def num_visual_tokens(self) -> int:
        """Number of visual tokens of the image."""
        return sum(self.runs)


class RowImages:
    """Runs the processor on the images of one row at a time, since some processors treat a single image differently.

    Outputs of rows are joined to what the processor would give for all of them: families differ in the axis that they
    pad (tiles, pixels), and all pad at the end and with zeros.

    Args:
        processor: The processor from `AutoProcessor`.
        image_token: Stands for one image in a text that the processor reads.
        visual_token: Stands for one visual token in the text that it writes.
    """

    def __init__(self, processor: Any, image_token: str, visual_token: str) -> None:
        self._processor, self._image_token, self._visual_token = processor, image_token, visual_token
        self._run = re.compile(f"(?:{re.escape(visual_token)})+")
        self._sizes: Mapping[str, tuple[int, int]] = {}
        self._tensors: BoundedCache[Tensors] = BoundedCache(PIXEL_CACHE_BYTES)
        self._texts: BoundedCache[tuple[ImageText, ...]] = BoundedCache(TEXT_CACHE_BYTES)

    def know_sizes(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Set height and width of images by path, so that their files need not be opened for it."""
        self._sizes = sizes

    @cached_property
    def fixed_text(self) -> ImageText | None:
        """The text that stands for an image, if it is the same for all images; else None."""
        rows: list[Sizes] = [*((size,) for size in _PROBE_SIZES), _PROBE_SIZES[:2]]
        found = {text for row in rows for text in self._apply([_grey(size) for size in row])[1]}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def _reads_images_alone(self) -> bool:
        """Whether the processor takes images without a text: a text takes as long as a small image."""
        if self.fixed_text is None:
            return False
        try:
            return bool(_tensors_of(self._alone([_grey((64, 64))])))
        except (ValueError, TypeError, AttributeError):
            return False

    def _alone(self, images: list[Image.Image]) -> Any:
        return self._processor(images=[images], images_kwargs={"return_tensors": "pt"})

    @cached_property
    def _one_entry_per_row(self) -> bool:
        """Whether the first axis is rows, not images; a row without images then has an entry of zeros."""
        tensors, _ = self._apply([_grey((64, 64))] * 2)
        return len(next(iter(tensors.values()))) == 1

    @cached_property
    def token_type_name(self) -> str | None:
        """Name of the processor's token types, if they tell visual tokens or a suffix from others; else None."""
        given = self._given([_grey((64, 64))])
        if "mm_token_type_ids" in given:
            return "mm_token_type_ids"
        types = given.get("token_type_ids")
        says = types is not None and (takes_suffix(self._processor) or any(map(bool, types[0])))
        return "token_type_ids" if says else None

    def texts(self, images: Sequence[ImageRef]) -> tuple[ImageText, ...]:
        """Return the text for each image of a row; it depends on their sizes only, in all processors.

        Raises:
            DataError: an image cannot be read.
        """
        if not images:
            return ()
        if self.fixed_text is not None:
            return (self.fixed_text,) * len(images)
        found = self._texts.get(tuple(self._sizes.get(image.path) or _size_of(image) for image in images))
        # The pixels are needed soon after, so the row itself is processed rather than blank images of its sizes.
        return self._read(tuple(images))[1] if found is None else found

    def tensors(self, rows: Sequence[Sequence[ImageRef]]) -> Tensors:
        """Return the model's image inputs of a batch; empty if no row has an image.

        Args:
            rows: Images of each row.

        Raises:
            DataError: an image cannot be read; nothing replaces it.
        """
        wanted = [tuple(row) for row in rows]
        known = {row: self._tensors.get(row) for row in wanted if row}
        if not known:
            return {}
        missing = [row for row, tensors in known.items() if tensors is None]
        known |= dict(zip(missing, self._read_all(missing), strict=True))
        parts = [known[row] for row in wanted if row]
        first = parts[0]
        assert first is not None
        if len(parts) < len(rows) and self._one_entry_per_row:
            empty = {name: value.new_zeros((1, *[0] * (value.ndim - 1))) for name, value in first.items()}
            parts = [known[row] if row else empty for row in wanted]
        return {name: _join([part[name] for part in parts if part is not None]) for name in first}

    def _read_all(self, rows: Sequence[tuple[ImageRef, ...]]) -> list[Tensors]:
        if len(rows) < 2:
            return [self._read(row)[0] for row in rows]
        # PIL and numpy release the interpreter lock while they decode and scale.
        with ThreadPoolExecutor(max_workers=IMAGE_THREADS) as pool:
            return [tensors for tensors, _ in pool.map(self._read, rows)]

    def _read(self, row: tuple[ImageRef, ...]) -> tuple[Tensors, tuple[ImageText, ...]]:
        images = [self._open(image) for image in row]
        try:
            if self._reads_images_alone and self.fixed_text is not None:
                tensors, texts = _tensors_of(self._alone(images)), (self.fixed_text,) * len(images)
            else:
                tensors, texts = self._apply(images)
        except (OSError, ValueError) as error:
            paths = ", ".join(image.path for image in row)
            raise DataError(f"{paths} cannot be read by the model's processor: {error}") from error
        sizes = tuple((image.height, image.width) for image in images)
        self._texts.put(sizes, texts, sum(len(text.text) + 8 * len(text.runs) for text in texts))
        self._tensors.put(row, tensors, sum(value.nbytes for value in tensors.values()))
        return tensors, texts

    def _open(self, image: ImageRef) -> Image.Image:
        with _as_data_error(image):
            opened = open_image(image.path, image.reading)
        return pad_to_square(opened, self._mean_colour) if image.reading.pad else opened

    @cached_property
    def _mean_colour(self) -> tuple[int, ...]:
        """The image processor's mean as a colour, with which LLaVA pads.

        Raises:
            UsageError: it has no mean of three channels.
        """
        mean = getattr(self._processor.image_processor, "image_mean", None)
        if mean is None or len(mean) != 3:
            raise UsageError(
                f"image_aspect_ratio: pad needs the processor's mean colour, but "
                f"{type(self._processor.image_processor).__name__} has image_mean {mean}; leave the key out"
            )
        return tuple(int(value * 255) for value in mean)

    def _apply(self, images: list[Image.Image]) -> tuple[Tensors, tuple[ImageText, ...]]:
        """Return the tensors and texts of a row's images."""
        given = self._given(images)
        written = [entry["replacement"] for entry in given["text_replacement_offsets"][0]]
        return _tensors_of(given), tuple(map(self._image_text, written))

    def _given(self, images: list[Image.Image]) -> Any:
        """Return the processor's output for a row of images alone.

        Raises:
            UsageError: it does not report what it writes for an image.
        """
        try:
            given = self._processor(
                text=[self._image_token * len(images)],
                images=[images],
                return_text_replacement_offsets=True,
                images_kwargs={"return_tensors": "pt"},
            )
            if len(given["text_replacement_offsets"][0]) == len(images):
                return given
            reason = "its text has no replacements"
        # Raised by processors without replacements: an unknown argument, key or method, or one not implemented.
        except (KeyError, TypeError, NotImplementedError, AttributeError) as error:
            reason = repr(error)
        raise UsageError(
            f"model: {type(self._processor).__name__} does not report what it writes for an image: {reason}; rows with "
            "images need a processor that returns `text_replacement_offsets` (transformers 5.20 and later)"
        )

    def _image_text(self, text: str) -> ImageText:
        runs = tuple(len(found.group()) // len(self._visual_token) for found in self._run.finditer(text))
        if not runs:
            raise UsageError(
                f"model: {type(self._processor).__name__} writes {text[:80]!r} for an image, without the model's "
                f"placeholder {self._visual_token!r}; processor and config do not match"
            )
        return ImageText(self._run.sub(lambda _: self._visual_token, text), runs)


def _tensors_of(given: Any) -> Tensors:
    return {
        name: value for name, value in given.items() if name not in _OF_THE_TEXT and isinstance(value, torch.Tensor)
    }


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the first axis, padded with zeros to the largest size of every other axis."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    joined = parts[0].new_zeros((sum(map(len, parts)), *largest))
    first = 0
    for part in parts:
        place = (slice(first, first + len(part)), *(slice(size) for size in part.shape[1:]))
        joined[place] = part
        first += len(part)
    return joined


def _size_of(image: ImageRef) -> tuple[int, int]:
    with _as_data_error(image):
        return image_size(image.path, image.reading)


def _grey(size_hw: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", (size_hw[1], size_hw[0]), (127, 127, 127))


@contextmanager
def _as_data_error(image: ImageRef) -> Iterator[None]:
    """Raise the errors of an image file as DataErrors."""
    try:
        yield
    except BadImage as error:
        raise DataError(f"{image.path} {error}; restore the file, or check the data set") from error
    except OSError as error:
        raise DataError(f"{image.path} cannot be read: {error}") from error
