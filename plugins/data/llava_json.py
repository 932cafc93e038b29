"""`llava_json`: LLaVA's conversation format, JSON or JSONL, one image, several, or none a row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.data.image_check import image_faults
from orchestrator.data.llava_rows import BadRow, RecordOptions, fault_lines, parse_record, read_records
from orchestrator.data.rows import ImageReading, Row, evenly_spread, raise_for_faults
from orchestrator.errors import DataError
from orchestrator.plan.identity import content_digest
from orchestrator.spec.base import Count
from orchestrator.spec.components import DataSpec


class LlavaJsonSpec(DataSpec):
    """Records of `image` (a path, a list, or absent) and `conversations` of `from: human|gpt` and `value`.

    `images`, `messages` of `role` and `content`, and `system` are read too. Any other key with content is a fault.

    Attributes:
        data_path: The `.json` or `.jsonl` file.
        image_folder: What image paths are relative to; None: the folder of `data_path`. Links in it are followed.
        allow_outside_image_folder: Image paths may be absolute or hold `..`; for files you trust.
        image_aspect_ratio: `pad`: images are padded to a square with the processor's mean colour first, as LLaVA-1.5
            does in finetuning and tests; None: the processor's own way, which may cut an image's sides off.
        ambiguous_images: What to do with images that transformers' `load_image` and a viewer show differently, by
            transparency or by several frames: `fail` (a bad row), `load_image` (colours beneath transparency, first
            frame), `viewer` (on white, first frame).
        ignore_keys: Keys of rows and turns that may be left out.
        conversation_template: `plain` (LLaVA's pretraining), `vicuna_v1` (LLaVA-1.5), or the tokenizer's own.
        on_bad_row: `fail`, or `drop` rows that cannot be used.
        max_bad_share: With `drop`: the largest share of rows that may be dropped before it is a fault after all.
        max_samples: Rows used, spread evenly over the usable ones.
        num_samples: Rows of the file, so that `plan` works without it; checked where the file is here.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.data.llava_json:LlavaJson"
    path_fields: ClassVar[tuple[str, ...]] = ("data_path", "image_folder")
    not_identity: ClassVar[frozenset[str]] = frozenset({"num_samples", "max_bad_share"})

    kind: Literal["llava_json"] = "llava_json"
    data_path: str
    image_folder: str | None = None
    allow_outside_image_folder: bool = False
    image_aspect_ratio: Literal["pad"] | None = None
    ambiguous_images: Literal["fail", "load_image", "viewer"] = "fail"
    ignore_keys: tuple[str, ...] = ()
    conversation_template: Literal["plain", "vicuna_v1", "chat_template"] = "chat_template"
    on_bad_row: Literal["fail", "drop"] = "fail"
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    num_samples: Count | None = None

    def num_rows(self) -> int | None:
        """`num_samples` where it is given; else usable rows of the file, None where there is no file."""
        if self.num_samples is not None:
            return len(evenly_spread(self.num_samples, self.max_samples))
        if not Path(self.data_path).is_file():
            return None
        data = LlavaJson(self)
        found = data.scan(with_images=self.on_bad_row == "drop")
        usable = len(found.rows) if self.on_bad_row == "drop" else found.num_records
        return len(evenly_spread(usable, self.max_samples))

    def first_rows(self, count: int, folder: Path) -> LlavaJsonSpec:
        """The first rows in a file of their own, so that no other image is looked at.

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
        """SHA-256 over the file's content and each image's relative path and size.

        Pixels are not hashed: at 665,298 rows that would read some 100 GB for every plan.
        """
        digest = hashlib.sha256(content_digest(self.data_path).encode())
        folder = _image_folder(self)
        names = {os.path.relpath(image.path, folder) for row in _parse(*_key(self)).rows for image in row.images}
        for name in sorted(names):
            try:
                size = (folder / name).stat().st_size
            except (OSError, ValueError):
                size = -1
            digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Scan:
    """A file's rows as far as they were looked at.

    Attributes:
        rows: Usable rows in order.
        bad: Row index to what is wrong with it.
        num_records: Rows of the file, good and bad.
    """

    rows: tuple[Row, ...]
    bad: dict[int, str]
    num_records: int


class LlavaJson:
    """The rows of one file."""

    def __init__(self, spec: LlavaJsonSpec) -> None:
        self._spec = spec

    def rows(self) -> Sequence[Row]:
        """Usable rows, `max_samples` of them; bad ones dropped where the spec says so.

        Raises:
            DataError: the file cannot be read, or has more bad rows than the spec allows.
        """
        drop = self._spec.on_bad_row == "drop"
        found = self.scan(with_images=drop)
        raise_for_faults(self._spec.data_path, self._faults(found))
        return [found.rows[position] for position in evenly_spread(len(found.rows), self._spec.max_samples)]

    def check(self, every_row: bool = True) -> list[str]:
        """Faults that forbid a training run, by row index; with `every_row` every image is opened too."""
        # Images may have been put right since they were last looked at.
        _broken_images.cache_clear()
        try:
            found = self.scan(with_images=every_row)
        except DataError as error:
            return [str(error)]
        faults = self._faults(found)
        wanted = self._spec.num_samples
        if wanted is not None and wanted != found.num_records:
            faults.insert(
                0, f"num_samples is {wanted}, the file has {found.num_records} rows; correct it or leave it out"
            )
        return faults

    def scan(self, with_images: bool) -> Scan:
        """All rows of the file, looked at.

        Raises:
            DataError: the file cannot be read.
        """
        found = _parse(*_key(self._spec))
        if not with_images:
            return found
        broken = _broken_images(*_key(self._spec))
        bad, good = dict(found.bad), []
        for row in found.rows:
            fault = next((f"{i.path} {broken[i.path]}" for i in row.images if i.path in broken), None)
            if fault is None:
                good.append(row)
            else:
                bad[row.index] = fault
        return Scan(tuple(good), dict(sorted(bad.items())), found.num_records)

    def _faults(self, found: Scan) -> list[str]:
        faults = fault_lines(found.bad, found.num_records)
        if self._spec.on_bad_row == "fail" or not faults:
            return faults
        allowed = self._spec.max_bad_share
        if found.rows and len(found.bad) <= allowed * found.num_records:
            return []
        share = len(found.bad) / found.num_records
        return [f"{share:.2%} of the rows are bad, max_bad_share allows {allowed:.2%}", *faults]


def _image_folder(spec: LlavaJsonSpec) -> Path:
    return Path(spec.image_folder) if spec.image_folder is not None else Path(spec.data_path).parent


def record_options(spec: LlavaJsonSpec) -> RecordOptions:
    """What a spec says of its records and images."""
    reading = ImageReading(spec.image_aspect_ratio == "pad", spec.ambiguous_images)
    return RecordOptions(spec.ignore_keys, spec.allow_outside_image_folder, reading)


def _key(spec: LlavaJsonSpec) -> tuple[str, str, str, RecordOptions, int, int]:
    """What a parsed file depends on; the file's size and time make a changed file a new one."""
    try:
        stat = os.stat(spec.data_path)
    except OSError as error:
        raise DataError(f"{spec.data_path} cannot be read: {error.strerror or error}") from error
    folder, template = str(_image_folder(spec)), spec.conversation_template
    return spec.data_path, folder, template, record_options(spec), stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=8)
def _parse(data_path: str, image_folder: str, template: str, options: RecordOptions, size: int, mtime_ns: int) -> Scan:
    rows, bad, count = [], {}, 0
    for index, record in enumerate(read_records(Path(data_path))):
        count += 1
        try:
            rows.append(parse_record(index, record, Path(image_folder), template, options))
        except BadRow as error:
            bad[index] = str(error)
    if not count:
        raise DataError(f"{data_path} has no rows")
    return Scan(tuple(rows), bad, count)


@lru_cache(maxsize=8)
def _broken_images(
    data_path: str, image_folder: str, template: str, options: RecordOptions, size: int, mtime_ns: int
) -> dict[str, str]:
    rows = _parse(data_path, image_folder, template, options, size, mtime_ns).rows
    return image_faults((image.path for row in rows for image in row.images), options.reading)
