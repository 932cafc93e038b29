"""`check_evaluation` proves the built-in evaluation and names what is wrong with broken ones, each in one way."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from judge_server import judge_server

from orchestrator import plugin
from orchestrator.compression.testing.families import TINY
from orchestrator.data.processing.encode import Encoder
from orchestrator.evaluation.evaluate import evaluation_mode
from orchestrator.testing.evaluation import _silent, rows_of_every_form, tiny_processor


class Lengths(plugin.EvaluationSpec):
    """The mean number of letters of the answers."""

    implementation: ClassVar[str] = f"{__name__}:MeanLength"

    metric_names: ClassVar[tuple[str, ...] | None] = ("accuracy", "letters", "images")
    kind: Literal["lengths"] = "lengths"
    broken: str = ""


class MeanLength:
    def __init__(self, spec):
        self.broken = spec.broken

    def run(self, model, data, workers):
        answers = plugin.greedy_answers(model, data.rows, data, 8, 3)
        letters = sum(map(len, answers))
        metrics = {
            "no metric": {},
            "an illegal name": {"letters@1": 1.0},
            "another name": {"leters": 1.0},
            "a tensor": {"letters": torch.tensor(1.0)},
            "not a number": {"letters": float("nan")},
            "at random": {"letters": float(torch.rand(()))},
        }.get(self.broken, {"letters": letters / len(answers)})
        if self.broken == "divides by what may be empty":
            metrics = {"letters": 1 / letters}
        if self.broken == "expects an image":
            metrics = {"images": float(len(data.rows[0].images[0].path))} if len(data.rows) == 1 else metrics
        if self.broken == "trains":
            next(model.parameters()).data.mul_(1.1)
        count = len(data.rows) - (self.broken == "leaves a row out")
        examples = [{"answer": object()}] if self.broken == "examples of objects" else []
        wrong = self.broken == "predictions of some rows"
        said = [plugin.prediction(row, "yes", "no", False) for row in data.rows][wrong:]
        return metrics if self.broken == "metrics alone" else plugin.Outcome(metrics, count, examples, said)


class Misspelt(Lengths):
    """Counts letters under a headline that has another name too."""

    headline: ClassVar[tuple[str, ...]] = ("letters", "leters")
    metric_names: ClassVar[tuple[str, ...] | None] = None


def test_a_headline_that_is_no_metric_is_named():
    with pytest.raises(AssertionError, match="headline names leters; its metrics are letters"):
        plugin.check_evaluation(Misspelt)


BROKEN = {
    "metrics alone": "return plugin.Outcome",
    "no metric": "give at least one, the headline first",
    "an illegal name": "'letters@1' is no name of a metric",
    "another name": "does not have leters; add it",
    "a tensor": "give a finite Python number",
    "not a number": "letters is nan",
    "at random": "run again it gives the same: first",
    "trains": "is another; an evaluation only looks",
    "leaves a row out": "it is 7 of 8 rows",
    "predictions of some rows": "they are of the rows",
    "examples of objects": "examples and predictions are mappings of JSON values: it raised TypeError",
    "divides by what may be empty": "every answer is empty can be tested: it raised ZeroDivisionError",
    "expects an image": "a row without an image alone can be tested: it raised IndexError",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_promise_is_named(broken):
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        plugin.check_evaluation(Lengths(data="test", broken=broken))


def test_a_sound_one_keeps_its_contract():
    report = plugin.check_evaluation(Lengths)
    assert report.component == "lengths" and "num_samples counts the rows" in report.held
    assert plugin.check_evaluation({"kind": "exact_match", "max_new_tokens": 3}).component == "exact_match"


KINDS = {
    "vqa_accuracy": {"max_new_tokens": 3},
    "anls": {"max_new_tokens": 3},
    "pope": {"max_new_tokens": 3},
    "mme": {"max_new_tokens": 3},
    "multiple_choice": {"by": "likelihood"},
    "loss": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_built_in_ones_keep_it_on_rows_that_they_take(kind):
    held = plugin.check_evaluation({"kind": kind, **KINDS[kind]}).held
    assert ("a row without an image alone can be tested" in held) is (kind != "mme")


def test_a_judge_keeps_it_too(monkeypatch):
    with judge_server() as server:
        report = plugin.check_evaluation({"kind": "judge", "url": server.url, "model": "stub", "max_new_tokens": 3})
    assert "run again it gives the same" in report.held


class Columned(Lengths):
    """Needs a column that the kit does not have."""

    columns: ClassVar[tuple[str, ...]] = ("shades",)


def test_a_column_that_the_kit_lacks_is_named():
    with pytest.raises(AssertionError, match=r"columns names shades, which the kit's rows do not have; add them in"):
        plugin.check_evaluation(Columned)


def test_a_silent_model_answers_nothing_and_is_put_back(tmp_path):
    processor, model = tiny_processor(), TINY["llava"].build("sdpa", 0)
    rows = rows_of_every_form(tmp_path)
    data = plugin.EvaluationData(rows, Encoder(processor, "chat_template", 4096), processor)
    with evaluation_mode(model):
        before = plugin.greedy_answers(model, rows, data, 8, 3)
        with _silent(model, processor):
            assert plugin.greedy_answers(model, rows, data, 8, 3) == [""] * len(rows)
        assert plugin.greedy_answers(model, rows, data, 8, 3) == before
    assert any(before), "a model that says nothing anyway would prove nothing"
