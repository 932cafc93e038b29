"""What data kinds of records share: settings, the rows of their index, and what is said of bad ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from orchestrator.data.records.conversations import READ_KEYS, RecordOptions, error_lines
from orchestrator.data.rows import (
    NUM_FRAMES,
    ImageReading,
    dropped_text,
    evenly_spread,
    open_data_set,
    raise_for_errors,
)
from orchestrator.errors import DataError
from orchestrator.spec.base import Count, Positive
from orchestrator.spec.components import DataSpec

if TYPE_CHECKING:
    from orchestrator.data.records.row_index import IndexedRows, RowIndex


class RecordsSpec(DataSpec):
    """A data set of records in LLaVA's conversation format, some of which may be bad.

    Its implementation is a `RecordSet`.
    """

    not_identity: ClassVar[frozenset[str]] = frozenset({"num_samples", "max_bad_share"})

    image_aspect_ratio: Literal["pad"] | None = None
    """How an image becomes square. `pad`: padded with the processor's mean colour, as LLaVA-1.5 does in finetuning and
    tests; null: the processor's own way, which may cut an image's sides off.
    """
    ambiguous_images: Literal["fail", "load_image", "viewer"] = "fail"
    """What to do with images that transformers' `load_image` and a viewer show differently, by transparency or by
    several frames: `fail` (a bad row), `load_image` (colours beneath transparency, first frame), `viewer` (on white,
    first frame).
    """
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows and turns that may be left out; any other unknown key with content is an error."""
    conversation_template: Literal["plain", "vicuna_v1", "chat_template"] = "chat_template"
    """How turns become text: `plain` (LLaVA's pretraining), `vicuna_v1` (LLaVA-1.5), or the tokenizer's own."""
    on_bad_row: Literal["fail", "drop"] = "fail"
    """What to do with rows that cannot be used: `fail`, or `drop` them and report how many."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """With `on_bad_row: drop`, the largest share of rows that may be dropped; more is an error."""
    num_samples: Count | None = None
    """Rows of the data, so that `plan` works without it; checked where it is present. null counts them."""

    @property
    @abstractmethod
    def source(self) -> str:
        """What the rows are read from, for messages."""

    @abstractmethod
    def is_here(self) -> bool:
        """Return whether the data is on this machine."""

    @abstractmethod
    def source_digest(self) -> str:
        """Return the SHA-256 of the content of what the rows are read from.

        Raises:
            FileNotFoundError: it does not exist.
        """

    def column_names(self) -> tuple[str, ...]:
        """Return none, unless a kind reads more of a record than its conversation."""
        return ()

    def num_rows(self) -> int | None:
        """Return `num_samples` where it is given; else usable rows of the data, None where it is not here."""
        if self.num_samples is not None:
            return len(evenly_spread(self.num_samples, self.max_samples))
        if not self.is_here():
            return None
        found = self._set().index()
        usable = len(found.good) if self.on_bad_row == "drop" else len(found)
        return len(evenly_spread(usable, self.max_samples))

    def content_digest(self) -> str:
        """Return the SHA-256 over the data's content, each image's name and content, and which rows are dropped."""
        return self._set().index().digest(self.source_digest(), self.on_bad_row == "drop")

    def remarks(self) -> list[str]:
        """Return how many rows are dropped, which, and why."""
        if self.on_bad_row == "fail" or not self.is_here():
            return []
        found = self._set().index()
        return [dropped_text(found.bad, len(found))] if found.bad else []

    def record_options(self) -> RecordOptions:
        """Return how records and images are read."""
        reading = ImageReading(self.image_aspect_ratio == "pad", self.ambiguous_images)
        return RecordOptions(self.ignore_keys, reading=reading)

    def _set(self) -> Any:
        return open_data_set(self)


def _free_keys(names: tuple[str, ...]) -> tuple[str, ...]:
    if taken := [name for name in names if name in READ_KEYS]:
        raise ValueError(f"{', '.join(taken)} is read as the conversation; a column is another key of the records")
    return names


class ColumnsSpec(RecordsSpec):
    """A data set of records whose further keys evaluations may read."""

    # What evaluations read of a row changes no training; they count it themselves.
    not_identity: ClassVar[frozenset[str]] = RecordsSpec.not_identity | {"columns"}

    columns: Annotated[tuple[str, ...], AfterValidator(_free_keys)] = Field(
        default=(), examples=[["answers"], ["category"]]
    )
    """Further keys that every record has, for evaluations: `answers` (a list), `options` (a list), `category` (a text,
    which also groups accuracies). Training does not read them.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"columns"})

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What it was before there were such fields, so that experiments without them keep their records.
        return {name: value for name, value in dump(self).items() if name not in self.as_before()}

    def column_names(self) -> tuple[str, ...]:
        """Return `columns`."""
        return self.columns

    def record_options(self) -> RecordOptions:
        """Return how records and images are read."""
        return replace(super().record_options(), columns=self.columns)


