"""`webdataset`: tar shards in WebDataset's layout, indexed once and read at any place, so that the order is exact.

The library `webdataset` reads shards as a stream, in an order that its buffers and workers decide; `wids`, its random
access, copies shards and needs an index of its own. Neither has an exact order that a restart repeats, so shards are
read as the tar files that they are; the tests hold samples, their order and bytes to the library's.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from orchestrator import plugin
from orchestrator.data.records.conversations import IMAGE_KEYS, RecordOptions, parse_record, short
from orchestrator.data.records.file_kinds import HEAD_BYTES, looks_like
from orchestrator.data.records.image_files import part_of_file
from orchestrator.data.records.json_records import BadRow, parse_json
from orchestrator.data.records.record_set import ColumnsSpec, RecordSet
from orchestrator.plan.identity import digest, source_code

_READERS = tuple(f"orchestrator.data.{name}" for name in ("rows", "records.json_records", "records.conversations"))
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
# As the library splits a member's name: a sample's key is all up to the first dot of its last part.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile("__[^/]*__")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class WebDatasetSpec(ColumnsSpec):
    """Samples of tar shards: a `json` member in LLaVA's format (`conversations`) and the images beside it.

    Neighbouring members with one key are a sample, as in the library `webdataset`; rows are numbered through the
    shards, in the order of their names. Shards are read where they lie, nothing is unpacked.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.data.webdataset:WebDataset"
    path_fields: ClassVar[tuple[str, ...]] = ("data_path",)

    kind: Literal["webdataset"] = "webdataset"
    data_path: str
    """Folder of `.tar` shards, one shard, or several as `train-{000..127}.tar`; none of them may be missing."""
    text: Literal["json", "txt"] = "json"
    """Member that holds the text: `json`, a record in LLaVA's format, whose images are the sample's own; or `txt`, a
    caption, which answers the image alone (as img2dataset writes them).
    """

    @property
    def source(self) -> str:
        """The folder or the shards."""
        return self.data_path

    @property
    def folder(self) -> Path:
        """The folder of the shards."""
        path = Path(self.data_path)
        return path if path.is_dir() else path.parent

    def shards(self) -> list[Path]:
        """Return the shards in order; whether they exist is not looked at, but for a folder's."""
        path = Path(self.data_path)
        return sorted(path.glob("*.tar")) if path.is_dir() else [path.with_name(name) for name in _expanded(path.name)]

    def is_here(self) -> bool:
        """Return whether there are shards, and all of them."""
        found = self.shards()
        return bool(found) and all(path.is_file() for path in found)

    def source_digest(self) -> str:
        """Return the SHA-256 over the shards' names and contents."""
        return digest([[path.name, plugin.content_digest(path)] for path in self.shards()])


def _expanded(name: str) -> list[str]:
    found = _RANGE.search(name)
    if found is None:
        return [name]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [whole for number in numbers for whole in _expanded(name[: found.start()] + number + name[found.end() :])]


@dataclass
class Sample:
    """Neighbouring members of a shard with one key.

    Attributes:
        shard: The shard's path.
        key: What their names have in common.
        members: By ending, offset and length in the shard.
        fault: Why it cannot be used, if its members say so.
    """

    shard: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    fault: str | None = None


class WebDataset(RecordSet[WebDatasetSpec]):
    """The rows of some shards."""

    def index(self) -> plugin.RowIndex:
        """Return the samples of the shards, good and bad, in their order.

        Raises:
            DataError: a shard is not a whole tar file, or there are none.
            FileNotFoundError: a shard is missing.
            OSError: the storage fails.
        """
        spec, options = self._spec, self._spec.record_options()
        shards, folder = spec.shards(), spec.folder
        content = spec.source_digest()
        about: dict[str, Any] = {"kind": spec.kind, "text": spec.text, "plain": spec.conversation_template == "plain"}
        about |= {"columns": list(spec.columns)} if spec.columns else {}
        about |= {"options": repr(options), "shards": content, "code": source_code(__name__, *_READERS)}

        def entries() -> Iterator[Callable[[], plugin.Row | tuple[int, str]]]:
            number = 0
            for shard in shards:
                for sample in read_samples(shard):
                    yield partial(_entry, number, sample, spec.text, folder, spec.conversation_template, options)
                    number += 1
            if spec.source_digest() != content:
                raise plugin.DataError(f"{spec.source} changes while it is read; wait until it is complete")

        found = plugin.row_index(about, entries, str(folder), options.reading)
        if not len(found):
            raise plugin.DataError(f"{spec.source} has no samples: {len(shards)} shards are there")
        return found

    def _not_there(self) -> str:
        missing = [str(shard) for shard in self._spec.shards() if not shard.is_file()]
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        return f"{self._spec.source} cannot be read: {some or 'a shard'} is missing"


