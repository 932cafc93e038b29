"""Stream the records of a JSON or JSONL file, so that a large file is never in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from orchestrator.data.records.file_kinds import HEAD_BYTES, looks_like
from orchestrator.errors import DataError

CHUNK_CHARACTERS = 2**22
_BLANKS = " \t\r\n"
_LINES = (".jsonl", ".ndjson")


class BadRow(ValueError):
    """A record that cannot be used; the message says why."""


class RepeatedKeys(dict[str, Any]):
    """A mapping with a key that its file repeats.

    Attributes:
        repeated: The key.
    """

    repeated: str


def read_records(path: Path) -> Iterator[Any]:
    """Return the records of a `.json` file (one list) or a `.jsonl` (`.ndjson`) file; an invalid line gives a BadRow.

    Bytes that are not UTF-8 become lone surrogates, so that they invalidate their own row only.

    Raises:
        DataError: the file cannot be read, or is not what its name says; for a list perhaps after some records.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"{path} is no regular file")
        with path.open("rb") as raw:
            head = raw.read(HEAD_BYTES)
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            yield from _records(path, file, head)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _records(path: Path, file: IO[str], head: bytes) -> Iterator[Any]:
    kind = looks_like(head)
    if kind is not None:
        raise DataError(f"{path} is not JSON but {kind}; LLaVA's format is a list of records, as .json or .jsonl")
    first = _first_character(file)
    file.seek(0)
    lines = path.suffix.lower() in _LINES
    if first == "":
        raise DataError(f"{path} is empty: it has no rows")
    if first == "[":
        if lines:
            raise DataError(f"{path}: this is a JSON list, not one record a line; name it .json")
        yield from _ListReader(path, file).records()
    elif first == "{" and not lines:
        raise DataError(_not_a_list(path, file))
    elif lines:
        yield from _of_lines(path, file)
    else:
        line = next(line for line in file if line.strip(_BLANKS)).strip(_BLANKS)
        raise DataError(f"{path} is not JSON: it begins with {line[:40]!r}; LLaVA's format is a list of records")


def _first_character(file: IO[str]) -> str:
    while chunk := file.read(HEAD_BYTES):
        if chunk.strip(_BLANKS):
            return chunk.strip(_BLANKS)[0]
    return ""


def _of_lines(path: Path, file: IO[str]) -> Iterator[Any]:
    first = True
    for line in file:
        if not line.strip(_BLANKS):
            continue
        record = parse_json(line)
        if first:
            first = False
            if isinstance(record, BadRow) and (keys := _keys_of_mapping(path)) is not None:
                raise DataError(f"{path} holds one mapping of {keys}, not one record a line")
        yield record


def _not_a_list(path: Path, file: IO[str]) -> str:
    """Return the error message for a `.json` file that begins with a mapping."""
    line = next((line for line in file if line.strip(_BLANKS)), "")
    rest = next((line for line in file if line.strip(_BLANKS)), "")
    if rest and isinstance(parse_json(line), dict):
        return f"{path}: this is JSON lines, one record a line, not a JSON list; name it .jsonl"
    keys = _keys_of_mapping(path)
    if keys is not None:
        return f"{path} holds a dict of {keys}; LLaVA's format is a list of records"
    return f"{path} is not JSON, nor one record a line: {parse_json(line)}"


def _keys_of_mapping(path: Path) -> str | None:
    """Return the keys of a file that is one mapping; None if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return ", ".join(list(map(str, value))[:8]) or "nothing" if isinstance(value, dict) else None


class _ListReader:
    """A JSON list, read in chunks.

    Args:
        path: The file's path, for errors.
        file: The text, at its beginning.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path, self._file = path, file
        self._text, self._place, self._number = "", 0, 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_mapping)

    def records(self) -> Iterator[Any]:
        """Return the records, one after the other.

        Raises:
            DataError: it is not a JSON list, perhaps after some records.
        """
        self._next_character()
        self._place += 1  # the bracket
        following = self._next_character()
        if following == "]":
            self._place += 1
        while following != "]":
            if not self._next_character():
                raise self._broken("the file ends before its list does")
            yield self._record()
            self._number += 1
            following = self._next_character()
            self._place += 1
            if following not in ("]", ","):
                what = f"this is {following!r}" if following else "the file ends"
                raise self._broken(f"a comma or ] belongs before it, {what}")
        if rest := self._next_character():
            raise self._broken(f"the list has ended, and there is more: {rest!r}")

    def _record(self) -> Any:
        while True:
            try:
                record, end = self._decoder.raw_decode(self._text, self._place)
            except RecursionError as error:
                raise self._broken("too deeply nested") from error
            except ValueError as error:
                # A record cut off by the end of the chunk fails at its end, or as a string that does not end.
                cut = getattr(error, "pos", -1) >= len(self._text) - 16 or "Unterminated" in str(error)
                if cut and self._more():
                    continue
                raise self._broken("the file ends in it" if cut else getattr(error, "msg", str(error))) from error
            if end < len(self._text) or not self._more():
                self._place = end
                return record

    def _more(self) -> bool:
        """Read another chunk; return False at the end of the file, where nothing changes."""
        piece = self._file.read(max(CHUNK_CHARACTERS, len(self._text) - self._place))
        if piece:
            self._text, self._place = self._text[self._place :] + piece, 0
        return bool(piece)

    def _next_character(self) -> str:
        """Return the next character that is not whitespace, without consuming it; empty at the end of the file."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _BLANKS:
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _broken(self, reason: str) -> DataError:
        return DataError(f"{self._path} is not JSON: row {self._number}: {reason}")


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = RepeatedKeys(found)
    seen = set[str]()
    repeated.repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return repeated


def parse_json(text: str, what: str = "the line") -> Any:
    """Return the value of a text, with repeated keys noticed; a BadRow where it is not JSON."""
    try:
        return json.loads(text, object_pairs_hook=_mapping)
    except (ValueError, RecursionError) as error:
        return BadRow(f"{what} is not JSON: {error}")
