"""multiple_choice: LLaVA's reading of letters, and likelihoods against sums written out."""

import pytest
from orchestrator_plugins.evaluations.multiple_choice import MultipleChoiceSpec, option_said, right_option
from pydantic import ValidationError
from said_answers import outcome, row

from orchestrator import plugin
from orchestrator.errors import DataError
from orchestrator.evaluation.evaluate import AnswerLoss


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ("B", 1),
        ("B. a dog", 1),
        ("The answer is C.", 2),
        ("I think the colour is red. The answer is A", None),  # a sign belongs behind the letter
        ("The answer is A. No: The answer is B.", None),
        ("B.", None),
        ("b", None),
        ("D", None),  # of three options
        ("a dog", None),
        ("", None),
    ],
)
def test_letters_are_read_as_llava_does(answer, place):
    assert option_said(answer, 3) == place


def test_by_letter(monkeypatch):
    rows = [
        row(0, "A", kind="natural", options=["x", "y"]),
        row(1, "B. y", kind="social", options=["x", "y"]),
        row(2, "z", images=(), kind="social", options=["x", "y", "z"]),
    ]
    found = outcome(monkeypatch, MultipleChoiceSpec(data="test"), rows, ["A", "A. x", "z"])
    wanted = {"accuracy": 1 / 3, "accuracy_natural": 1, "accuracy_social": 0, "accuracy_image": 1 / 2, "unread": 1 / 3}
    assert found.metrics == pytest.approx(wanted)
    assert [each["expected"] for each in found.predictions] == ["A", "B", "C"]


def test_by_likelihood_the_sum_and_the_sum_a_character(monkeypatch):
    nats = {"red": 3.0, "a red circle": 6.0, "no": 3.0, "yes": 3.0}
    monkeypatch.setattr(
        plugin, "answer_losses", lambda _, tried, *__, last_only: [AnswerLoss(nats[r.turns[-1].text], 1) for r in tried]
    )
    rows = [
        row(0, "B", options=["red", "a red circle"]),  # 3 < 6, but 6/12 < 3/3
        row(1, "yes", options=["yes", "no"]),  # a tie: the first; 3/3 < 3/2
    ]
    found = outcome(monkeypatch, MultipleChoiceSpec(data="test", by="likelihood"), rows, ["", ""])
    assert found.metrics == {"accuracy": 0.5, "accuracy_norm": 1.0}
    assert found.predictions[0]["answer"] == "red" and found.predictions[0]["log_likelihoods"] == [-3, -6]


@pytest.mark.parametrize(
    ("answer", "options", "told"),
    [
        ("D", ["x", "y"], "'D' is none of the options A. x, B. y"),
        ("A", ["B", "A"], "'A' is more than one of the options A. B, B. A"),
        ("A", ["x"], "give the letter of one of 2 to 26"),
    ],
)
def test_a_right_answer_that_is_no_option_is_refused(answer, options, told):
    with pytest.raises(DataError, match=told):
        right_option(row(1, answer, options=options), options)


def test_a_setting_that_would_not_count_is_refused():
    with pytest.raises(ValidationError, match="counts with `by: likelihood` only"):
        MultipleChoiceSpec(data="test", likelihood_of="letter")