def read_samples(shard: Path) -> Iterator[Sample]:
    """Return a shard's samples in order, from its headers alone.

    Raises:
        DataError: it is not a whole tar file, without compression; perhaps after some samples.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            sample = None
            for member in tar:
                named = _NAME.fullmatch(member.name)
                if member.isdir() or named is None or _META.fullmatch(member.name):
                    continue  # as the library does
                key, ending = named[1], named[2].lower()
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = Sample(shard, key)
                if ending in sample.members:
                    sample.fault = f"it has two members .{ending}"
                elif not member.isreg() or member.sparse is not None:
                    sample.fault = f"its member .{ending} is a link or no regular file"
                else:
                    sample.members[ending] = member.offset_data, member.size
            if sample is not None:
                yield sample
            end = tar.offset
        _ends_well(shard, end)
    except tarfile.TarError as error:
        with shard.open("rb") as file:
            what = looks_like(file.read(HEAD_BYTES))
        raise plugin.DataError(f"{shard} is not a whole tar file: {what or error}") from error


def _ends_well(shard: Path, end: int) -> None:
    """Refuse a shard that was cut off between two members, or that has others behind its end.

    Raises:
        DataError: it is one.
    """
    blank = 0
    with shard.open("rb") as file:
        file.seek(end)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise plugin.DataError(
                    f"{shard} is not a whole tar file: it is damaged, or more follows behind its end"
                )
            blank += len(block)
    if blank < tarfile.BLOCKSIZE:
        raise plugin.DataError(f"{shard} is not a whole tar file: it was cut off")


def _entry(
    number: int, sample: Sample, text: str, folder: Path, template: str, options: RecordOptions
) -> plugin.Row | tuple[int, str]:
    """Return the row, or its number and why it cannot be used."""
    try:
        return parse_record(number, _record(sample, text), folder, template, options)
    except BadRow as error:
        return number, f"{error} ({sample.shard.name}, {sample.key})"


def _record(sample: Sample, text: str) -> dict[str, Any]:
    """Return a sample as a record in LLaVA's format, its images as parts of the shard.

    Raises:
        BadRow: a member is missing or not what it should be.
    """
    if sample.fault is not None:
        raise BadRow(sample.fault)
    if text not in sample.members:
        raise BadRow(f"it has {', '.join(f'.{ending}' for ending in sample.members)}; .{text} is missing")
    offset, length = sample.members[text]
    with sample.shard.open("rb") as file:
        file.seek(offset)
        said = file.read(length).decode("utf-8-sig", "surrogateescape")
    images = {ending: place for ending, place in sample.members.items() if ending.rsplit(".", 1)[-1] in IMAGE_ENDINGS}
    shard, key = sample.shard.name, _last(sample.key)
    names = {ending: part_of_file(shard, f"{key}.{ending}", *place) for ending, place in images.items()}
    if text == "txt":
        if len(images) != 1:
            raise BadRow(f"a caption is of one image, the sample has {len(images)}")
        turns = [{"from": "human", "value": plugin.IMAGE_MARK}, {"from": "gpt", "value": said.strip()}]
        return {"image": list(names.values()), "conversations": turns}
    record = parse_json(said, "its .json")
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(f"its .json is a mapping, this is {short(record)}")
    named = next((name for name in IMAGE_KEYS if record.get(name)), IMAGE_KEYS[0])
    record[named] = _chosen(record.get(named), sample, names)
    return record


def _chosen(given: Any, sample: Sample, names: Mapping[str, str]) -> list[str]:
    """Return the images that a record names; all in the shard's order where it names none."""
    wanted = given if isinstance(given, list) else [given] if given else []
    if not wanted or (len(wanted) == len(names) == 1):
        return list(names.values())
    found = []
    for one in wanted:
        ending = one.removeprefix(f"{_last(sample.key)}.") if isinstance(one, str) else ""
        if ending not in names:
            some = ", ".join(f"{_last(sample.key)}.{each}" for each in names) or "none"
            raise BadRow(f"its .json names the image {short(one)}; the sample's images are {some}")
        found.append(names[ending])
    return found


def _last(key: str) -> str:
    return key.rsplit("/", 1)[-1]
