"""LLaVA's conversation format: one record to a Row, or the reason why it is none. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.data.rows import IMAGE_MARK, ImageRef, Row, Turn
from orchestrator.errors import DataError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class BadRow(ValueError):
    """A record that cannot be used; the message says why."""


def read_records(path: Path) -> Iterator[Any]:
    """Records of a `.json` file (one list) or a `.jsonl` file; a broken JSONL line comes out as a BadRow.

    Raises:
        DataError: the file cannot be read, or is not a list of records.
    """
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                yield from (_parse_line(line) for line in lines if line.strip())
            return
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{path} holds a {type(records).__name__}; LLaVA's format is a list of records")
    yield from records


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(f"the line is not JSON: {error}")


def parse_record(index: int, record: Any, image_folder: Path, template: str) -> Row:
    """The row of a record.

    Args:
        index: The record's place in its file.
        record: `{"image": path or list of paths, "conversations": [{"from": "human"|"gpt", "value": text}, ...]}`.
        image_folder: What image paths are relative to.
        template: `plain` asks for one image question and one caption.

    Raises:
        BadRow: it cannot be used.
    """
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(f"a record is a mapping, this is a {type(record).__name__}")
    images = tuple(ImageRef(str(image_folder / name)) for name in _image_names(record))
    turns = _turns(record.get("conversations"))
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != len(images):
        raise BadRow(f"{marks} {IMAGE_MARK} in the conversation, {len(images)} images")
    if any(IMAGE_MARK in turn.text for turn in turns if turn.role == "assistant"):
        raise BadRow(f"an answer holds {IMAGE_MARK}")
    if template == "plain" and (len(turns) != 2 or not images):
        raise BadRow(f"plain takes one question with an image and one answer; {len(turns)} turns, {len(images)} images")
    return Row(index, images, turns)


def _image_names(record: dict[str, Any]) -> list[str]:
    if record.get("video"):
        raise BadRow("`video` is not supported, only `image`")
    value = record.get("image")
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise BadRow(f"`image` is a path or a list of paths, this is {_short(name)}")
    return names


def _turns(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise BadRow(f"`conversations` is a list of turns, this is {_short(value)}")
    if not value:
        raise BadRow("`conversations` is empty")
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} is a mapping with `from` and `value`, this is {_short(turn)}")
        said = turn.get("from")
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise BadRow(f"turn {number} is from {_short(said)}; a turn is from human or gpt")
        expected = "assistant" if number % 2 else "user"
        if role != expected:
            wanted = "gpt" if number % 2 else "human"
            raise BadRow(f"turn {number} is from {said}, expected {wanted}: human and gpt take turns, human first")
        text = turn.get("value")
        if not isinstance(text, str):
            raise BadRow(f"the text of turn {number} is {_short(text)}, not a string")
        if role == "assistant" and not text.strip():
            raise BadRow(f"the answer of turn {number} is empty")
        turns.append(Turn("assistant" if number % 2 else "user", text))
    if len(turns) < 2:
        raise BadRow("the conversation has no answer")
    return tuple(turns)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
