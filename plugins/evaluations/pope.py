"""`pope`: accuracy, precision, recall, F1 and yes-ratio of questions about whether an object is in the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from orchestrator import plugin

MEASURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


class PopeSpec(plugin.GenerationSpec):
    """Greedy answers read as yes or no, with yes as what is looked for (Li et al., arXiv:2305.10355).

    An answer is no where its first sentence has one of the words `No`, `no` and `not`, else yes, as the authors'
    `evaluate.py` and LLaVA's `eval_pope.py` read it. Both print the five measures of one category at a time.
    `f1_mean` is the mean of the categories' F1, which LLaVA-1.5's table has (haotian-liu/LLaVA#626: .8718, .8629 and
    .8450 give the 85.9 of its 7B model); without categories it is `f1`. lmms-eval's `pope` takes F1 and accuracy over
    all rows: `f1`, `accuracy`.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.pope:Pope"
    headline: ClassVar[tuple[str, ...]] = ("f1_mean", "accuracy")
    metric_names: ClassVar[tuple[str, ...] | None] = (
        "f1_mean", *MEASURES, *(f"{name}_*" for name in MEASURES),
    )  # fmt: skip

    kind: Literal["pope"] = "pope"
    max_new_tokens: plugin.Count = 128
    """Longest answer in tokens; LLaVA-1.5's is 128."""


class Pope:
    """Counts right and wrong yes and no."""

    def __init__(self, spec: PopeSpec) -> None:
        self._spec = spec

    @staticmethod
    def example_rows(rows: Sequence[plugin.Row]) -> list[plugin.Row]:
        """Return rows whose answers are yes and no in turn."""
        return [
            replace(row, turns=(*row.turns[:-1], plugin.Turn("assistant", ("yes", "no")[number % 2])))
            for number, row in enumerate(rows)
        ]

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return the measures, between 0 and 1, over all rows and for each category.

        A measure that is not defined (the precision of a model that never says yes) is left out.

        Raises:
            DataError: a row's right answer is not yes or no, or it cannot be read.
        """
        spec, rows = self._spec, list(data.rows)
        wanted = [right_answer(row) for row in rows]
        answers = workers.divide(
            rows, lambda mine: plugin.greedy_answers(model, mine, data, spec.batch_size, spec.max_new_tokens)
        )
        said = list(map(yes_or_no, answers))
        pairs = list(zip(said, wanted, strict=True))
        metrics, f1 = measures(pairs), list[float | None]()
        for category in sorted({row.answer_type for row in rows if row.answer_type is not None}):
            found = measures([pair for row, pair in zip(rows, pairs, strict=True) if row.answer_type == category])
            metrics |= {f"{name}_{category}": value for name, value in found.items()}
            f1.append(found.get("f1"))
        defined = [value for value in f1 or [metrics.get("f1")] if value is not None]
        if len(defined) == max(1, len(f1)):
            metrics["f1_mean"] = sum(defined) / len(defined)
        predictions = [
            {**plugin.prediction(row, answer, right, one == right), "said": one}
            for row, answer, one, right in zip(rows, answers, said, wanted, strict=True)
        ]
        return plugin.outcome_of(metrics, predictions)


def right_answer(row: plugin.Row) -> str:
    """Return a row's right answer, `yes` or `no`.

    Raises:
        DataError: it is another one.
    """
    answer = plugin.last_answer(row).strip().strip(".").lower()
    if answer not in ("yes", "no"):
        raise plugin.DataError(f"row {row.index}: the right answer is {answer[:60]!r}; here it is yes or no")
    return answer


def yes_or_no(answer: str) -> str:
    """Return what an answer says: `no` where a word of its first sentence denies, else `yes`."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def measures(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the measures of pairs of what was said and what is right; those that would be 0 / 0 are left out."""
    hits = sum(pair == ("yes", "yes") for pair in pairs)
    said = sum(one == "yes" for one, _ in pairs)
    there = sum(right == "yes" for _, right in pairs)
    shares = {
        "accuracy": (sum(one == right for one, right in pairs), len(pairs)),
        "precision": (hits, said),
        "recall": (hits, there),
        "f1": (2 * hits, said + there),  # 2PR / (P + R), also where P or R is 0
        "yes_ratio": (said, len(pairs)),
    }
    return {name: part / whole for name, (part, whole) in shares.items() if whole}
