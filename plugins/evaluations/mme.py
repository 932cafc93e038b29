"""`mme`: accuracy and accuracy+ of each subtask, and the scores of perception (at most 2000) and cognition (800)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from orchestrator import plugin

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class MmeSpec(plugin.GenerationSpec):
    """Greedy answers read as yes or no, two questions a picture (Fu et al., arXiv:2306.13394).

    A subtask's score is 100 (accuracy + accuracy+), where accuracy+ is the share of pictures with both questions right;
    `perception` and `cognition` are sums over their subtasks, reported where all of these are there. The data's
    `category` names the subtask. Reading follows the authors' `calculation.py`: an answer is yes or no if it is that,
    or if its first four letters hold it, else neither, and wrong.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.mme:Mme"
    headline: ClassVar[tuple[str, ...]] = ("perception", "accuracy")
    metric_names: ClassVar[tuple[str, ...] | None] = (
        "perception", "cognition", "accuracy", "accuracy_plus",
        *(f"{name}_{task}" for task in (*PERCEPTION, *COGNITION) for name in ("score", "accuracy", "accuracy_plus")),
    )  # fmt: skip
    columns: ClassVar[tuple[str, ...]] = ("category",)

    kind: Literal["mme"] = "mme"
    max_new_tokens: plugin.Count = 128
    """Longest answer in tokens; LLaVA-1.5's is 128."""


class Mme:
    """Scores pairs of questions about a picture."""

    def __init__(self, spec: MmeSpec) -> None:
        self._spec = spec

    @staticmethod
    def example_rows(rows: Sequence[plugin.Row]) -> list[plugin.Row]:
        """Return each row with an image twice, the answers yes and no, the subtasks in turn."""
        found: list[plugin.Row] = []
        for number, row in enumerate(row for row in rows if row.images):
            task = (*PERCEPTION, *COGNITION)[number]
            for answer in ("yes", "no"):
                turns = (*row.turns[:-1], plugin.Turn("assistant", answer))
                found.append(replace(row, index=len(found), turns=turns, answer_type=task, columns={"category": task}))
        return found

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return `accuracy` and `accuracy_plus`, of all and of each subtask (0 to 1), and the scores.

        Raises:
            DataError: a row has no subtask of MME, or is not yes or no, or a picture does not have two questions.
        """
        spec, rows = self._spec, list(data.rows)
        wanted = [_right_answer(row) for row in rows]
        pictures = _pictures(rows, data.trial)
        answers = workers.divide(
            rows, lambda mine: plugin.greedy_answers(model, mine, data, spec.batch_size, spec.max_new_tokens)
        )
        said = list(map(yes_or_no, answers))
        right = [one == expected for one, expected in zip(said, wanted, strict=True)]
        metrics: dict[str, float] = {}
        scores: dict[str, float] = {}
        for task in (*PERCEPTION, *COGNITION):
            if found := accuracies([[right[i] for i in pair] for key, pair in pictures.items() if key[0] == task]):
                scores[task] = 100 * sum(found)
                metrics |= {f"score_{task}": scores[task], f"accuracy_{task}": found[0]}
                metrics[f"accuracy_plus_{task}"] = found[1]
        for name, tasks in (("cognition", COGNITION), ("perception", PERCEPTION)):
            if scores.keys() >= set(tasks):
                metrics = {name: sum(scores[task] for task in tasks), **metrics}
        accuracy, plus = accuracies([[right[i] for i in pair] for pair in pictures.values()])
        predictions = [
            {**plugin.prediction(row, answer, expected, ok), "said": one}
            for row, answer, expected, ok, one in zip(rows, answers, wanted, right, said, strict=True)
        ]
        return plugin.outcome_of({**metrics, "accuracy": accuracy, "accuracy_plus": plus}, predictions)


def _pictures(rows: Sequence[plugin.Row], trial: bool) -> dict[tuple[str, ...], list[int]]:
    """Return the places of the rows of each subtask and picture."""
    found: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(rows):
        if row.answer_type not in (*PERCEPTION, *COGNITION):
            known = ", ".join((*PERCEPTION, *COGNITION))
            raise plugin.DataError(f"row {row.index}: `category` is {row.answer_type!r}, MME's subtasks are {known}")
        found.setdefault((row.answer_type, *(image.path for image in row.images)), []).append(number)
    for (task, *paths), places in found.items():
        if len(places) != 2 and not trial:
            raise plugin.DataError(
                f"row {rows[places[0]].index}: {task} has {len(places)} question{'s' * (len(places) != 1)} about "
                f"{', '.join(paths) or 'no picture'}; accuracy+ is defined on two a picture. max_samples may have cut "
                "pairs apart"
            )
    return found


def _right_answer(row: plugin.Row) -> str:
    answer = plugin.last_answer(row).strip().strip(".").lower()
    if answer not in ("yes", "no"):
        raise plugin.DataError(f"row {row.index}: the right answer is {answer[:60]!r}; in MME it is yes or no")
    return answer


def yes_or_no(answer: str) -> str:
    """Return `yes` or `no` as an answer or its first four letters say, or `other`."""
    text = answer.strip().lower()
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def accuracies(pictures: Sequence[Sequence[bool]]) -> tuple[float, ...]:
    """Return accuracy and accuracy+ of pictures' questions, right or not; nothing where there are none."""
    if not pictures:
        return ()
    questions = [ok for picture in pictures for ok in picture]
    return sum(questions) / len(questions), sum(map(all, pictures)) / len(pictures)
