"""Parse a record of a conversation file into a Row, or say why it is invalid. Imports no torch.

Formats are read where they are unambiguous:

- LLaVA: `image` (a path, or several), `conversations` of `from: human|gpt` and `value`;
- LLaMA-Factory and ms-swift: `images`, `messages` of `role: user|assistant` and `content`, `system`;
- OpenAI: `content` as a list of `{type: text}` and `{type: image|image_url}`;
- with `video` (`videos`), where the data kind reads videos: `<video>` marks its place. A row of videos alone may mark
  it by `<image>`, as LLaVA-Video's data does (LLaVA-NeXT, `llava/train/train.py`).

Every other key with content is an error, unless it is known not to matter (`HARMLESS`) or the user says so
(`ignore_keys`): silently dropping a key would train on another row than the file holds.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.records.json_records import BadRow, RepeatedKeys
from orchestrator.data.rows import AS_IT_IS, IMAGE_MARK, VIDEO_MARK, ImageReading, ImageRef, Row, Turn
from orchestrator.registry import did_you_mean

HARMLESS = {
    *("id", "_id", "uid", "uuid", "idx", "index", "qid", "sample_id", "image_id", "question_id", "conversation_id"),
    *("source", "dataset", "dataset_name", "data_source", "split", "model", "license", "language", "lang"),
    *("type", "task", "category", "width", "height"),
}
"""Keys of records and turns that do not change what is learned; keys that begin with `meta` count too."""
IMAGE_KEYS, TURN_KEYS, SYSTEM_KEYS = ("image", "images"), ("conversations", "messages"), ("system", "system_prompt")
VIDEO_KEYS = ("video", "videos")
READ_KEYS = (*IMAGE_KEYS, *TURN_KEYS, *SYSTEM_KEYS)
"""Keys that every kind of records reads; those that read videos read `VIDEO_KEYS` too."""
_FOREIGN = {
    "videos are not read": "video videos video_path",
    "sounds are not read": "audio audios",
    "this looks like Alpaca's format": "instruction input output",
    "this looks like an old ms-swift format": "query response history",
    "this looks like pairs of preferences": "prompt chosen rejected rejected_response rejected_messages label",
    "this looks like questions and answers": "question answer",
    "an evaluation reads them where columns names them": "answers options",
    "this looks like plain text": "text caption",
    "tools are not read": "tools tool_calls functions function_call",
    "places in an image are not read": "bbox bboxes boxes objects mask masks",
    "it would weigh the loss": "weight loss loss_scale loss_mask train",
}
_WHY = {key: why for why, keys in _FOREIGN.items() for key in keys.split()}


def why_not(key: str) -> str:
    """Return why a key is not read, or which key may be meant; empty if neither is known."""
    return _WHY.get(key) or did_you_mean(key, list(READ_KEYS)) or ""


def no_foreign_keys(record: dict[str, Any], read: tuple[str, ...] = READ_KEYS) -> None:
    """Refuse keys with content that are not read.

    Args:
        record: The record.
        read: The keys that are.

    Raises:
        BadRow: there is one; the message says what the record looks like.
    """
    foreign = [key for key in record if key not in read and says_something(key, record[key])]
    if not foreign:
        return
    hint = why_not(foreign[0])
    if not any(record.get(key) for key in TURN_KEYS):
        # Not LLaVA's format at all: what the file looks like helps more than the name of a key.
        why = f" ({hint})" if hint else ""
        raise BadRow(f"it has {listed(record)}{why}; `conversations` is missing (LLaVA's format: conversations, image)")
    named = ", ".join(f"`{cut(key)}`" for key in foreign[:5])
    raise BadRow(
        f"{named} {'is' if len(foreign) == 1 else 'are'} not read{f': {hint}' if hint else ''}; "
        "if nothing is lost with it, name it in ignore_keys"
    )


def says_something(key: str, value: Any) -> bool:
    """Return whether a key that is not read has content that may matter."""
    return key not in HARMLESS and not key.startswith("meta") and not is_nothing(value)


def is_nothing(value: Any) -> bool:
    """Return whether a value is empty: null, false, or an empty text, list or mapping."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def listed(record: dict[str, Any]) -> str:
    """Return the keys of a record, for a message."""
    names = [cut(str(key)) for key in record if key not in ("id", "_id")] or [cut(str(key)) for key in record]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "no keys"


