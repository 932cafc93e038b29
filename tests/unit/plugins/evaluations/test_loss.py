"""loss: the mean over all label tokens, against log-probabilities added up one row at a time."""

import math
from dataclasses import replace

import pytest
import torch
from orchestrator_plugins.evaluations.loss import Loss, LossSpec

from orchestrator import plugin
from orchestrator.compression import attach
from orchestrator.compression.testing.families import TINY
from orchestrator.data.processing.encode import IGNORED_LABEL, Encoder
from orchestrator.data.rows import Turn
from orchestrator.errors import DataError
from orchestrator.evaluation.evaluate import AnswerLoss, answer_losses, evaluation_mode
from orchestrator.evaluation.protocol import EvaluationData, Workers
from orchestrator.testing.evaluation import rows_of_every_form, tiny_processor


@pytest.fixture(scope="module")
def model():
    return TINY["llava"].build("sdpa", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = rows_of_every_form(tmp_path_factory.mktemp("rows"))
    again = (Turn("user", "and now?"), Turn("assistant", "a longer answer of a second turn"))
    rows[1] = replace(rows[1], turns=rows[1].turns + again)
    return EvaluationData(rows, Encoder(tiny_processor(), "chat_template", 4096), tiny_processor())


def written_out(model, data, row, last_only=False):
    """Minus the log-probability of each label token of one row: no batch, no padding, no labels given to the model."""
    sample = data.encoder.encode(row)
    with torch.no_grad():
        pixels = data.processor.images.tensors([sample.images])
        logits_NV = model(input_ids=torch.tensor([sample.input_ids.tolist()]), **pixels).logits[0].double()
    found, run = [], []
    for place in range(1, len(sample)):
        if sample.labels[place] == IGNORED_LABEL:
            found, run = found + run, []
            continue
        run.append(-float(torch.log_softmax(logits_NV[place - 1], -1)[sample.input_ids[place]]))
    return (run or found) if last_only else found + run


def test_the_mean_over_tokens_against_sums_written_out(model, data):
    each = [written_out(model, data, row) for row in data.rows]
    flat = [nats for row in each for nats in row]
    wanted = sum(flat) / len(flat)
    for batch_size in (1, 3, 8):
        with evaluation_mode(model):
            found = Loss(LossSpec(data="test", batch_size=batch_size)).run(model, data, Workers())
        assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-5)
        assert found.metrics["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
        assert found.metrics["tokens"] == len(flat)
        assert [one["tokens"] for one in found.predictions] == [len(row) for row in each]
        assert [one["nats"] for one in found.predictions] == pytest.approx([sum(row) for row in each], rel=1e-5)
    by_row = sum(sum(row) / len(row) for row in each) / len(each)
    assert abs(by_row - wanted) > 1e-3, "a mean over rows would be another: the test can tell them apart"


def test_of_several_turns_the_last_alone(model, data):
    with evaluation_mode(model):
        found = answer_losses(model, data.rows, data, 4, last_only=True)
    wanted = [written_out(model, data, row, last_only=True) for row in data.rows]
    assert [one.tokens for one in found] == list(map(len, wanted))
    assert [one.nats for one in found] == pytest.approx(list(map(sum, wanted)), rel=1e-5)
    assert found[1].tokens < len(written_out(model, data, data.rows[1]))


@pytest.mark.parametrize("points", [[], [{"kind": "average_pool", "layer": 1, "stride": 4}]])
def test_under_a_compressor_it_is_the_loss_that_training_computes(data, points):
    model = TINY["llava"].build("sdpa", 0)
    attach(model, points)
    with evaluation_mode(model):
        found = answer_losses(model, data.rows, data, 8)
        for row, one in zip(data.rows, found, strict=True):
            sample = data.encoder.encode(row)
            ids, labels = (torch.tensor([part.tolist()]) for part in (sample.input_ids, sample.labels))
            loss = model(input_ids=ids, labels=labels, **data.processor.images.tensors([sample.images])).loss
            assert one.nats == pytest.approx(float(loss) * one.tokens, rel=1e-5)


def test_a_row_that_does_not_fit_is_refused(model, data):
    short = replace(data, encoder=Encoder(tiny_processor(), "chat_template", 40))
    with pytest.raises(
        DataError, match=r"row \d: it has \d+ tokens, model_max_length is 40; raise the evaluation's own"
    ):
        answer_losses(model, data.rows, short, 4)


def test_rows_without_label_tokens_have_no_loss(monkeypatch, data):
    monkeypatch.setattr(plugin, "answer_losses", lambda _, rows, *__: [AnswerLoss(0.0, 0)] * len(rows))
    with pytest.raises(DataError, match="no label tokens"):
        Loss(LossSpec(data="test")).run(None, data, Workers())
