"""`multiple_choice`: the share of questions with the right option chosen, by its letter or by likelihood."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin

LETTERS = string.ascii_uppercase


class MultipleChoiceSpec(plugin.GenerationSpec):
    """The option that a model chooses, of those in the data's `options`; the right one is the row's answer.

    By letter it is read from the greedy answer as LLaVA reads ScienceQA's (Liu et al., arXiv:2310.03744): the letter
    alone, the letter with a full stop and a blank before more text, or the one letter of `The answer is A.`; anything
    else is wrong, and counted as `unread`. By likelihood it is the option that is most likely as the whole answer:
    `accuracy` by the sum over its tokens, `accuracy_norm` by the sum over its number of characters, as the evaluation
    harness's `acc` and `acc_norm` (https://github.com/EleutherAI/lm-evaluation-harness).
    """

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.multiple_choice:MultipleChoice"
    metric_names: ClassVar[tuple[str, ...] | None] = ("accuracy", "accuracy_*", "unread")
    columns: ClassVar[tuple[str, ...]] = ("options",)

    kind: Literal["multiple_choice"] = "multiple_choice"
    batch_size: plugin.Count = 64
    """Prompts, or options, of one forward on each worker; it changes no score."""
    by: Literal["letter", "likelihood"] = "letter"
    """How the chosen option is found: in the generated answer, or as the most likely answer."""
    likelihood_of: Literal["text", "letter"] = "text"
    """What answer stands for an option with `by: likelihood`: its text, or its letter."""

    @model_validator(mode="after")
    def _one_way(self) -> MultipleChoiceSpec:
        if self.by == "letter" and self.likelihood_of != "text":
            raise PydanticCustomError("one_way", "likelihood_of counts with `by: likelihood` only; drop one of the two")
        return self


class MultipleChoice:
    """Finds the chosen option of each row."""

    def __init__(self, spec: MultipleChoiceSpec) -> None:
        self._spec = spec

    @staticmethod
    def example_rows(rows: Sequence[plugin.Row]) -> list[plugin.Row]:
        """Return rows of two to four options whose right one is the first, the second and so on in turn."""
        found = []
        for number, row in enumerate(rows):
            options = ["a red circle", "blue", "it is a square", "none"][: 2 + number % 3]
            answer = plugin.Turn("assistant", LETTERS[number % len(options)])
            found.append(replace(row, turns=(*row.turns[:-1], answer), columns={"options": options}))
        return found

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return `accuracy` and, where rows have types, `accuracy_<type>`; `accuracy_image` of those with a picture
        where not all have one; by letter `unread`, by likelihood `accuracy_norm`. All are between 0 and 1.

        Raises:
            DataError: a row has no options, or its answer is none of them, or it cannot be read.
        """
        rows = list(data.rows)
        options = [plugin.text_column(row, "options") for row in rows]
        right = [right_option(row, some) for row, some in zip(rows, options, strict=True)]
        ways = self._by_letter if self._spec.by == "letter" else self._by_likelihood
        chosen, metrics, more = ways(model, data, workers, rows, options, right)
        scores = [one == expected for one, expected in zip(chosen, right, strict=True)]
        metrics = {**plugin.mean_scores("accuracy", scores, rows), **metrics}
        seen = [score for row, score in zip(rows, scores, strict=True) if row.images]
        if 0 < len(seen) < len(rows):
            metrics["accuracy_image"] = sum(seen) / len(seen)
        predictions = [
            {**plugin.prediction(row, answer, LETTERS[expected], ok), **said}
            for row, expected, ok, (answer, said) in zip(rows, right, scores, more, strict=True)
        ]
        return plugin.outcome_of(metrics, predictions)

    def _by_letter(
        self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers, rows: Sequence[plugin.Row],
        options: Sequence[Sequence[str]], right: Sequence[int],
    ) -> tuple[list[int | None], dict[str, float], list[tuple[str, dict[str, Any]]]]:  # fmt: skip
        spec = self._spec
        answers = workers.divide(
            rows, lambda mine: plugin.greedy_answers(model, mine, data, spec.batch_size, spec.max_new_tokens)
        )
        chosen = [option_said(answer, len(some)) for answer, some in zip(answers, options, strict=True)]
        unread = sum(one is None for one in chosen) / len(chosen)
        return chosen, {"unread": unread}, [(answer, {}) for answer in answers]

    def _by_likelihood(
        self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers, rows: Sequence[plugin.Row],
        options: Sequence[Sequence[str]], right: Sequence[int],
    ) -> tuple[list[int | None], dict[str, float], list[tuple[str, dict[str, Any]]]]:  # fmt: skip
        lettered = self._spec.likelihood_of == "letter"
        answers = {row.index: list(LETTERS[: len(s)]) if lettered else s for row, s in zip(rows, options, strict=True)}

        def nats(mine: list[plugin.Row]) -> list[list[float]]:
            tried = [
                replace(row, turns=(*_asked(row), plugin.Turn("assistant", answer)))
                for row in mine
                for answer in answers[row.index]
            ]
            losses = iter(plugin.answer_losses(model, tried, data, self._spec.batch_size, last_only=True))
            return [[next(losses).nats for _ in answers[row.index]] for row in mine]

        chosen: list[int | None] = []
        norm, more = [], []
        for row, found, expected in zip(rows, workers.divide(rows, nats), right, strict=True):
            texts = answers[row.index]
            best = found.index(min(found))
            each = [one / max(1, len(text)) for one, text in zip(found, texts, strict=True)]
            norm.append(each.index(min(each)) == expected)
            chosen.append(best)
            more.append((texts[best], {"log_likelihoods": [-one for one in found]}))
        return chosen, {"accuracy_norm": sum(norm) / len(norm)}, more


def _asked(row: plugin.Row) -> tuple[plugin.Turn, ...]:
    """Return a row's turns before its last answer."""
    return row.turns[: max(i for i, turn in enumerate(row.turns) if turn.role == "assistant")]


def right_option(row: plugin.Row, options: Sequence[str]) -> int:
    """Return the place of the right option: the one whose letter, or whose text, the row's answer is.

    Raises:
        DataError: it is none of them, or may mean two.
    """
    answer = plugin.last_answer(row).strip()
    meant = {i for i, option in enumerate(options) if option == answer}
    if (letter := option_said(answer, len(options))) is not None:
        meant.add(letter)
    if len(meant) != 1 or not 1 < len(options) <= len(LETTERS):
        known = ", ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        raise plugin.DataError(
            f"row {row.index}: the right answer {answer[:60]!r} is {'more than one' if meant else 'none'} of the "
            f"options {known[:200]}; give the letter of one of 2 to {len(LETTERS)}"
        )
    return meant.pop()


def option_said(answer: str, count: int) -> int | None:
    """Return the place of the option that an answer names, of `count`; None where it cannot be read."""
    letter = answer
    if len(answer) != 1 and answer[1:3] == ". ":
        letter = answer[0]
    elif len(answer) != 1:
        found = re.findall(r"The answer is ([A-Z]).", answer)
        letter = found[0] if len(found) == 1 else ""
    place = LETTERS.find(letter) if letter else -1
    return place if 0 <= place < count else None