def readable(text: str, what: str) -> None:
    """Refuse a text that no tokenizer or file system accepts.

    Raises:
        BadRow: it holds half of an escaped character, a byte that was not UTF-8, or a NUL.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        if "\udc80" <= found <= "\udcff":
            raise BadRow(f"{what} holds a byte that is not UTF-8, or half of an escaped character") from error
        raise BadRow(f"{what} holds {found!r}, half of an escaped character") from error
    if "\0" in text:
        raise BadRow(f"{what} holds a NUL character")


def no_repeats(value: dict[str, Any], what: str) -> None:
    """Refuse a mapping that repeats a key, of which JSON would keep the last.

    Raises:
        BadRow: a key is repeated.
    """
    if isinstance(value, RepeatedKeys):
        raise BadRow(f"{what} has the key `{cut(value.repeated)}` twice")


def short(value: Any) -> str:
    """Return a value, for a message."""
    return cut(repr(value))


def cut(text: str) -> str:
    """Return a text for a message: printable, at most 60 characters."""
    text = text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
    return text if len(text) <= 60 else f"{text[:57]}..."


_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}


def turn_of(number: int, turn: Any, ignored: tuple[str, ...]) -> tuple[Turn, list[str]]:
    """Return a turn and the images named in it.

    Raises:
        BadRow: it is invalid.
    """
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is a mapping with `from` and `value`, this is {short(turn)}")
    no_repeats(turn, f"turn {number}")
    openai = "role" in turn or "content" in turn
    if openai and ("from" in turn or "value" in turn):
        raise BadRow(f"turn {number} has {listed(turn)}; it is either `from` and `value` or `role` and `content`")
    speaker, content = ("role", "content") if openai else ("from", "value")
    foreign = [key for key in turn if key not in (speaker, content, *ignored) and says_something(key, turn[key])]
    if foreign:
        why = why_not(foreign[0])
        raise BadRow(f"`{cut(foreign[0])}` of turn {number} is not read{f': {why}' if why else ''}; see ignore_keys")
    said = turn.get(speaker)
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        allowed = "user, assistant or system" if openai else "human, gpt or system"
        raise BadRow(f"turn {number} is from {short(said)}; a turn is from {allowed}")
    value = turn.get(content)
    names: list[str] = []
    if openai and isinstance(value, list):
        value = "".join(_part(number, part, names) for part in value)
    if not isinstance(value, str):
        raise BadRow(f"the text of turn {number} is {short(value)}, not a string")
    readable(value, f"the text of turn {number}")
    if role == "assistant" and not value.strip():
        raise BadRow(f"the answer of turn {number} is empty")
    return Turn(role, value), names


def _part(number: int, part: Any, names: list[str]) -> str:
    """Return the text of a part of OpenAI's `content`; append the path of an image to `names`."""
    where = f"a part of turn {number}"
    if not isinstance(part, dict):
        raise BadRow(f"{where} is a mapping with `type`, this is {short(part)}")
    no_repeats(part, where)
    kind = part.get("type")
    if kind == "text":
        given = _only(part, where, ("text",))
        if not isinstance(given, str):
            raise BadRow(f"the text of {where} is {short(given)}, not a string")
        return given
    if kind not in ("image", "image_url"):
        raise BadRow(f"{where} is of type {short(kind)}; text, image and image_url are read")
    given = _only(part, where, ("image", "path", "url", "image_url"))
    if isinstance(given, dict):
        given = _only(given, where, ("url",))
    if given is not None:
        names.append(given)
    return IMAGE_MARK


def _only(part: dict[str, Any], where: str, keys: tuple[str, ...]) -> Any:
    """Return the value of the single key that is given."""
    given = {key: value for key, value in part.items() if key != "type" and not is_nothing(value)}
    foreign = [key for key in given if key not in keys]
    if foreign or len(given) > 1:
        raise BadRow(f"{where} has {listed(part)}; beside `type` one of {', '.join(keys)} is read")
    return next(iter(given.values()), "" if keys == ("text",) else None)


