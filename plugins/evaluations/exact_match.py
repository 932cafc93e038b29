"""`exact_match`: the share of held-out rows answered with exactly the expected words, overall and by answer type."""

from __future__ import annotations

import re
import string
from typing import Any, ClassVar, Literal

from orchestrator import plugin

EXAMPLES = 20


class ExactMatchSpec(plugin.EvaluationSpec):
    """Greedy answers compared with the last answer of each row."""

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.exact_match:ExactMatch"
    metric_names: ClassVar[tuple[str, ...] | None] = ("accuracy", "accuracy_*")
    not_identity: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    kind: Literal["exact_match"] = "exact_match"
    batch_size: plugin.Count = 256
    """Prompts generated for at once on each worker; it changes no score."""
    max_new_tokens: plugin.Count = 16
    """Longest answer in tokens; generation ends earlier where every answer has ended."""
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
    """Counts exact answers; ranks take every n-th row of the rows sorted by length."""

    def __init__(self, spec: ExactMatchSpec) -> None:
        self._spec = spec

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return the metrics `accuracy` and, where rows have types, `accuracy_<type>`, all between 0 and 1.

        Raises:
            DataError: a row has no answer to compare with, or cannot be read.
        """
        import torch

        by_length = plugin.num_words(data.rows).argsort(kind="stable").tolist()
        mine = by_length[workers.rank :: workers.count]
        rows = [data.rows[i] for i in mine]
        wanted = [_answer(row) for row in rows]
        answers = plugin.greedy_answers(model, rows, data, self._spec.batch_size, self._spec.max_new_tokens)
        types = sorted({row.answer_type for row in data.rows if row.answer_type is not None})
        device = next(model.parameters()).device
        counts_T2 = torch.zeros(1 + len(types), 2, dtype=torch.int64, device=device)
        predictions = []
        for i, row, answer, expected in zip(mine, rows, answers, wanted, strict=True):
            right = normalised(answer, self._spec) == normalised(expected, self._spec)
            counts_T2[0] += torch.tensor([right, 1], device=device)
            if row.answer_type is not None:
                counts_T2[1 + types.index(row.answer_type)] += torch.tensor([right, 1], device=device)
            predictions.append((i, plugin.prediction(row, answer, expected, right)))
        found = workers.sum(counts_T2).tolist()
        names = ["accuracy", *(f"accuracy_{name}" for name in types)]
        metrics = {name: right / total for name, (right, total) in zip(names, found, strict=True) if total}
        all_ranks = [each for _, each in sorted(workers.gather(predictions), key=lambda pair: pair[0])]
        examples = [{key: each[key] for key in each if key != "images"} for each in all_ranks[:EXAMPLES]]
        return plugin.Outcome(metrics, int(found[0][1]), examples, all_ranks)


def _answer(row: plugin.Row) -> str:
    for turn in reversed(row.turns):
        if turn.role == "assistant":
            return turn.text
    raise plugin.DataError(f"row {row.index}: no answer to compare with")