class VideosSpec(DataSpec):
    """A data set whose rows may have videos."""

    num_frames: Count = NUM_FRAMES
    """Frames taken of a video, at equal distances from the first to the last (LLaVA-NeXT: `numpy.linspace`, rounded
    down); of a shorter one some twice. With `fps`, the most.
    """
    fps: Positive | None = None
    """Frames taken of a second of a video, from the first on, where these are no more than `num_frames`; null takes
    `num_frames` of any video. Only models that take videos of several lengths in a batch take it (Qwen-VL).
    """


_Spec = TypeVar("_Spec", bound=RecordsSpec)


class RecordSet(Generic[_Spec]):
    """The rows of one data set, from its index."""

    def __init__(self, spec: _Spec) -> None:
        self._spec = spec

    @abstractmethod
    def index(self) -> RowIndex:
        """Return the data's rows, good and bad, as they are now.

        Raises:
            DataError: the data cannot be read as what it should be.
            OSError: the storage fails; FileNotFoundError: the data does not exist.
        """

    def rows(self) -> IndexedRows:
        """Return the usable rows, `max_samples` of them; bad ones dropped where the spec says so.

        Raises:
            DataError: the data cannot be read, or has more bad rows than the spec allows.
        """
        from orchestrator.data.records.row_index import IndexedRows  # late: a spec's module loads no Arrow

        try:
            found = self.index()
        except FileNotFoundError as error:
            raise DataError(self._not_there()) from error
        drop = self._spec.on_bad_row == "drop"
        raise_for_errors(self._spec.source, self._errors(found, found.bad if drop else found.unreadable))
        return IndexedRows(found, found.good if drop else found.parsed).spread(self._spec.max_samples)

    def check(self, every_row: bool = True) -> list[str]:
        """Return the errors that forbid a training run, by row index; with `every_row` those of images too."""
        try:
            found = self.index()
        except DataError as error:
            return [str(error)]
        except FileNotFoundError:
            return [self._not_there()]
        errors = self._errors(found, found.bad if every_row else found.unreadable)
        wanted = self._spec.num_samples
        if wanted is not None and wanted != len(found):
            errors.insert(0, f"num_samples is {wanted}, the file has {len(found)} rows; correct it or leave it out")
        return errors

    def _errors(self, found: RowIndex, bad: Mapping[int, str]) -> list[str]:
        errors = error_lines(bad, len(found))
        if self._spec.on_bad_row == "fail" or not errors:
            return errors
        allowed = self._spec.max_bad_share
        if len(bad) < len(found) and len(bad) <= allowed * len(found):
            return []
        return [f"{len(bad) / len(found):.2%} of the rows are bad, max_bad_share allows {allowed:.2%}", *errors]

    def _not_there(self) -> str:
        return f"{self._spec.source} cannot be read: there is no such file"
