"""Conversations for the data tests, as records and as rows."""

from typing import Any

from orchestrator.data.rows import ImageRef, Row, Turn


def say(*texts: str) -> list[dict[str, Any]]:
    """`conversations` of a record: human and gpt in turns."""
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


def row_of(*texts: str, images: tuple[str, ...] = (), index: int = 0) -> Row:
    """A row of user and assistant in turns."""
    turns = tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
    return Row(index, tuple(ImageRef(path) for path in images), turns)
