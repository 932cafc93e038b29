"""`llava_json`: LLaVA's conversation format, JSON or JSONL; images, videos, both or none in a row."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from orchestrator import plugin
from orchestrator.data.records.conversations import RecordOptions, parse_record
from orchestrator.data.records.json_records import BadRow, read_records
from orchestrator.data.records.record_set import ColumnsSpec, RecordSet, VideosSpec
from orchestrator.plan.identity import source_code

_READERS = tuple(
    f"orchestrator.data.{name}"
    for name in ("rows", "records.file_kinds", "records.json_records", "records.conversations")
)


class LlavaJsonSpec(ColumnsSpec, VideosSpec):
    """Records of `image` (a path, a list, or absent) and `conversations` of `from: human|gpt` and `value`.

    `video` (a path or a list), `images`, `messages` of `role` and `content`, and `system` are read too. Any other key
    with content is a fault.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.data.llava_json:LlavaJson"
    path_fields: ClassVar[tuple[str, ...]] = ("data_path", "image_folder", "video_folder")
    added_later: ClassVar[frozenset[str]] = ColumnsSpec.added_later | {"video_folder", "num_frames", "fps"}

    kind: Literal["llava_json"] = "llava_json"
    data_path: str
    """Records file, `.json` or `.jsonl`."""
    image_folder: str | None = None
    """Folder that image paths are relative to; null takes the folder of `data_path`. Links in it are followed."""
    video_folder: str | None = None
    """Folder that paths of videos are relative to; null takes that of images."""
    allow_outside_image_folder: bool = False
    """Whether paths of images and videos may be absolute or hold `..`; for files you trust."""

    @property
    def source(self) -> str:
        """The records file."""
        return self.data_path

    def is_here(self) -> bool:
        """Return whether the records file is on this machine."""
        return Path(self.data_path).is_file()

    def source_digest(self) -> str:
        """Return the SHA-256 of the records file."""
        return plugin.content_digest(self.data_path)

    def record_options(self) -> RecordOptions:
        """Return how records, images and videos are read."""
        options = super().record_options()
        return replace(
            options,
            allow_outside_image_folder=self.allow_outside_image_folder,
            reading=replace(options.reading, num_frames=self.num_frames, fps=self.fps),
            video_folder=_video_folder(self),
        )

    def has_videos(self) -> bool | None:
        """Return whether a row has a video; of a file that is not here, whether a folder of videos is named for it.

        None where the file cannot be read.
        """
        try:
            if not self.is_here():
                return True if self.video_folder is not None else None
            return bool(LlavaJson(self).index().images.num_videos)
        except (plugin.DataError, OSError):
            return None

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
        changes |= {"video_folder": str(_video_folder(self))}
        return self.model_copy(update={**changes, "max_samples": None, "max_bad_share": 1.0})


class LlavaJson(RecordSet[LlavaJsonSpec]):
    """The rows of one file."""

    def index(self) -> plugin.RowIndex:
        """Return the file's rows, good and bad, as they are now.

        Raises:
            DataError: the file cannot be read as what it should be.
            OSError: the storage fails.
        """
        spec, folder, options = self._spec, _image_folder(self._spec), self._spec.record_options()
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
        about |= {"columns": list(spec.columns)} if spec.columns else {}
        source = {**about, "file": plugin.content_digest(path), "code": source_code(__name__, *_READERS)}
        found = plugin.row_index(source, entries, str(folder), options.reading, str(options.video_folder))
        if not len(found):
            raise plugin.DataError(f"{spec.data_path} has no rows")
        return found


def _entry(
    index: int, record: Any, folder: Path, template: str, options: RecordOptions
) -> plugin.Row | tuple[int, str]:
    try:
        return parse_record(index, record, folder, template, options)
    except BadRow as error:
        return index, str(error)


def _image_folder(spec: LlavaJsonSpec) -> Path:
    return Path(spec.image_folder) if spec.image_folder is not None else Path(spec.data_path).parent


def _video_folder(spec: LlavaJsonSpec) -> Path:
    return Path(spec.video_folder) if spec.video_folder is not None else _image_folder(spec)
