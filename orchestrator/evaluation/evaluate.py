"""Run one evaluation of one state, from the ledger's weights to the ledger's result; a model's greedy answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from orchestrator import registry
from orchestrator.compression import attach, attachment_of
from orchestrator.compression.attach import Attachment
from orchestrator.compression.features import SharedFeatures
from orchestrator.data.processing.encode import IGNORED_LABEL, Encoder, Sample, collate
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.records.row_index import num_words, open_rows
from orchestrator.data.rows import Row, data_spec, template_of
from orchestrator.errors import DataError, StageRunError
from orchestrator.evaluation.fingerprint import fingerprint
from orchestrator.evaluation.protocol import EvaluationData, Outcome, Workers, headline_problem, metric_problem
from orchestrator.models.build import WEIGHTS_FILE, build_model, cast_parameters, compute_dtype
from orchestrator.models.compressor_weights import learned_modules, load_learned
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.components import EvaluationSpec
from orchestrator.spec.model import ModelSpec


def evaluate_state(
    job: EvaluationJob,
    ledger: Ledger,
    model: PreTrainedModel | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    features: SharedFeatures | None = None,
) -> dict[str, Any] | None:
    """Test a state's weights under the job's points. Every rank calls it; rank 0 writes the result.

    Args:
        job: The evaluation: state, data and points.
        ledger: Holds the state's weights and takes the result.
        model: The state's model if it is in memory; its attachment is switched and restored. None loads the model from
            the ledger.
        should_stop: Asked between batches; when true on any rank, the evaluation ends without a result.
        features: Features of images that earlier evaluations of the same state computed; None computes all. What
            measures the machine computes all in any case.

    Returns:
        The result: `id`, `name`, `under`, `metrics`, `num_samples`, `seconds`, `examples`, `fingerprint`,
        `notices`; None when it was stopped.

    Raises:
        DamagedStateError: the state's weights are missing or damaged.
        StageRunError: a point has a learned compressor that the state does not have, or a metric is not finite.
        DataError: the rows cannot be read.
    """
    started = time.monotonic()
    stopped: list[bool] = []  # holds True once should_stop was: the evaluation may then have left rows out

    def stop() -> bool:
        if not stopped and should_stop():
            stopped.append(True)
        return bool(stopped)

    weights = ledger.state_folder(job.state) / WEIGHTS_FILE
    model = state_model(job, ledger) if model is None else model
    workers = _workers_of(model)
    data = replace(evaluation_data(job), should_stop=stop, identity=job.id, in_step=workers.in_step)
    outcome = run_under(job, model, data, workers, weights, features)
    if workers.sum(torch.tensor([len(stopped)], device=next(model.parameters()).device)).item():
        return None
    if problem := metric_problem(outcome.metrics):
        raise StageRunError(f"evaluation {job.label} ({job.spec['kind']}): {problem}")
    spec: type[EvaluationSpec] = registry.spec_class(registry.EVALUATIONS, job.spec["kind"])
    problem = headline_problem(spec, outcome.metrics)
    if problem is not None and outcome.metrics.keys().isdisjoint(spec.headline):
        raise StageRunError(f"evaluation {job.name} ({job.spec['kind']}): {problem}")
    result = {
        "id": job.id,
        "name": job.name,
        "under": job.under,
        "metrics": outcome.metrics,
        "num_samples": outcome.num_samples,
        "seconds": round(time.monotonic() - started, 3),
        "examples": outcome.examples,
        "fingerprint": {**fingerprint(job, data, model, workers), **outcome.fingerprint},
        "notices": list(outcome.notices),
        **({"part": job.part} if job.part else {}),
        **({"files": sorted(outcome.files)} if outcome.files else {}),
    }
    if workers.rank == 0:
        ledger.write_evaluation(job.id, result, outcome.predictions, outcome.files)
    return result


def state_model(job: EvaluationJob, ledger: Ledger) -> PreTrainedModel:
    """Return the model of an evaluation's state, from the ledger, without an attachment. Every rank calls it.

    Raises:
        DamagedStateError: the state's weights are missing or damaged.
    """
    return load_model(job, fetch_weights(job, ledger), Workers.here().device)


def run_under(
    job: EvaluationJob,
    model: Any,
    data: EvaluationData,
    workers: Workers,
    weights: Path,
    features: SharedFeatures | None = None,
) -> Outcome:
    """Run an evaluation with the job's points attached, and detach them again.

    Args:
        job: The evaluation.
        model: The model to test.
        data: Its rows.
        workers: The ranks that share it.
        weights: The state's weights file, with its learned compressors.
        features: Features of images that may be shared.

    Raises:
        StageRunError: it returned something else than an outcome, or measures a model of which this worker holds a
            share.
    """
    spec = registry.spec_class(registry.EVALUATIONS, job.spec["kind"]).model_validate(job.spec)
    evaluation = registry.load_object(spec.implementation)(spec)
    if spec.is_measurement:
        features = None
        if workers.in_step:
            raise StageRunError(
                f"evaluation {job.name} ({spec.kind}): the model does not fit on one worker; each holds a share, and "
                "what they wait for one another would be measured with it; use larger devices, or leave it out"
            )
    with _points(model, job.points, weights) as attachment, evaluation_mode(model), attachment.sharing(features):
        outcome = evaluation.run(model, data, workers)
    if not isinstance(outcome, Outcome):
        raise StageRunError(
            f"evaluation {job.name} ({job.spec['kind']}): run() returned a {type(outcome).__name__}; "
            "return plugin.Outcome(metrics, num_samples, examples)"
        )
    return outcome


def lacks_modules(model: Any, points: tuple[dict[str, Any], ...]) -> bool:
    """Return whether a model in memory lacks the learned compressor of a point: used in an earlier phase, not in the
    last one.
    """
    if attachment_of(model) is None:
        return False
    layers = (
        model.config.get_text_config().num_hidden_layers,
        getattr(getattr(model.config, "vision_config", None), "num_hidden_layers", 0),
    )
    specs = (registry.spec_class(registry.COMPRESSORS, point["kind"]).model_validate(point) for point in points)
    names = {spec.module_name(*layers) for spec in specs} - {None}
    return not names <= learned_modules(model).keys()


@contextmanager
def _points(model: Any, points: tuple[dict[str, Any], ...], weights: Path) -> Iterator[Attachment]:
    """Switch the model to these points, and afterwards back to those it had, so that training can continue."""
    attachment = attachment_of(model)
    if attachment is None:
        attachment = attach(model, [dict(point) for point in points])
        try:
            parameter = next(model.parameters())
            for module in learned_modules(model).values():
                cast_parameters(module.to(parameter.device), parameter.dtype)
            load_learned(model, weights)
            yield attachment
        finally:
            attachment.detach()
        return
    before = [point.spec for point in attachment.points]
    attachment.switch([dict(point) for point in points])
    attachment.set_step()  # random draws must not depend on training's samples
    try:
        yield attachment
    finally:
        attachment.switch(before)


def evaluation_data(job: EvaluationJob) -> EvaluationData:
    """Return the job's rows, and the encoder and processor for its prompts; no rows for one that brings its own data.

    Raises:
        DataError: there are no rows, or they cannot be read.
    """
    if not job.data:
        processor = load_processor(ModelSpec.model_validate(job.model))
        return EvaluationData((), Encoder(processor, "chat_template", job.model_max_length), processor)
    spec = data_spec(job.data)
    rows = open_rows(spec, job.content, job.left_out)
    if not len(rows):
        raise DataError(f"evaluate.{job.name}: the data set has no rows")
    processor = load_processor(ModelSpec.model_validate(job.model))
    if clips := rows.origin.images.clips:
        processor.images.know_clips(clips)
    return EvaluationData(rows, Encoder(processor, template_of(spec), job.model_max_length), processor)


def _workers_of(model: Any) -> Workers:
    """Return the ranks of an evaluation of this model: DeepSpeed marks the parameters that it has divided."""
    return replace(Workers.here(), in_step=hasattr(next(model.parameters()), "ds_id"))


def fetch_weights(job: EvaluationJob, ledger: Ledger) -> Path:
    """Download and verify the state's weights on the first rank of each node; all ranks raise the error of any.

    Returns:
        The weights file.

    Raises:
        DamagedStateError: the state's weights are missing or damaged.
    """
    workers = Workers.here()
    failure: Exception | None = None
    if workers.leads_node:
        try:
            ledger.fetch(job.state, "weights")
        except Exception as error:  # of any kind: no rank may wait for one that failed
            failure = error
    for found in workers.gather([failure]):
        if found is not None:
            raise found
    return ledger.state_folder(job.state) / WEIGHTS_FILE


def load_model(job: EvaluationJob, weights: Path, device: torch.device) -> PreTrainedModel:
    """Return the model of an evaluation with the weights of a file, in the type that training computes in.

    It equals the model that training has in memory bit for bit, so that answers do not depend on which one is tested.
    """
    spec = ModelSpec.model_validate(job.model)
    model: PreTrainedModel = build_model(spec, weights, getattr(torch, compute_dtype(spec)))
    return model.to(device)


def answer_one(job: EvaluationJob, weights: Path, model: PreTrainedModel) -> None:
    """Rehearse an evaluation before training, on the row with the most words; nothing is stored. Every rank calls it.

    Args:
        job: The evaluation; the state it names need not exist.
        weights: Weights of a state that does, which are tested.
        model: The model under training, or one with these weights.

    Raises:
        LlavoltaError: the evaluation cannot be run.
    """
    data = evaluation_data(job)
    longest = [data.rows[int(num_words(data.rows).argmax())]] if len(data.rows) else []
    workers = _workers_of(model)
    run_under(job, model, replace(data, rows=longest, trial=True, in_step=workers.in_step), workers, weights)


def greedy_answers(
    model: Any, rows: Sequence[Row], data: EvaluationData, batch_size: int, max_new_tokens: int
) -> list[str]:
    """Return the model's answer to each row, in the order of `rows`, without special tokens.

    Prompts are padded on the left, so that all answers of a batch begin at the same position, and batched by length, so
    that there is little padding; generation uses a KV cache and stops when every answer of the batch has ended. When
    `data.should_stop` is true, the remaining answers are empty.

    Raises:
        DataError: a prompt is longer than the model may take, or an image cannot be read.
    """
    prompts = [data.encoder.encode_prompt(row) for row in rows]
    # Text-only prompts stay together: a batch then has an image in every row or in none.
    order = sorted(range(len(prompts)), key=lambda i: (bool(prompts[i].images), len(prompts[i]), i))
    tokenizer = data.processor.tokenizer
    answers = [""] * len(rows)
    for first in range(0, len(order), batch_size):
        if data.ends_here():
            break
        part = order[first : first + batch_size]
        batch = _prompt_batch(model, [rows[i] for i in part], [prompts[i] for i in part], data)
        new_tokens = generate(model, batch, data, max_new_tokens)[:, batch.length :]
        for i, text in zip(part, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return answers


class PromptBatch(NamedTuple):
    """Prompts as the model takes them, on its device.

    Attributes:
        inputs: Arguments of its forward, padded on the left.
        rows: Indices of the rows.
    """

    inputs: dict[str, torch.Tensor]
    rows: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest prompt, visual ones included."""
        return int(self.inputs["input_ids"].shape[1])


