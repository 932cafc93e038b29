"""One answer of an evaluation before anything is trained, to the prompt that is longest in words; nothing is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator import registry
from orchestrator.data.row_index import num_words
from orchestrator.evaluation.evaluate import WEIGHTS_FILE, ResultStore, evaluation_data, load_model, run_under
from orchestrator.evaluation.protocol import Workers
from orchestrator.plan.jobs import EvaluationJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answer_one(job: EvaluationJob, ledger: ResultStore, state: str, model: PreTrainedModel | None = None) -> None:
    """Run an evaluation on one row; every rank calls it.

    Args:
        job: The evaluation; the state it names need not exist.
        ledger: Holds the weights.
        state: Whose weights are tested; on this node already.
        model: The model under training, if it can be used. Without it a point that learns is passed over: nobody has
            its weights yet.

    Raises:
        LlavoltaError: the evaluation cannot be run.
    """
    learns = any(registry.spec_class(registry.COMPRESSORS, point["kind"]).learns for point in job.points)
    if model is None and learns:
        return
    data = evaluation_data(job)
    weights = ledger.state_folder(state) / WEIGHTS_FILE
    longest = data.rows[int(num_words(data.rows).argmax())]
    workers = Workers.here()
    model = load_model(job, weights, workers.device) if model is None else model
    run_under(job, model, replace(data, rows=[longest]), workers, weights)
