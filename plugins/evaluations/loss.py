"""`loss`: cross-entropy and perplexity of the right answers of held-out rows."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from orchestrator import plugin


class LossSpec(plugin.EvaluationSpec):
    """The loss that training minimises, on held-out rows: the mean over all their label tokens, in nats.

    Every token counts alike, whatever its row and its batch; answers of several turns count, as in training, and so
    does what ends them. `perplexity` is e to the loss.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.loss:Loss"
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    metric_names: ClassVar[tuple[str, ...] | None] = ("loss", "perplexity", "tokens")
    not_identity: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    kind: Literal["loss"] = "loss"
    batch_size: plugin.Count = 64
    """Rows of one forward on each worker; it changes no loss but by rounding."""


class Loss:
    """Sums the cross-entropy of all answers."""

    def __init__(self, spec: LossSpec) -> None:
        self._spec = spec

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return `loss` (nats a token), `perplexity`, and `tokens`, the number that it is a mean over.

        Raises:
            DataError: a row is longer than the model may take, or cannot be read, or there is nothing to predict.
        """
        rows = list(data.rows)
        found = workers.divide(rows, lambda mine: plugin.answer_losses(model, mine, data, self._spec.batch_size))
        tokens = sum(one.tokens for one in found)
        if not tokens and not data.should_stop():
            raise plugin.DataError("the rows have no label tokens: no answer is left of them in this template")
        loss = math.fsum(one.nats for one in found) / max(1, tokens)
        # Past this no float holds it; infinity is refused like any number that is not finite.
        perplexity = math.exp(loss) if loss < 709 else math.inf
        predictions = [
            {"row": row.index, "expected": plugin.last_answer(row), "nats": one.nats, "tokens": one.tokens,
             **plugin.pictures_of(row)}
            for row, one in zip(rows, found, strict=True)
        ]  # fmt: skip
        return plugin.outcome_of({"loss": loss, "perplexity": perplexity, "tokens": tokens}, predictions)
