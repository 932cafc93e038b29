"""Rows: conversations with images and videos, as plain values; what a data set yields. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestrator import registry
from orchestrator.errors import DataError
from orchestrator.spec.components import DataSpec

IMAGE_MARK = "<image>"
"""Marks the place of an image in a turn's text, whatever the model's own placeholder is."""
VIDEO_MARK = "<video>"
"""Marks the place of a video likewise, in rows that have one; in others it is text."""
NUM_FRAMES = 8
"""Frames of a video where nothing else is said, as in Video-LLaVA (arXiv 2311.10122, section 4.1)."""
ERRORS_SHOWN = 20
DROPPED_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ImageReading:
    """How a data set's image and video files become the pictures that the model's processor gets.

    Attributes:
        pad: Whether to pad to a square with the processor's mean colour, as LLaVA-1.5 (`image_aspect_ratio: pad`);
            videos are never padded.
        ambiguous: What to do where transformers' `load_image` and a viewer show different pictures: `fail`, or follow
            one of them.
        num_frames: Frames taken of a video; with `fps` the most.
        fps: Frames taken of a second of a video; None takes `num_frames` of any video.
    """

    pad: bool = False
    ambiguous: Literal["fail", "load_image", "viewer"] = "fail"
    # Not what a file is, but which of its frames are taken: no index depends on it.
    num_frames: int = field(default=NUM_FRAMES, repr=False)
    fps: float | None = field(default=None, repr=False)


AS_IT_IS = ImageReading()


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image or video file and how to read it; opened when its pixels are needed."""

    path: str
    reading: ImageReading = AS_IT_IS
    video: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `text` has an `IMAGE_MARK` (`VIDEO_MARK`) at the place of an image (video)."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation.

    Attributes:
        index: The row's index in its file, before rows are dropped or sampled; error messages name it.
        images: Images and videos in the order of the marks in the turns.
        turns: User and assistant alternating, the user first; before them the system text, if there is one.
        answer_type: Group for accuracies, e.g. `color`; None where the set has no groups.
        columns: What else the data says of the row, for evaluations alone: JSON values by name, such as `answers`.
    """

    index: int
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    answer_type: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def marks(self) -> tuple[str, ...]:
        """What marks the places of its images and videos, each once: `<video>` is text where there is no video."""
        return (IMAGE_MARK, VIDEO_MARK) if any(image.video for image in self.images) else (IMAGE_MARK,)

    @property
    def num_words(self) -> int:
        """Number of words of all turns: LLaVA's measure of length, which needs no tokenizer."""
        return sum(len(turn.text.split()) for turn in self.turns)


class DataSet(Protocol):
    """What `DataSpec.implementation` names: a class built with the spec. Needs no torch."""

    def __init__(self, spec: DataSpec) -> None: ...

    def rows(self) -> Sequence[Row]:
        """Return the usable rows in their order.

        Raises:
            DataError: the file cannot be read or has errors that the spec does not allow.
        """
        ...

    def check(self, every_row: bool = True) -> list[str]:
        """Return the errors that prevent a training run, by row index; empty if there are none.

        Args:
            every_row: Also check every image; False checks the rows alone.
        """
        ...


def data_spec(value: DataSpec | Mapping[str, Any]) -> DataSpec:
    """Return a data set's spec from its mapping."""
    if isinstance(value, DataSpec):
        return value
    spec: DataSpec = registry.spec_class(registry.DATA, value["kind"]).model_validate(dict(value))
    return spec


def described(spec: DataSpec) -> str:
    """Return a data set's kind and first path, for messages."""
    return " ".join([f"data of kind {spec.kind}", *(str(getattr(spec, name)) for name in spec.path_fields[:1])])


def template_of(spec: DataSpec) -> str:
    """Return a data set's conversation template; the tokenizer's own where the kind has no such setting."""
    return str(getattr(spec, "conversation_template", "chat_template"))


def open_data_set(spec: DataSpec) -> DataSet:
    """Return the implementation of a data set's spec."""
    found: DataSet = registry.load_object(spec.implementation)(spec)
    return found


def raise_for_errors(where: str, errors: Sequence[str]) -> None:
    """Report all errors at once: the first 20 and how many there are.

    Raises:
        DataError: there is at least one.
    """
    if errors:
        count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
        raise DataError(f"{where}: {lines_of([count, *errors], ERRORS_SHOWN + 1)}")


def lines_of(errors: Sequence[str], most: int = ERRORS_SHOWN) -> str:
    """Return the first errors, one a line, and how many more there are."""
    more = [f"... and {len(errors) - most} more"] if len(errors) > most else []
    return "\n    ".join([*errors[:most], *more])


def dropped_text(bad: Mapping[int, str], num_rows: int) -> str:
    """Return a message of how many rows are dropped, which, and why: the first few."""
    first = "; ".join(f"row {index}: {reason}" for index, reason in islice(bad.items(), DROPPED_SHOWN))
    more = f"; ... and {len(bad) - DROPPED_SHOWN:,} more" if len(bad) > DROPPED_SHOWN else ""
    return f"{len(bad):,} of {num_rows:,} rows dropped; {first}{more}"


def evenly_spread(count: int, wanted: int | None) -> Sequence[int]:
    """Return `wanted` of `count` indices at equal distances; all of them if `wanted` is None or not smaller."""
    if wanted is None or wanted >= count:
        return range(count)
    return [position * count // wanted for position in range(wanted)]


def file_exists(path: str | Path) -> bool:
    """Return whether a path is a regular file; a name that the file system cannot hold counts as absent."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
