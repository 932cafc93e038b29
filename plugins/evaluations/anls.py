"""`anls`: average normalised Levenshtein similarity, the score of DocVQA, InfographicVQA and ST-VQA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator import plugin


class AnlsSpec(plugin.GenerationSpec):
    """Greedy answers scored by their edit distance to the nearest right answer, 0 below a threshold.

    Biten et al. (arXiv:1907.00490): 1 - distance / longer length. Case and runs of blanks do not count. A
    similarity of exactly the threshold counts, as in the challenge's own script; the paper's formula leaves it out.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.anls:Anls"
    headline: ClassVar[tuple[str, ...]] = ("anls",)
    metric_names: ClassVar[tuple[str, ...] | None] = ("anls", "anls_*")
    columns: ClassVar[tuple[str, ...]] = ("answers",)

    kind: Literal["anls"] = "anls"
    max_new_tokens: plugin.Count = 32
    """Longest answer in tokens; generation ends earlier where every answer has ended."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Similarity below which an answer scores 0; the benchmarks' is 0.5."""


class Anls:
    """Scores answers by edit distance."""

    def __init__(self, spec: AnlsSpec) -> None:
        self._spec = spec

    @staticmethod
    def example_rows(rows: Sequence[plugin.Row]) -> list[plugin.Row]:
        """Return rows with two right answers each."""
        return [replace(row, columns={"answers": [plugin.last_answer(row), "no"]}) for row in rows]

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return the metrics `anls` and, where rows have types, `anls_<type>`, all between 0 and 1.

        Raises:
            DataError: a row has no `answers`, or cannot be read.
        """
        spec, rows = self._spec, list(data.rows)
        wanted = [plugin.text_column(row, "answers") for row in rows]
        answers = workers.divide(
            rows, lambda mine: plugin.greedy_answers(model, mine, data, spec.batch_size, spec.max_new_tokens)
        )
        scores = [similarity(answer, right, spec.threshold) for answer, right in zip(answers, wanted, strict=True)]
        predictions = [
            {**plugin.prediction(row, answer, right[0], score > 0), "score": score}
            for row, answer, right, score in zip(rows, answers, wanted, scores, strict=True)
        ]
        return plugin.outcome_of(plugin.mean_scores("anls", scores, rows), predictions)


def similarity(answer: str, right: Sequence[str], threshold: float = 0.5) -> float:
    """Return 1 - the least normalised edit distance to a right answer, or 0 where that is below the threshold.

    Texts are compared in lower case with blanks joined; the length is that of the longer text as it was given, as in
    the challenge's script.
    """
    from rapidfuzz.distance import Levenshtein

    distances = [
        Levenshtein.distance(_plain(one), _plain(answer)) / max(len(one.upper()), len(answer.upper()), 1)
        for one in right
    ]
    best = 1 - min(distances)
    return best if best >= threshold else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
