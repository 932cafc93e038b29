"""`exact_match`: the share of held-out rows answered with exactly the expected words, overall and by answer type."""

from __future__ import annotations

import re
import string
from typing import Any, ClassVar, Literal

from orchestrator import plugin


class ExactMatchSpec(plugin.GenerationSpec):
    """Greedy answers compared with the last answer of each row."""

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.exact_match:ExactMatch"
    metric_names: ClassVar[tuple[str, ...] | None] = ("accuracy", "accuracy_*")

    kind: Literal["exact_match"] = "exact_match"
    ignore_case: plugin.Flag = True
    """Whether answers are compared in lower case."""
    ignore_punctuation: plugin.Flag = True
    """Whether answers are compared without punctuation at their ends."""


def normalised(text: str, spec: ExactMatchSpec) -> str:
    """Return an answer as it is compared: blanks joined, case and outer punctuation left out where the spec says so."""
    text = re.sub(r"\s+", " ", text).strip()
    if spec.ignore_punctuation:
        text = text.strip(string.punctuation + " ")
    return text.lower() if spec.ignore_case else text


class ExactMatch:
    """Counts exact answers."""

    def __init__(self, spec: ExactMatchSpec) -> None:
        self._spec = spec

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return the metrics `accuracy` and, where rows have types, `accuracy_<type>`, all between 0 and 1.

        Raises:
            DataError: a row has no answer to compare with, or cannot be read.
        """
        spec, rows = self._spec, list(data.rows)
        expected = [plugin.last_answer(row) for row in rows]
        answers = workers.divide(
            rows, lambda mine: plugin.greedy_answers(model, mine, data, spec.batch_size, spec.max_new_tokens)
        )
        right = [normalised(a, spec) == normalised(e, spec) for a, e in zip(answers, expected, strict=True)]
        predictions = list(map(plugin.prediction, rows, answers, expected, right))
        return plugin.outcome_of(plugin.mean_scores("accuracy", right, rows), predictions)
