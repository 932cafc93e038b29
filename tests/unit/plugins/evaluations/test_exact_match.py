"""exact_match on a real tiny model: batched answers equal answers one by one, and the counts are right."""

from dataclasses import replace

import pytest
import torch
from orchestrator_plugins.data.easy_vqa import EasyVqaSpec
from orchestrator_plugins.evaluations.exact_match import ExactMatch, ExactMatchSpec, normalised
from repository import TINY_LLAVA
from transformers import AutoConfig, AutoModelForImageTextToText

from orchestrator.data.processing.encode import Encoder
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.rows import Turn, open_data_set
from orchestrator.evaluation.evaluate import evaluation_mode, greedy_answers
from orchestrator.evaluation.protocol import EvaluationData, Workers
from orchestrator.spec.model import ModelSpec


@pytest.fixture(scope="module")
def data():
    processor = load_processor(ModelSpec(model_name_or_path=str(TINY_LLAVA)))
    rows = open_data_set(EasyVqaSpec(split="test", max_samples=24)).rows()
    return EvaluationData(rows, Encoder(processor, "chat_template", 2048), processor)


@pytest.fixture(scope="module")
def model():
    """Untrained, drawn so wide that answers differ from row to row."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(TINY_LLAVA)
    config.text_config.initializer_range = 0.6
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.fixture(scope="module")
def answers(model, data):
    return [one_by_one(model, data, row) for row in data.rows]


def one_by_one(model, data, row):
    """Greedy decoding written out: no batch, no padding, no cache, no generate()."""
    prompt = data.encoder.encode_prompt(row)
    ids = torch.tensor([prompt.input_ids.tolist()])
    pixels = data.processor.images.tensors([prompt.images])
    new = []
    while len(new) < 3:
        with torch.no_grad():
            logits_V = model(input_ids=ids, **pixels).logits[0, -1]
        logits_V[data.processor.image_token_id] = -torch.inf
        token = int(logits_V.argmax())
        if token == data.processor.tokenizer.eos_token_id:
            break
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return data.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_batched_answers_equal_answers_one_by_one(model, data, answers, batch_size):
    with evaluation_mode(model):
        found = greedy_answers(model, data.rows, data, batch_size=batch_size, max_new_tokens=3)
    assert found == answers
    assert len(set(found)) > 5, "a model that always says the same would prove nothing"


def test_the_counts_are_right_overall_and_by_type(model, data, answers):
    # Two rows of three expect what the model says, in other letters.
    rows = [
        replace(row, turns=(row.turns[0], Turn("assistant", f" {answer.upper()} " if i % 3 else "something else")))
        for i, (row, answer) in enumerate(zip(data.rows, answers, strict=True))
    ]
    spec = ExactMatchSpec(data="test", batch_size=8, max_new_tokens=3)
    with evaluation_mode(model):
        outcome = ExactMatch(spec).run(model, replace(data, rows=rows), Workers())
    right = [i % 3 > 0 for i in range(len(rows))]
    assert outcome.num_samples == len(rows) == 24
    assert outcome.metrics["accuracy"] == sum(right) / 24
    for name in ("yes_no", "shape", "color"):
        of_type = [ok for ok, row in zip(right, rows, strict=True) if row.answer_type == name]
        assert outcome.metrics[f"accuracy_{name}"] == sum(of_type) / len(of_type)
    assert [example["row"] for example in outcome.examples] == [row.index for row in rows[:20]]
    assert [example["right"] for example in outcome.examples] == right[:20]
    assert [example["answer"] for example in outcome.examples] == answers[:20]


def test_text_only_rows_beside_rows_with_images(model, data):
    text_only = [
        replace(row, images=(), turns=(Turn("user", row.turns[0].text.removeprefix("<image>\n")), row.turns[1]))
        for row in data.rows[:5]
    ]
    rows = [row for pair in zip(data.rows[:5], text_only, strict=True) for row in pair]
    with evaluation_mode(model):
        assert greedy_answers(model, rows, data, 4, 3) == [one_by_one(model, data, row) for row in rows]


@pytest.mark.parametrize(
    ("said", "expected", "equal"),
    [
        ("Yes.", "yes", True),
        (" rectangle ", "rectangle", True),
        ("dark  blue", "Dark blue", True),
        ("yes no", "yes", False),
        ("", "yes", False),
        ("it's", "its", False),
    ],
)
def test_what_counts_as_the_same(said, expected, equal):
    spec = ExactMatchSpec(data="test")
    assert (normalised(said, spec) == normalised(expected, spec)) is equal


def test_strict_comparison():
    spec = ExactMatchSpec(data="test", ignore_case=False, ignore_punctuation=False)
    assert normalised("Yes.", spec) == "Yes." != normalised("yes", spec)


def test_evaluation_mode_puts_every_module_back(model):
    model.train()
    model.model.vision_tower.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert model.training and not model.model.vision_tower.training and torch.is_grad_enabled()
    model.eval()
