"""`llava_json`: LLaVA's conversation format, JSON or JSONL, one image, several, or none a row."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator import plugin
from orchestrator.data.records.conversations import RecordOptions, error_lines, parse_record
from orchestrator.data.records.json_records import BadRow, read_records
from orchestrator.data.rows import dropped_text
from orchestrator.plan.identity import source_code

_READERS = tuple(
    f"orchestrator.data.{name}"
    for name in ("rows", "records.file_kinds", "records.json_records", "records.conversations")
)


class LlavaJsonSpec(plugin.DataSpec):
    """Records of `image` (a path, a list, or absent) and `conversations` of `from: human|gpt` and `value`.

    `images`, `messages` of `role` and `content`, and `system` are read too. Any other key with content is a fault.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.data.llava_json:LlavaJson"
    path_fields: ClassVar[tuple[str, ...]] = ("data_path", "image_folder")
    not_identity: ClassVar[frozenset[str]] = frozenset({"num_samples", "max_bad_share"})

    kind: Literal["llava_json"] = "llava_json"
    data_path: str
    """Records file, `.json` or `.jsonl`."""
    image_folder: str | None = None
    """Folder that image paths are relative to; null takes the folder of `data_path`. Links in it are followed."""
    allow_outside_image_folder: bool = False
    """Whether image paths may be absolute or hold `..`; for files you trust."""
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
    num_samples: plugin.Count | None = None
    """Rows of the file, so that `plan` works without it; checked where the file is present. null counts them."""

    def num_rows(self) -> int | None:
        """Return `num_samples` where it is given; else usable rows of the file, None where there is no file."""
        if self.num_samples is not None:
            return len(plugin.evenly_spread(self.num_samples, self.max_samples))
        if not Path(self.data_path).is_file():
            return None
        found = LlavaJson(self).index()
        usable = len(found.good) if self.on_bad_row == "drop" else len(found)
        return len(plugin.evenly_spread(usable, self.max_samples))

    def first_rows(self, count: int, folder: Path) -> LlavaJsonSpec:
        """Return the first rows in a file of their own, so that no other image is looked at.

        Raises:
            DataError: the file cannot be read.
        """
        records = list(islice((r for r in read_records(Path(self.data_path)) if not isinstance(r, BadRow)), count))
        text = json.dumps(records)
        small = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
        folder.mkdir(parents=True, exist_ok=True)
        small.write_text(text, encoding="utf-8")
        changes = {"data_path": str(small), "image_folder": str(_image_folder(self)), "num_samples": None}
        return self.model_copy(update={**changes, "max_samples": None, "max_bad_share": 1.0})

    def content_digest(self) -> str:
        """Return the SHA-256 over the file's content, each image's relative path and content, and which rows are
        dropped.
        """
        return LlavaJson(self).index().digest(plugin.content_digest(self.data_path), self.on_bad_row == "drop")

    def remarks(self) -> list[str]:
        """Return how many rows are dropped, which, and why."""
        if self.on_bad_row == "fail" or not Path(self.data_path).is_file():
            return []
        found = LlavaJson(self).index()
        return [dropped_text(found.bad, len(found))] if found.bad else []


class LlavaJson:
    """The rows of one file."""

    def __init__(self, spec: LlavaJsonSpec) -> None:
        self._spec = spec

    def index(self) -> plugin.RowIndex:
        """Return the file's rows, good and bad, as they are now.

        Raises:
            DataError: the file cannot be read as what it should be.
            OSError: the storage fails.
        """
        spec, folder, options = self._spec, _image_folder(self._spec), record_options(self._spec)
        path = Path(spec.data_path)
        before = os.stat(path)
        if not stat.S_ISREG(before.st_mode):
            raise plugin.DataError(f"{path} is no regular file")

        def entries() -> Iterator[Callable[[], plugin.Row | tuple[int, str]]]:
            for index, record in enumerate(read_records(path)):
                yield partial(_entry, index, record, folder, spec.conversation_template, options)
            now = os.stat(path)
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise plugin.DataError(f"{path} changes while it is read; wait until it is complete, then try again")

        plain = spec.conversation_template == "plain"
        about = {"kind": spec.kind, "plain": plain, "options": repr(options)}
        source = {**about, "file": plugin.content_digest(path), "code": source_code(__name__, *_READERS)}
        found = plugin.row_index(source, entries, str(folder), options.reading)
        if not len(found):
            raise plugin.DataError(f"{spec.data_path} has no rows")
        return found

    def rows(self) -> plugin.IndexedRows:
        """Return the usable rows, `max_samples` of them; bad ones dropped where the spec says so.

        Raises:
            DataError: the file cannot be read, or has more bad rows than the spec allows.
        """
        try:
            found = self.index()
        except FileNotFoundError as error:
            raise plugin.DataError(_not_there(self._spec)) from error
        drop = self._spec.on_bad_row == "drop"
        plugin.raise_for_errors(self._spec.data_path, self._errors(found, found.bad if drop else found.unreadable))
        return plugin.IndexedRows(found, found.good if drop else found.parsed).spread(self._spec.max_samples)

    def check(self, every_row: bool = True) -> list[str]:
        """Return the errors that forbid a training run, by row index; with `every_row` those of images too."""
        try:
            found = self.index()
        except plugin.DataError as error:
            return [str(error)]
        except FileNotFoundError:
            return [_not_there(self._spec)]
        errors = self._errors(found, found.bad if every_row else found.unreadable)
        wanted = self._spec.num_samples
        if wanted is not None and wanted != len(found):
            errors.insert(0, f"num_samples is {wanted}, the file has {len(found)} rows; correct it or leave it out")
        return errors

    def _errors(self, found: plugin.RowIndex, bad: Mapping[int, str]) -> list[str]:
        errors = error_lines(bad, len(found))
        if self._spec.on_bad_row == "fail" or not errors:
            return errors
        allowed = self._spec.max_bad_share
        if len(bad) < len(found) and len(bad) <= allowed * len(found):
            return []
        return [f"{len(bad) / len(found):.2%} of the rows are bad, max_bad_share allows {allowed:.2%}", *errors]


def _not_there(spec: LlavaJsonSpec) -> str:
    return f"{spec.data_path} cannot be read: there is no such file"


def _entry(
    index: int, record: Any, folder: Path, template: str, options: RecordOptions
) -> plugin.Row | tuple[int, str]:
    try:
        return parse_record(index, record, folder, template, options)
    except BadRow as error:
        return index, str(error)


def _image_folder(spec: LlavaJsonSpec) -> Path:
    return Path(spec.image_folder) if spec.image_folder is not None else Path(spec.data_path).parent


def record_options(spec: LlavaJsonSpec) -> RecordOptions:
    """Return a spec's options of records and images."""
    reading = plugin.ImageReading(spec.image_aspect_ratio == "pad", spec.ambiguous_images)
    return RecordOptions(spec.ignore_keys, spec.allow_outside_image_folder, reading)