def in_order(turns: list[Turn]) -> tuple[Turn, ...]:
    """Return the turns if user and assistant alternate, after at most one system text; drop an empty system text.

    Raises:
        BadRow: they do not alternate, or there is no answer.
    """
    first = 1 if turns[0].role == "system" else 0
    for number, turn in enumerate(turns[first:]):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            called = {"user": "human", "assistant": "gpt"}
            raise BadRow(
                f"turn {number + first} is from {called.get(turn.role, turn.role)}, expected {called[expected]}: "
                "human and gpt take turns, human first"
            )
    if len(turns) - first < 2:
        raise BadRow("the conversation has no answer")
    return tuple(turns if turns[0].text.strip() else turns[first:])


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.ASCII)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|.*\\", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class RecordOptions:
    """A data set's settings for its records.

    Attributes:
        ignore_keys: Keys of records and turns to ignore.
        allow_outside_image_folder: Whether paths may be absolute or hold `..`.
        reading: How images and videos are read.
        columns: Keys of records that evaluations read; every record has them.
        video_folder: Folder that paths of videos are relative to; None where videos are not read.
    """

    ignore_keys: tuple[str, ...] = ()
    allow_outside_image_folder: bool = False
    reading: ImageReading = AS_IT_IS
    columns: tuple[str, ...] = field(default=(), repr=False)
    video_folder: Path | None = field(default=None, repr=False)


_NO_OPTIONS = RecordOptions()


def parse_record(
    index: int, record: Any, image_folder: Path, template: str, options: RecordOptions = _NO_OPTIONS
) -> Row:
    """Return the row of a record.

    Args:
        index: The record's place in its file.
        record: A mapping as described above.
        image_folder: Folder that image paths are relative to.
        template: `plain` requires one question with an image and one caption.
        options: The data set's settings.

    Raises:
        BadRow: the record is invalid.
    """
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(f"a record is a mapping, this is {'null' if record is None else f'a {type(record).__name__}'}")
    no_repeats(record, "the record")
    columns = _columns(record, options.columns)
    record = {key: value for key, value in record.items() if key not in (*options.ignore_keys, *options.columns)}
    no_foreign_keys(record, READ_KEYS if options.video_folder is None else (*READ_KEYS, *VIDEO_KEYS))
    key = _one_of(record, TURN_KEYS)
    if key is None:
        raise BadRow(f"it has {listed(record)}; `conversations` is missing (LLaVA's format: conversations, image)")
    if not isinstance(record[key], list):
        raise BadRow(f"`{key}` is a list of turns, this is {short(record[key])}")
    if not record[key]:
        raise BadRow(f"`{key}` is empty")
    parts = [turn_of(number, turn, options.ignore_keys) for number, turn in enumerate(record[key])]
    turns = _with_system(record, in_order([turn for turn, _ in parts]))
    names = _names(record, IMAGE_KEYS, [name for _, in_turn in parts for name in in_turn])
    videos = _names(record, VIDEO_KEYS, []) if options.video_folder is not None else []
    if videos and not names and not any(VIDEO_MARK in turn.text for turn in turns):
        turns = tuple(Turn(turn.role, turn.text.replace(IMAGE_MARK, VIDEO_MARK)) for turn in turns)
    wanted = {IMAGE_MARK: (names, IMAGE_KEYS, "images")}
    wanted |= {VIDEO_MARK: (videos, VIDEO_KEYS, "videos")} if videos else {}
    for mark, (given, keys, called) in wanted.items():
        marks = sum(turn.text.count(mark) for turn in turns)
        if marks != len(given):
            key = _one_of(record, keys)
            raise BadRow(f"{marks} {mark} in the conversation, {len(given)} {called}" + (f" in `{key}`" * bool(key)))
        for role, called in (("assistant", "an answer"), ("system", "the system text")):
            if any(mark in turn.text for turn in turns if turn.role == role):
                raise BadRow(f"{called} holds {mark}")
    if template == "plain" and (len(turns) != 2 or not (names or videos)):
        system = " with a system text" if turns[0].role == "system" else ""
        raise BadRow(
            f"plain takes one question with an image and one answer; {len(turns)} turns{system}, {len(names)} images"
        )
    left = {mark: iter(given) for mark, (given, *_) in wanted.items()}
    found = re.findall("|".join(map(re.escape, wanted)), "".join(turn.text for turn in turns))
    images = tuple(_ref(next(left[mark]), mark == VIDEO_MARK, image_folder, options) for mark in found)
    category = columns.get("category")
    return Row(index, images, turns, category if isinstance(category, str) else None, columns)


