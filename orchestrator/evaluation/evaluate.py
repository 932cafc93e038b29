"""evaluate_state(): one evaluation of one state, from the ledger's weights to the ledger's result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from orchestrator import registry
from orchestrator.data.processing.encode import Encoder
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.records.row_index import num_words, open_rows
from orchestrator.data.rows import data_spec, template_of
from orchestrator.errors import DataError
from orchestrator.evaluation.generate import evaluation_mode
from orchestrator.evaluation.protocol import EvaluationData, Outcome, Workers
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.spec.model import ModelSpec

if TYPE_CHECKING:
    import torch
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


WEIGHTS_FILE = "weights/model.safetensors"


class ResultStore(Protocol):
    """What an evaluation needs of the ledger."""

    def state_folder(self, id: str) -> Path:
        """Return the folder of a finished state."""
        ...

    def fetch(self, state: str, part: Literal["weights"]) -> Path:
        """Return the folder of a finished state's part on this machine, checked."""
        ...

    def write_evaluation(self, id: str, result: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> None:
        """Keep a result, and every answer beside it."""
        ...


def evaluate_state(
    job: EvaluationJob,
    ledger: ResultStore,
    model: PreTrainedModel | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Test a state's weights under the job's points. Every rank calls it; rank 0 writes the result.

    Args:
        job: What to test, on what, under which points.
        ledger: Holds the state's weights and takes the result.
        model: The state's model if it is at hand; its attachment is switched and put back. None loads it from the
            ledger.
        should_stop: Asked between batches; when true on any rank, the evaluation ends without a result.

    Returns:
        The result: `id`, `name`, `under`, `metrics`, `num_samples`, `seconds`, `examples`; None when it was stopped.

    Raises:
        DamagedStateError: the state's weights are missing or damaged.
        StageRunError: a point learns and the state never did; under another variant it can be tested.
        DataError: the rows cannot be read.
    """
    started, workers = time.monotonic(), Workers.here()
    stop = _Stop(should_stop)
    data = replace(evaluation_data(job), should_stop=stop)
    weights = ledger.state_folder(job.state) / WEIGHTS_FILE
    if model is None:
        _fetch(job, ledger, workers)
        model = load_model(job, weights, workers.device)
    outcome = run_under(job, model, data, workers, weights)
    if stop.met(workers, next(model.parameters()).device):
        return None
    result = {
        "id": job.id,
        "name": job.name,
        "under": job.under,
        "metrics": outcome.metrics,
        "num_samples": outcome.num_samples,
        "seconds": round(time.monotonic() - started, 3),
        "examples": outcome.examples,
    }
    if workers.rank == 0:
        ledger.write_evaluation(job.id, result, outcome.predictions)
    return result


class _Stop:
    """Whether this evaluation left rows out."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self._told = False

    def __call__(self) -> bool:
        self._told = self._told or self._should_stop()
        return self._told

    def met(self, workers: Workers, device: Any) -> bool:
        """Return whether any rank was told to stop; every rank asks."""
        import torch

        return bool(workers.sum(torch.tensor([int(self._told)], device=device)).item())


def run_under(job: EvaluationJob, model: Any, data: EvaluationData, workers: Workers, weights: Path) -> Outcome:
    """Return the evaluation itself: attaches the job's points, tests, and takes them off again.

    Args:
        weights: The state's weights file, which holds what its compressors learned.
    """
    spec = registry.spec_class(registry.EVALUATIONS, job.spec["kind"]).model_validate(job.spec)
    evaluation = registry.load_object(spec.implementation)(spec)
    with _points(model, job.points, weights), evaluation_mode(model):
        outcome: Outcome = evaluation.run(model, data, workers)
    return outcome


def lacks_modules(model: Any, points: tuple[dict[str, Any], ...]) -> bool:
    """Return whether a model at hand has no module for a point that learns: an earlier phase used it, the last one
    did not.
    """
    from orchestrator.compression import attachment_of
    from orchestrator.models.compressor_weights import learned_modules

    if attachment_of(model) is None:
        return False
    num_layers = model.config.get_text_config().num_hidden_layers
    specs = (registry.spec_class(registry.COMPRESSORS, point["kind"]).model_validate(point) for point in points)
    names = {spec.module_name(num_layers) for spec in specs} - {None}
    return not names <= learned_modules(model).keys()


@contextmanager
def _points(model: Any, points: tuple[dict[str, Any], ...], weights: Path) -> Iterator[None]:
    """Return the model under these points; afterwards under those it had, so that a training session can go on."""
    from orchestrator.compression import attach, attachment_of
    from orchestrator.models.build import cast_parameters
    from orchestrator.models.compressor_weights import learned_modules, load_learned

    attachment = attachment_of(model)
    if attachment is None:
        attachment = attach(model, [dict(point) for point in points])
        try:
            parameter = next(model.parameters())
            for module in learned_modules(model).values():
                cast_parameters(module.to(parameter.device), parameter.dtype)
            load_learned(model, weights)
            yield
        finally:
            attachment.detach()
        return
    before = [point.spec for point in attachment.points]
    attachment.switch([dict(point) for point in points])
    attachment.set_step()  # what training drew from belongs to other rows
    try:
        yield
    finally:
        attachment.switch(before)


def evaluation_data(job: EvaluationJob) -> EvaluationData:
    """Return the job's rows and what turns them into prompts.

    Raises:
        DataError: there are no rows, or they cannot be read.
    """
    spec = data_spec(job.data)
    rows = open_rows(spec, job.content, job.left_out)
    if not len(rows):
        raise DataError(f"evaluate.{job.name}: the data set has no rows")
    processor = load_processor(ModelSpec.model_validate(job.model))
    return EvaluationData(rows, Encoder(processor, template_of(spec), job.model_max_length), processor)


def _fetch(job: EvaluationJob, ledger: ResultStore, workers: Workers) -> None:
    """Bring the state's weights to each node, where its first rank checks them; all ranks raise what one found."""
    fault: Exception | None = None
    if workers.leads_node:
        try:
            ledger.fetch(job.state, "weights")
        except Exception as error:  # whatever it is, no rank is to wait for one that failed
            fault = error
    for found in workers.gather([fault]):
        if found is not None:
            raise found


def load_model(job: EvaluationJob, weights: Path, device: torch.device) -> PreTrainedModel:
    """Return the model of an evaluation with weights of a file, in the type it is trained to compute in.

    Its bits are those of the model that training has in memory, so that the answers do not depend on which is tested.
    """
    import torch

    from orchestrator.models.build import build_model, cast_parameters, compute_dtype

    spec = ModelSpec.model_validate(job.model)
    model: PreTrainedModel = build_model(spec, weights)
    cast_parameters(model, getattr(torch, compute_dtype(spec)))
    return model.to(device)
