"""`open_questions`: those of easy-VQA's questions that must be looked up in the picture, a plug-in data kind.

Most questions of easy-VQA are answered by yes or no, and many of the others name the shape or its colour: a model that
sees nothing gets most of them right. A language model on one core is shown few pictures, so it is asked for what says
most of them, the colour and the shape, in easy-VQA's own words and with its own answers. Blind, it would get one colour
of eight right, and one shape of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from orchestrator_plugins.data.easy_vqa import EasyVqa, EasyVqaSpec

from orchestrator import plugin

COLOR = ("what color is the shape?", "what is the color of the shape?")
SHAPE = ("what shape is in the image?", "what shape does the image contain?", "what shape is present?")


class OpenQuestionsSpec(plugin.DataSpec):
    """easy-VQA's questions for the colour and for the shape."""

    implementation: ClassVar[str] = f"{__name__}:OpenQuestions"

    kind: Literal["open_questions"] = "open_questions"
    split: Literal["train", "test"] = "train"
    """easy-VQA's own split."""
    together: plugin.Flag = False
    """Whether the colour and the shape of a picture are asked for in one conversation, one question each; the one says
    nothing of the other. Otherwise every question is a row.
    """
    conversation_template: Literal["chat_template", "vicuna_v1", "plain"] = "chat_template"
    """How a question becomes a prompt."""

    def num_rows(self) -> int:
        """Return the rows in use."""
        return len(OpenQuestions(self).rows())

    def column_names(self) -> tuple[str, ...]:
        """Return none: a row is its questions and answers."""
        return ()

    def content_digest(self) -> str:
        """Return that of easy-VQA's split; which questions are taken is this file's, and so part of the identity."""
        return EasyVqaSpec(split=self.split).content_digest()


class OpenQuestions:
    """The rows of one split."""

    def __init__(self, spec: OpenQuestionsSpec) -> None:
        self._spec = spec
        self._all = EasyVqa(EasyVqaSpec(split=spec.split))

    def rows(self) -> Sequence[plugin.Row]:
        """Return the questions in easy-VQA's order, or one conversation a picture."""
        rows = [row for row in self._all.rows() if _question(row) in COLOR + SHAPE]
        if self._spec.together:
            rows = _conversations(rows)
        return [rows[number] for number in plugin.evenly_spread(len(rows), self._spec.max_samples)]

    def check(self, every_row: bool = True) -> list[str]:
        """Return the images that the package should have and has not."""
        return self._all.check(every_row)


def _question(row: plugin.Row) -> str:
    return row.turns[0].text.removeprefix(f"{plugin.IMAGE_MARK}\n")


def _conversations(rows: Sequence[plugin.Row]) -> list[plugin.Row]:
    """Return a row for each picture: its first question for the colour and its first for the shape, as they come."""
    found: dict[str, dict[bool, plugin.Row]] = {}
    for row in rows:
        found.setdefault(row.images[0].path, {}).setdefault(_question(row) in COLOR, row)
    conversations = []
    for questions in found.values():
        first, *more = questions.values()
        further = [turn for row in more for turn in (plugin.Turn("user", _question(row)), *row.turns[1:])]
        conversations.append(plugin.Row(first.index, first.images, (*first.turns, *further)))
    return conversations
