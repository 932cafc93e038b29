"""In float32 neither answers nor losses depend on the batch size: answer by answer, 1 against 16, lengths mixed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from judge_server import judge_server
from orchestrator_plugins.data.easy_vqa import EasyVqaSpec
from orchestrator_plugins.evaluations.multiple_choice import MultipleChoice, MultipleChoiceSpec
from repository import TINY_LLAVA
from transformers import AutoConfig, AutoModelForImageTextToText

from orchestrator import registry
from orchestrator.compression import attach
from orchestrator.data.processing.encode import Encoder
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.rows import Turn, open_data_set
from orchestrator.evaluation.evaluate import answer_losses, evaluation_mode, greedy_answers
from orchestrator.evaluation.protocol import EvaluationData, Workers
from orchestrator.registry import load_object
from orchestrator.spec.components import GenerationSpec
from orchestrator.spec.model import ModelSpec

GENERATING = {
    kind: spec
    for kind in registry.kinds(registry.EVALUATIONS)
    if issubclass(spec := registry.spec_class(registry.EVALUATIONS, kind), GenerationSpec)
}
UNDER = {
    "full": [],
    "heavy": [{"kind": "average_pool", "layer": 1, "stride": 8}],
    "random": [{"kind": "random_drop", "layer": 1, "keep_tokens": 4}],
    "by attention": [{"kind": "fastv", "layer": 2, "keep_tokens": 4}],
}


@pytest.fixture(scope="module")
def data():
    """Real questions of six lengths, some of several turns, with an image and without."""
    processor = load_processor(ModelSpec(model_name_or_path=str(TINY_LLAVA)))
    rows = []
    for number, row in enumerate(open_data_set(EasyVqaSpec(split="test", max_samples=48)).rows()):
        question, answer = row.turns
        if number % 4 == 3:
            row = replace(row, images=())
            question = Turn("user", question.text.removeprefix("<image>\n"))
        more = (Turn("user", "is it red?" * (number % 3)), Turn("assistant", "no")) * (number % 3)
        rows.append(replace(row, turns=(question, answer, *more), columns={"options": ["yes", "no", "blue"]}))
    assert len({len(Encoder(processor, "chat_template", 2048).encode_prompt(row)) for row in rows}) >= 6
    return EvaluationData(rows, Encoder(processor, "chat_template", 2048), processor)


@cache
def untrained(under):
    """Drawn so wide that answers differ from row to row."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(TINY_LLAVA)
    config.text_config.initializer_range = 0.6
    model = AutoModelForImageTextToText.from_config(config).eval()
    attach(model, UNDER[under])
    return model


@pytest.fixture(scope="module", params=UNDER)
def model(request):
    model = untrained(request.param)
    with evaluation_mode(model):
        yield model


def test_generated_answers(model, data):
    alone = greedy_answers(model, data.rows, data, 1, 4)
    assert greedy_answers(model, data.rows, data, 16, 4) == alone
    assert len(set(alone)) > 5, "a model that always says the same would prove nothing"


@pytest.fixture(scope="module")
def server():
    """A judge whose judgement follows from what it is asked."""
    with judge_server(lambda _, body: json.dumps({"pred": "yes", "score": len(str(body)) % 6})) as found:
        yield found


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("judge", "mme"))) for kind in sorted(GENERATING)],
)
def test_every_kind_that_generates(kind, data, server):
    """All that a kind kept of every row, and its metrics."""
    fields = {"data": "test", "max_new_tokens": 4, **({"url": server.url, "model": "stub"} if kind == "judge" else {})}
    rows = [replace(row, turns=row.turns[:2], columns={}) for row in data.rows[:17]]
    implementation = load_object(GENERATING[kind].implementation)
    rows = list(implementation.example_rows(rows)) if hasattr(implementation, "example_rows") else rows
    model = untrained("heavy")
    with evaluation_mode(model):
        found = [
            implementation(GENERATING[kind](**fields, batch_size=batch_size)).run(
                model, replace(data, rows=rows), Workers()
            )
            for batch_size in (1, 16)
        ]
    assert found[0].predictions == found[1].predictions and found[0].metrics == found[1].metrics
    assert len({each["answer"] for each in found[0].predictions}) > 3


def test_losses(model, data):
    alone, together = (answer_losses(model, data.rows, data, batch_size) for batch_size in (1, 16))
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.nats for one in together] == pytest.approx([one.nats for one in alone], rel=1e-5, abs=1e-5)


def test_options_by_likelihood(model, data):
    rows = [replace(row, turns=(*row.turns[:-1], Turn("assistant", "no"))) for row in data.rows]
    found = [
        MultipleChoice(MultipleChoiceSpec(data="test", by="likelihood", batch_size=batch_size)).run(
            model, replace(data, rows=rows), Workers()
        )
        for batch_size in (1, 16)
    ]
    chosen = [[each["answer"] for each in one.predictions] for one in found]
    assert chosen[0] == chosen[1] and found[0].metrics == found[1].metrics
    assert len(set(chosen[0])) > 1, "one option for all rows would prove little"
