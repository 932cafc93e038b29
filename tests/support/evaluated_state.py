"""A state in a ledger, and an evaluation of it."""

from __future__ import annotations

from repository import TINY_LLAVA

from orchestrator.models.initial_weights import write_initial_weights
from orchestrator.plan.jobs import EvaluationJob, RootJob
from orchestrator.plan.ledger import Ledger

MODEL = {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "float32"}


HEAVY = ({"kind": "average_pool", "layer": 1, "stride": 8},)


STATE = "a" * 16


def job(points=(), **fields):
    return EvaluationJob(
        id=fields.pop("id", "b" * 16),
        state=STATE,
        name="vqa",
        under="final",
        points=points,
        spec={"kind": "exact_match", "data": "test", "batch_size": 10, "max_new_tokens": 2},
        data={"kind": "easy_vqa", "split": "test", "max_samples": 30},
        model=MODEL,
        **fields,
    )


def ledger_of(folder):
    """A ledger in which the state is done."""
    ledger = Ledger(folder)
    work = ledger.writing_folder(STATE)
    write_initial_weights(RootJob(STATE, MODEL, seed=0), work)
    ledger.commit(STATE)
    return ledger
