"""What a data set yields: conversations with images, as plain values. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from orchestrator import registry
from orchestrator.errors import DataError

if TYPE_CHECKING:
    from orchestrator.spec.components import DataSpec

IMAGE_MARK = "<image>"
"""Stands in a turn's text where an image belongs, whatever the model's own placeholder is."""
FAULTS_SHOWN = 20
DROPPED_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ImageReading:
    """How a data set's image files become the pictures that the model's processor gets.

    Attributes:
        pad: Padded to a square with the processor's mean colour, as LLaVA-1.5 does (`image_aspect_ratio: pad`).
        ambiguous: What to do where transformers' `load_image` and a viewer show different things: `fail`, or follow
            one of them.
    """

    pad: bool = False
    ambiguous: Literal["fail", "load_image", "viewer"] = "fail"


AS_IT_IS = ImageReading()


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image by its file and how to read it; opened when its pixels are needed."""

    path: str
    reading: ImageReading = AS_IT_IS


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says; `text` holds an `IMAGE_MARK` where an image belongs."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation.

    Attributes:
        index: The row's index in its file, before rows are dropped or sampled; what faults are told by.
        images: In the order of the marks in the turns.
        turns: User and assistant in turns, the user first; before them the system's, where the row has one.
        answer_type: Group for accuracies, e.g. `color`; None where the set has none.
    """

    index: int
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    answer_type: str | None = None

    @property
    def num_words(self) -> int:
        """Words of all turns: LLaVA's measure of length, which needs no tokenizer."""
        return sum(len(turn.text.split()) for turn in self.turns)


class DataSet(Protocol):
    """What `DataSpec.implementation` names: a class built with the spec. Needs no torch."""

    def __init__(self, spec: DataSpec) -> None: ...

    def rows(self) -> Sequence[Row]:
        """Return the usable rows in their order.

        Raises:
            DataError: the file cannot be read or has faults that the spec does not allow.
        """
        ...

    def check(self, every_row: bool = True) -> list[str]:
        """Return the faults that forbid a training run, told by row index; empty where there is none.

        Args:
            every_row: Also open every image's header; False looks at the rows alone.
        """
        ...


def open_data_set(spec: DataSpec) -> DataSet:
    """Return the implementation of a data set's spec."""
    found: DataSet = registry.load_object(spec.implementation)(spec)
    return found


def raise_for_faults(where: str, faults: Sequence[str]) -> None:
    """Tell all faults at once: the first 20 and how many there are.

    Raises:
        DataError: there is at least one fault.
    """
    if not faults:
        return
    lines = [f"{where}: {len(faults)} fault{'s' if len(faults) > 1 else ''}", *faults[:FAULTS_SHOWN]]
    if len(faults) > FAULTS_SHOWN:
        lines.append(f"... and {len(faults) - FAULTS_SHOWN} more")
    raise DataError("\n    ".join(lines))


def dropped_text(bad: Mapping[int, str], num_rows: int) -> str:
    """Return how many rows are left out, which, and why: the first few."""
    told = "; ".join(f"row {index}: {reason}" for index, reason in islice(bad.items(), DROPPED_SHOWN))
    more = f"; ... and {len(bad) - DROPPED_SHOWN:,} more" if len(bad) > DROPPED_SHOWN else ""
    return f"{len(bad):,} of {num_rows:,} rows dropped; {told}{more}"


def evenly_spread(count: int, wanted: int | None) -> Sequence[int]:
    """Return `wanted` of `count` indices at equal distances, all of them where `wanted` is None or not fewer."""
    if wanted is None or wanted >= count:
        return range(count)
    return [position * count // wanted for position in range(wanted)]


def file_exists(path: str | Path) -> bool:
    """Return True for a readable regular file; a name the file system cannot hold counts as absent."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
