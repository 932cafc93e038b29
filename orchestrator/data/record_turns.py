"""Turns of a record: LLaVA's `from` and `value`, or `role` and `content`, a text or OpenAI's list of parts."""

from __future__ import annotations

from typing import Any

from orchestrator.data.json_records import BadRow
from orchestrator.data.record_keys import cut, is_nothing, listed, no_repeats, readable, says_something, short, why_not
from orchestrator.data.rows import IMAGE_MARK, Turn

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}


def list_of_turns(key: str, value: Any) -> list[Any]:
    """Return the turns as they stand.

    Raises:
        BadRow: they are no list, or none.
    """
    if not isinstance(value, list):
        raise BadRow(f"`{key}` is a list of turns, this is {short(value)}")
    if not value:
        raise BadRow(f"`{key}` is empty")
    return value


def turn_of(number: int, turn: Any, ignored: tuple[str, ...]) -> tuple[Turn, list[str]]:
    """Return a turn and the images named in it.

    Raises:
        BadRow: it cannot be used.
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
    return Turn(role, value), names  # type: ignore[arg-type]


def _part(number: int, part: Any, names: list[str]) -> str:
    """Return the text of a part of OpenAI's `content`; the path of an image goes to `names`."""
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
    """Return the value of the one key that is given."""
    given = {key: value for key, value in part.items() if key != "type" and not is_nothing(value)}
    foreign = [key for key in given if key not in keys]
    if foreign or len(given) > 1:
        raise BadRow(f"{where} has {listed(part)}; beside `type` one of {', '.join(keys)} is read")
    return next(iter(given.values()), "" if keys == ("text",) else None)


def in_order(turns: list[Turn]) -> tuple[Turn, ...]:
    """Return the turns, where user and assistant speak in turns after at most one system text; a blank one falls away.

    Raises:
        BadRow: they do not.
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
