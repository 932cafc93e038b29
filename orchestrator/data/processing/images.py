"""A row's images and videos through the model's own processor: the text that stands for each, and the tensors."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from orchestrator.data.processing.templates import takes_suffix
from orchestrator.data.records.image_files import BadImage, image_size, open_image, pad_to_square
from orchestrator.data.records.video_files import Clip, clip_of, frames_of, open_frames
from orchestrator.data.rows import ImageRef
from orchestrator.errors import DataError, UsageError

Value = TypeVar("Value")
PIXEL_CACHE_BYTES = 512 * 2**20
TEXT_CACHE_BYTES = 64 * 2**20
IMAGE_THREADS = 4
# Any two differ in every respect that may matter to an image processor.
_PROBE_SIZES = ((336, 336), (100, 700), (1500, 1000))
_SECONDS = "second_per_grid_ts"
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


class Placeholders(NamedTuple):
    """What stands for images, or for videos, in texts.

    Attributes:
        whole: Stands for one of them in a text that the processor reads.
        visual: Stands for one visual token in the text that it writes.
    """

    whole: str
    visual: str


class _Sampled(NamedTuple):
    """What the text that stands for a video depends on: the frames that are taken, and of what clip."""

    frames: tuple[int, ...]
    clip: Clip


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
    """The text that stands for one image or video, each run of visual placeholders written as a single one.

    Attributes:
        text: Placeholders and the family's markers: separators of tiles or rows, begin and end, time stamps.
        runs: Number of visual tokens that each placeholder of `text` stands for.
    """

    text: str
    runs: tuple[int, ...]

    @property
    def num_visual_tokens(self) -> int:
        """Number of its visual tokens."""
        return sum(self.runs)


class RowImages:
    """Runs the processor on the images of one row at a time, since some processors treat a single image differently.

    Outputs of rows are joined to what the processor would give for all of them: families differ in the axis that they
    pad (tiles, pixels), and all pad at the end and with zeros. Videos of several lengths are joined where the processor
    makes patches of them, and refused where a batch has one length.

    Args:
        processor: The processor from `AutoProcessor`.
        images: What stands for images.
        videos: What stands for videos; None where the processor reads none.
    """

    def __init__(self, processor: Any, images: Placeholders, videos: Placeholders | None = None) -> None:
        self._processor, self._images, self._videos = processor, images, videos
        self._sizes: Mapping[str, tuple[int, int]] = {}
        self._clips: Mapping[str, Clip] = {}
        self._tensors: BoundedCache[Tensors] = BoundedCache(PIXEL_CACHE_BYTES)
        self._texts: BoundedCache[tuple[ImageText, ...]] = BoundedCache(TEXT_CACHE_BYTES)

    def know_sizes(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Set height and width of images by path, so that their files need not be opened for it."""
        self._sizes = sizes

    def know_clips(self, clips: Mapping[str, Clip]) -> None:
        """Say what videos hold, by path, so that their files need not be decoded for it; earlier ones stay known."""
        self._clips = {**self._clips, **clips}

    def clip(self, video: ImageRef) -> Clip:
        """Return what a video holds.

        Raises:
            DataError: it cannot be read.
        """
        with _as_data_error(video):
            return self._clips.get(video.path) or clip_of(video.path)

    @cached_property
    def fixed_text(self) -> ImageText | None:
        """The text that stands for an image, if it is the same for all images; else None. Videos are others."""
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

    def _alone(self, images: Sequence[Image.Image | _Video]) -> Any:
        return self._processor(images=[list(images)], images_kwargs={"return_tensors": "pt"})

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
        """Return the text for each image of a row; it depends on their sizes only, in all processors, and that of a
        video on the frames that are taken too.

        Raises:
            DataError: an image cannot be read.
        """
        if not images:
            return ()
        if self.fixed_text is not None and not any(image.video for image in images):
            return (self.fixed_text,) * len(images)
        found = self._texts.get(self.shapes(images))
        # The pixels are needed soon after, so the row itself is processed rather than blank images of its sizes.
        return self._read(tuple(images))[1] if found is None else found

    def shapes(self, images: Sequence[ImageRef]) -> tuple[Hashable, ...]:
        """Return what the text of each image and video depends on.

        Raises:
            DataError: one cannot be read.
        """
        return tuple(
            self._sampled(image) if image.video else self._sizes.get(image.path) or _size_of(image) for image in images
        )

    def _sampled(self, video: ImageRef) -> _Sampled:
        clip = self.clip(video)
        with _as_data_error(video):
            return _Sampled(frames_of(clip, video.reading), clip)

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
        parts = [known[row] or {} if row else {} for row in wanted]
        examples: Tensors = {}
        for part in parts:
            examples = {**part, **examples}
        if not all(parts) and self._one_entry_per_row:
            empty = {name: value.new_zeros((1, *[0] * (value.ndim - 1))) for name, value in examples.items()}
            parts = [part or empty for part in parts]
        joined: Tensors = {}
        for name in examples:
            values = [part[name] for part in parts if name in part]
            if name.endswith("_videos") and len({value.shape[1:] for value in values}) > 1:
                lengths = ", ".join(str(length) for length in sorted({value.shape[1] for value in values}))
                raise DataError(
                    f"videos of {lengths} frames in one batch, of which {type(self._processor).__name__} takes one "
                    "length; leave fps out, or give one num_frames"
                )
            joined[name] = _join(values)
        return joined

    def _read_all(self, rows: Sequence[tuple[ImageRef, ...]]) -> list[Tensors]:
        if len(rows) < 2:
            return [self._read(row)[0] for row in rows]
        # PIL and numpy release the interpreter lock while they decode and scale.
        with ThreadPoolExecutor(max_workers=IMAGE_THREADS) as pool:
            return [tensors for tensors, _ in pool.map(self._read, rows)]

    def _read(self, row: tuple[ImageRef, ...]) -> tuple[Tensors, tuple[ImageText, ...]]:
        images = [self._frames(image) if image.video else self._open(image) for image in row]
        try:
            if self._reads_images_alone and self.fixed_text is not None and not any(image.video for image in row):
                tensors, texts = _tensors_of(self._alone(images)), (self.fixed_text,) * len(images)
            else:
                tensors, texts = self._apply(images)
        except (OSError, ValueError) as error:
            paths = ", ".join(image.path for image in row)
            raise DataError(f"{paths} cannot be read by the model's processor: {error}") from error
        sizes = tuple(image.told if isinstance(image, _Video) else (image.height, image.width) for image in images)
        self._texts.put(sizes, texts, sum(len(text.text) + 8 * len(text.runs) for text in texts))
        self._tensors.put(row, tensors, sum(value.nbytes for value in tensors.values()))
        return tensors, texts

    def _open(self, image: ImageRef) -> Image.Image:
        with _as_data_error(image):
            opened = open_image(image.path, image.reading)
        return pad_to_square(opened, self._mean_colour) if image.reading.pad else opened

    def _frames(self, video: ImageRef) -> _Video:
        if self._videos is None:
            raise DataError(
                f"{video.path} is a video, and {type(self._processor).__name__} reads none here: the model takes none, "
                "or its video processor needs torchvision"
            )
        told = self._sampled(video)
        with _as_data_error(video):
            return _Video(open_frames(video.path, told.frames, told.clip), told)

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

    def _apply(self, images: Sequence[Image.Image | _Video]) -> tuple[Tensors, tuple[ImageText, ...]]:
        """Return the tensors and texts of a row's images and videos."""
        given = self._given(images)
        written = [entry["replacement"] for entry in given["text_replacement_offsets"][0]]
        kinds = [self._kind(image) for image in images]
        return _tensors_of(given), tuple(map(self._image_text, written, kinds))

    def _kind(self, image: Image.Image | _Video) -> Placeholders:
        found = self._videos if isinstance(image, _Video) else self._images
        assert found is not None  # or the video would not have been opened
        return found

    def _given(self, images: Sequence[Image.Image | _Video]) -> Any:
        """Return the processor's output for a row of images and videos alone.

        Raises:
            UsageError: it does not report what it writes for an image.
        """
        videos = [image for image in images if isinstance(image, _Video)]
        pictures = [image for image in images if not isinstance(image, _Video)]
        inputs: dict[str, Any] = {"images": [pictures], "images_kwargs": {"return_tensors": "pt"}} if pictures else {}
        if videos:
            inputs["videos"] = [torch.from_numpy(video.frames_THWC).permute(0, 3, 1, 2) for video in videos]
            inputs["videos_kwargs"] = {
                "return_tensors": "pt",
                "do_sample_frames": False,  # they are, by the data's own settings
                "input_data_format": "channels_first",
                "video_metadata": [video.metadata for video in videos],
            }
        try:
            given = self._processor(
                text=["".join(self._kind(image).whole for image in images)],
                return_text_replacement_offsets=True,
                **inputs,
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

    def _image_text(self, text: str, kind: Placeholders) -> ImageText:
        run = re.compile(f"(?:{re.escape(kind.visual)})+")
        runs = tuple(len(found.group()) // len(kind.visual) for found in run.finditer(text))
        if not runs:
            raise UsageError(
                f"model: {type(self._processor).__name__} writes {text[:80]!r} for {kind.whole}, without the model's "
                f"placeholder {kind.visual!r}; processor and config do not match"
            )
        return ImageText(run.sub(lambda _: kind.visual, text), runs)


class _Video(NamedTuple):
    """A video as the processor gets it: the frames that are taken (T, height, width, 3) uint8, and what they are of."""

    frames_THWC: np.ndarray
    told: _Sampled

    @property
    def metadata(self) -> dict[str, Any]:
        """Which frames of the file they are, and its frames a second: some processors write it into the text."""
        return {
            "total_num_frames": self.told.clip.frames,
            "fps": self.told.clip.rate or None,
            "frames_indices": list(self.told.frames),
        }


def _tensors_of(given: Any) -> Tensors:
    found = {}
    for name, value in given.items():
        if name == _SECONDS:  # Qwen2.5-VL gives a list
            value = torch.tensor([float(each) for each in value], dtype=torch.float32)
        if name not in _OF_THE_TEXT and isinstance(value, torch.Tensor):
            found[name] = value
    return found


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