def prompt_batch(model: Any, rows: Sequence[Row], data: EvaluationData) -> PromptBatch:
    """Return the prompts of rows as one batch.

    Raises:
        DataError: a prompt is longer than the model may take, or an image cannot be read.
    """
    return _prompt_batch(model, rows, [data.encoder.encode_prompt(row) for row in rows], data)


def _prompt_batch(model: Any, rows: Sequence[Row], prompts: Sequence[Sample], data: EvaluationData) -> PromptBatch:
    batch = collate(prompts, data.processor, padding_side="left", with_labels=False)
    return PromptBatch(_moved(batch, next(model.parameters())), tuple(row.index for row in rows))


def generate(model: Any, batch: PromptBatch, data: EvaluationData, max_new_tokens: int, **options: Any) -> Any:
    """Return what the model's `generate` gives for a batch of prompts: greedy, with a KV cache.

    Args:
        model: The model, in evaluation mode.
        batch: The prompts.
        data: What they are of.
        max_new_tokens: Longest answer; generation ends earlier where every answer has ended.
        options: Further ones of `generate`.
    """
    attachment = attachment_of(model)
    if attachment is not None:
        # Random methods draw by row, so that answers do not depend on the batch size.
        attachment.set_step(sample_index=batch.rows)
    return model.generate(
        **batch.inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=end_tokens(model, data.processor.tokenizer),
        pad_token_id=data.processor.pad_token_id,
        # An untrained model may generate the placeholder, which would count as an image without pixels.
        suppress_tokens=data.processor.placeholder_ids,
        **options,
    )


