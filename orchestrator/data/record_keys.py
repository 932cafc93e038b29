"""Keys of a record: which are read, which say nothing of what is learned, and what to say of any other."""

from __future__ import annotations

from typing import Any

from orchestrator.data.json_records import BadRow, RepeatedKeys
from orchestrator.registry import nearest

HARMLESS = {
    *("id", "_id", "uid", "uuid", "idx", "index", "qid", "sample_id", "image_id", "question_id", "conversation_id"),
    *("source", "dataset", "dataset_name", "data_source", "split", "model", "license", "language", "lang"),
    *("type", "task", "category", "width", "height"),
}
"""Keys of records and turns that say where they come from, not what is learned; keys that begin with `meta` too."""
IMAGE_KEYS, TURN_KEYS, SYSTEM_KEYS = ("image", "images"), ("conversations", "messages"), ("system", "system_prompt")
_READ = (*IMAGE_KEYS, *TURN_KEYS, *SYSTEM_KEYS)
_FOREIGN = {
    "videos are not read": "video videos video_path",
    "sounds are not read": "audio audios",
    "this looks like Alpaca's format": "instruction input output",
    "this looks like an old ms-swift format": "query response history",
    "this looks like pairs of preferences": "prompt chosen rejected rejected_response rejected_messages label",
    "this looks like questions and answers": "question answer answers",
    "this looks like plain text": "text caption",
    "tools are not read": "tools tool_calls functions function_call",
    "places in an image are not read": "bbox bboxes boxes objects mask masks",
    "it would weigh the loss": "weight loss loss_scale loss_mask train",
}
_WHY = {key: why for why, keys in _FOREIGN.items() for key in keys.split()}


def why_not(key: str) -> str:
    """Return why a key is not read, or which it may be meant for; empty where nothing is known of it."""
    near = nearest(key, list(_READ))
    return _WHY.get(key) or (f"did you mean {near}?" if near else "")


def no_foreign_keys(record: dict[str, Any]) -> None:
    """Raise a BadRow for keys with content that are not read.

    Raises:
        BadRow: it names them and says what the record looks like.
    """
    foreign = [key for key in record if key not in _READ and says_something(key, record[key])]
    if not foreign:
        return
    hint = why_not(foreign[0])
    if not any(record.get(key) for key in TURN_KEYS):
        # Not LLaVA's format at all: what the file looks like says more than one of its keys.
        why = f" ({hint})" if hint else ""
        raise BadRow(f"it has {listed(record)}{why}; LLaVA's format has conversations, image")
    named = ", ".join(f"`{cut(key)}`" for key in foreign[:5])
    raise BadRow(
        f"{named} {'is' if len(foreign) == 1 else 'are'} not read{f': {hint}' if hint else ''}; "
        "if nothing is lost with it, name it in ignore_keys"
    )


def says_something(key: str, value: Any) -> bool:
    """Return whether a key that is not read carries something."""
    return key not in HARMLESS and not key.startswith("meta") and not is_nothing(value)


def is_nothing(value: Any) -> bool:
    """Return whether a value stands for none: null, false, or an empty text, list or mapping."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def listed(record: dict[str, Any]) -> str:
    """Return the keys of a record, for a message."""
    names = [cut(str(key)) for key in record if key not in ("id", "_id")] or [cut(str(key)) for key in record]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "no keys"


def readable(text: str, what: str) -> None:
    """Raise a BadRow for a text that no tokenizer or file system takes.

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
    """Raise a BadRow for a mapping with a key twice, of which JSON would keep the last.

    Raises:
        BadRow: it names the key.
    """
    if isinstance(value, RepeatedKeys):
        raise BadRow(f"{what} has the key `{cut(value.repeated)}` twice")


def short(value: Any) -> str:
    """Return a value, for a message."""
    return cut(repr(value))


def cut(text: str) -> str:
    """Return a text, for a message: 60 characters that can be printed."""
    text = text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
    return text if len(text) <= 60 else f"{text[:57]}..."
