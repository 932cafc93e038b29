"""A record of a conversation file to a Row, or the reason why it is none. Imports no torch.

What users bring is read where it has one meaning only:

- LLaVA: `image` (a path, or several), `conversations` of `from: human|gpt` and `value`;
- LLaMA-Factory and ms-swift: `images`, `messages` of `role: user|assistant` and `content`, `system`;
- OpenAI: `content` as a list of `{type: text}` and `{type: image|image_url}`.

Every other key that carries something is a fault, unless it is known to say nothing of what is learned
(`record_keys.HARMLESS`) or the user says so (`ignore_keys`): a key that is left out without a word would train another
row than the file holds.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.json_records import BadRow
from orchestrator.data.json_records import read_records as read_records
from orchestrator.data.record_keys import (
    IMAGE_KEYS,
    SYSTEM_KEYS,
    TURN_KEYS,
    cut,
    is_nothing,
    listed,
    no_foreign_keys,
    no_repeats,
    readable,
    short,
)
from orchestrator.data.record_turns import in_order, list_of_turns, turn_of
from orchestrator.data.rows import AS_IT_IS, IMAGE_MARK, ImageReading, ImageRef, Row, Turn

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.ASCII)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|.*\\", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class RecordOptions:
    """What a data set says of its records.

    Attributes:
        ignore_keys: Keys of records and turns that are left out.
        allow_outside_image_folder: Whether paths may be absolute or hold `..`.
        reading: How images are read.
    """

    ignore_keys: tuple[str, ...] = ()
    allow_outside_image_folder: bool = False
    reading: ImageReading = AS_IT_IS


_NO_OPTIONS = RecordOptions()


def parse_record(
    index: int, record: Any, image_folder: Path, template: str, options: RecordOptions = _NO_OPTIONS
) -> Row:
    """Return the row of a record.

    Args:
        index: The record's place in its file.
        record: A mapping as described above.
        image_folder: What image paths are relative to.
        template: `plain` asks for one image question and one caption.
        options: What the data set says.

    Raises:
        BadRow: it cannot be used.
    """
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(f"a record is a mapping, this is {'null' if record is None else f'a {type(record).__name__}'}")
    no_repeats(record, "the record")
    record = {key: value for key, value in record.items() if key not in options.ignore_keys}
    no_foreign_keys(record)
    key = _one_of(record, TURN_KEYS)
    if key is None:
        raise BadRow(f"it has {listed(record)}; LLaVA's format has conversations, image")
    parts = [turn_of(number, turn, options.ignore_keys) for number, turn in enumerate(list_of_turns(key, record[key]))]
    turns = _with_system(record, in_order([turn for turn, _ in parts]))
    names = _image_names(record, [name for _, in_turn in parts for name in in_turn])
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != len(names):
        given = _one_of(record, IMAGE_KEYS)
        raise BadRow(
            f"{marks} {IMAGE_MARK} in the conversation, {len(names)} images" + (f" in `{given}`" * bool(given))
        )
    for role, called in (("assistant", "an answer"), ("system", "the system text")):
        if any(IMAGE_MARK in turn.text for turn in turns if turn.role == role):
            raise BadRow(f"{called} holds {IMAGE_MARK}")
    if template == "plain" and (len(turns) != 2 or not names):
        system = " with a system text" if turns[0].role == "system" else ""
        raise BadRow(
            f"plain takes one question with an image and one answer; {len(turns)} turns{system}, {len(names)} images"
        )
    images = tuple(ImageRef(_path(name, image_folder, options), options.reading) for name in names)
    return Row(index, images, turns)


def fault_lines(bad: Mapping[int, str], num_records: int) -> list[str]:
    """Return the faults by row; what at least half of all rows have in common is told once, with the first of them.

    Args:
        bad: Row index to what is wrong with it.
        num_records: Rows of the file, good and bad.
    """
    kinds = {index: _kind(fault) for index, fault in bad.items()}
    counts = Counter(kinds.values())
    told, lines = set[str](), []
    for index, fault in bad.items():
        kind = kinds[index]
        count = counts[kind]
        if count < 3 or 2 * count < num_records:
            lines.append(f"row {index}: {fault}")
        elif kind not in told:
            told.add(kind)
            how_many = f"all {count}" if count == num_records else f"{count} of {num_records}"
            lines.insert(0, f"{how_many} rows, the first is row {index}: {fault}")
    return lines


def _kind(fault: str) -> str:
    """Return a fault without the words that differ from row to row: paths, numbers, quoted values."""
    return " ".join(word for word in fault.split() if not re.search(r"[\d/\\'\"]|\.\w{2,4}$", word))


def _one_of(record: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return which of the keys the record has; a key of null or nothing counts only where no other is there."""
    given = [key for key in keys if key in record and record[key] is not None]
    full = [key for key in given if not is_nothing(record[key])] or given[:1]
    if len(full) > 1:
        raise BadRow(f"it has both `{full[0]}` and `{full[1]}`; one of them would be left out")
    return full[0] if full else None


def _with_system(record: dict[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    key = _one_of(record, SYSTEM_KEYS)
    text = record[key] if key is not None else ""
    if not isinstance(text, str):
        raise BadRow(f"`{key}` is {short(text)}, not a string")
    readable(text, f"`{key}`")
    if not text.strip():
        return turns
    if turns[0].role == "system":
        raise BadRow(f"it has both `{key}` and a turn from system; one of them would be left out")
    return (Turn("system", text), *turns)


def _image_names(record: dict[str, Any], in_turns: list[Any]) -> list[str]:
    key = _one_of(record, IMAGE_KEYS)
    value = record[key] if key is not None else None
    names = [] if value is None else value if isinstance(value, list) else [value]
    if names and in_turns:
        raise BadRow(f"images are named both in `{key}` and in the turns; their order cannot be told")
    for name in names or in_turns:
        if not isinstance(name, str) or not name:
            raise BadRow(f"`{key or 'image_url'}` is a path or a list of paths, this is {short(name)}")
    return names or in_turns


def _path(name: str, folder: Path, options: RecordOptions) -> str:
    """Return where an image is.

    Links in the image folder are followed: they are the user's; a path is the data file's.
    """
    readable(name, "the image's path")
    if _URL.match(name):
        raise BadRow(f"the image {cut(name)} is no path; download it into image_folder")
    if _WINDOWS.match(name):
        raise BadRow(f"the image {cut(name)} is a path of Windows; write it with / and relative to image_folder")
    within = name.startswith(os.path.join(folder, "")) if name.startswith("/") else True
    if not options.allow_outside_image_folder and (not within or ".." in name.split("/")):
        raise BadRow(
            f"the image {cut(name)} lies outside image_folder; "
            "set allow_outside_image_folder: true where you trust the file"
        )
    return os.path.join(folder, name)