class AnswerLoss(NamedTuple):
    """What a model thinks of a row's answers.

    Attributes:
        nats: Sum over their tokens of the cross-entropy: minus the log-probability, natural logarithm.
        tokens: Number of these tokens.
        greedy: Whether each of them is the model's likeliest next token.
    """

    nats: float
    tokens: int
    greedy: bool = True


def answer_losses(
    model: Any, rows: Sequence[Row], data: EvaluationData, batch_size: int, last_only: bool = False
) -> list[AnswerLoss]:
    """Return the cross-entropy of each row's answers given what stands before them, in the order of `rows`.

    The tokens are those that training learns (`conversation_template`; an answer's end is one of them). Logits are
    taken in float32, sums in float64. When `data.should_stop` is true, what remains has no tokens.

    Args:
        model: The model, in evaluation mode.
        rows: The rows, answers included.
        data: Their encoder and processor.
        batch_size: Rows of a forward; it changes nothing but rounding.
        last_only: Of rows of several turns take the last answer only.

    Raises:
        DataError: a row is longer than the model may take: answers cut off would count as well known.
    """
    samples = [_whole(row, data.encoder, last_only) for row in rows]
    order = sorted(range(len(samples)), key=lambda i: (bool(samples[i].images), len(samples[i]), i))
    found = [AnswerLoss(0.0, 0)] * len(rows)
    weight, attachment = next(model.parameters()), attachment_of(model)
    for first in range(0, len(order), batch_size):
        if data.ends_here():
            break
        part = order[first : first + batch_size]
        moved = _moved(collate([samples[i] for i in part], data.processor), weight)
        targets_BN = moved["labels"][:, 1:]
        asked_BN = targets_BN != IGNORED_LABEL
        if attachment is not None:
            attachment.set_step(sample_index=[rows[i].index for i in part])
            # Of the tokens that predict a label, row by row, whatever was dropped between them.
            logits_LV = model(**moved, label_logits=True).logits
        else:
            del moved["labels"]
            logits_LV = model(**moved).logits[:, :-1][asked_BN]
        nats_L = F.cross_entropy(logits_LV.float(), targets_BN[asked_BN], reduction="none").double().cpu()
        of_row_L = asked_BN.nonzero()[:, 0].cpu()
        nats_B = torch.zeros(len(part), dtype=torch.float64).index_add_(0, of_row_L, nats_L)
        counts = torch.bincount(of_row_L, minlength=len(part)).tolist()
        wrong_L = (logits_LV.argmax(-1) != targets_BN[asked_BN]).cpu()
        greedy = (torch.bincount(of_row_L[wrong_L], minlength=len(part)) == 0).tolist()
        for i, *row in zip(part, nats_B.tolist(), counts, greedy, strict=True):
            found[i] = AnswerLoss(*row)
    return found


def _whole(row: Row, encoder: Encoder, last_only: bool) -> Sample:
    sample, lengths = encoder.encode(row), encoder.lengths(row, prompt_only=False)
    if lengths.kept_tokens < lengths.tokens:
        raise DataError(
            f"row {row.index}: it has {lengths.tokens} tokens, model_max_length is {encoder.model_max_length}; raise "
            "the evaluation's own model_max_length (nothing is trained again) or leave the row out"
        )
    if last_only and (asked := np.flatnonzero(sample.labels != IGNORED_LABEL)).size:
        # Between two answers stands a question, which has no labels.
        begin = asked[np.flatnonzero(np.diff(asked, prepend=-2) > 1)[-1]]
        labels = np.where(np.arange(len(sample)) >= begin, sample.labels, IGNORED_LABEL)
        return replace(sample, labels=labels.astype(sample.labels.dtype))
    return sample


def _moved(batch: dict[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a batch on a parameter's device, what is no integer in its type."""
    return {
        name: value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)
        for name, value in batch.items()
    }


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the tokenizer's and the model's (Gemma 3 ends a turn with another token)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(int(id) for id in ids if id is not None))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Disable dropout and gradients; afterwards restore the mode of every module."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