def error_lines(bad: Mapping[int, str], num_records: int) -> list[str]:
    """Return one line per bad row; an error that at least half of all rows share gets a single line.

    Args:
        bad: By row index, the error.
        num_records: Number of rows of the file, good and bad.
    """
    kinds = {index: _kind(reason) for index, reason in bad.items()}
    counts = Counter(kinds.values())
    told, lines = set[str](), []
    for index, reason in bad.items():
        kind = kinds[index]
        count = counts[kind]
        if count < 3 or 2 * count < num_records:
            lines.append(f"row {index}: {reason}")
        elif kind not in told:
            told.add(kind)
            how_many = f"all {count}" if count == num_records else f"{count} of {num_records}"
            lines.insert(0, f"{how_many} rows, the first is row {index}: {reason}")
    return lines


def _kind(reason: str) -> str:
    """Return an error without the words that differ from row to row: paths, numbers, quoted values."""
    return " ".join(word for word in reason.split() if not re.search(r"[\d/\\'\"]|\.\w{2,4}$", word))


def _columns(record: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return what evaluations read of a record.

    Raises:
        BadRow: a column is missing.
    """
    for name in names:
        if record.get(name) is None:
            raise BadRow(f"`{cut(name)}` is missing, which columns names; the record has {listed(record)}")
        try:
            text = json.dumps(record[name], ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BadRow(f"`{cut(name)}` is {short(record[name])}, which no JSON holds") from error
        readable(text, f"`{cut(name)}`")
    return {name: record[name] for name in names}


def _one_of(record: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return the one of the keys that the record has; an empty value counts only if no other key is there."""
    given = [key for key in keys if key in record and record[key] is not None]
    full = [key for key in given if not is_nothing(record[key])] or given[:1]
    if len(full) > 1:
        raise BadRow(f"it has both `{full[0]}` and `{full[1]}`; give one of them")
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
        raise BadRow(f"it has both `{key}` and a turn from system; give one of them")
    return (Turn("system", text), *turns)


def _names(record: dict[str, Any], keys: tuple[str, ...], in_turns: list[Any]) -> list[str]:
    key = _one_of(record, keys)
    value = record[key] if key is not None else None
    names = [] if value is None else value if isinstance(value, list) else [value]
    if names and in_turns:
        raise BadRow(f"images are named both in `{key}` and in the turns; their order is ambiguous")
    for name in names or in_turns:
        if not isinstance(name, str) or not name:
            raise BadRow(f"`{key or 'image_url'}` is a path or a list of paths, this is {short(name)}")
    return names or in_turns


def _ref(name: str, video: bool, image_folder: Path, options: RecordOptions) -> ImageRef:
    """Return an image or a video by its name in the file.

    Links in the folder are followed: the user put them there, while paths come from the data file.
    """
    what, folder = ("video", options.video_folder) if video else ("image", image_folder)
    assert folder is not None  # or videos are not read
    readable(name, f"the {what}'s path")
    if _URL.match(name):
        raise BadRow(f"the {what} {cut(name)} is not a path; download it into {what}_folder")
    if _WINDOWS.match(name):
        raise BadRow(f"the {what} {cut(name)} is a Windows path; write it with / and relative to {what}_folder")
    within = name.startswith(os.path.join(folder, "")) if name.startswith("/") else True
    if not options.allow_outside_image_folder and (not within or ".." in name.split("/")):
        raise BadRow(
            f"the {what} {cut(name)} lies outside {what}_folder; "
            "set allow_outside_image_folder: true where you trust the file"
        )
    return ImageRef(os.path.join(folder, name), options.reading, video)
