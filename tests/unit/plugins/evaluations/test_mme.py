"""mme: pairs by picture, scores on the scale of 2000, the release's files as rows."""

import json

import pytest
from benchmark_sets import write_mme
from orchestrator_plugins.data.llava_json import LlavaJsonSpec
from orchestrator_plugins.evaluations.mme import COGNITION, PERCEPTION, MmeSpec, yes_or_no
from said_answers import outcome, row

from orchestrator.data.rows import open_data_set
from orchestrator.errors import DataError

SPEC = MmeSpec(data="test")


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes", "yes"), ("no.", "no"), ("Yes, it is", "yes"), ("It is yes", "other"), ("Not", "no"), ("y", "other")],
)
def test_answers_are_read_as_the_authors_do(answer, said):
    assert yes_or_no(answer) == said


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mme")
    (folder / "mme.json").write_text(json.dumps(write_mme(folder)))
    return list(open_data_set(LlavaJsonSpec(data_path=str(folder / "mme.json"), columns=("category",))).rows())


def test_all_right_is_two_thousand_and_eight_hundred(monkeypatch, rows):
    found = outcome(monkeypatch, SPEC, rows, [one.turns[-1].text for one in rows])
    assert found.metrics["perception"] == 2000 and found.metrics["cognition"] == 800
    assert found.metrics["accuracy"] == found.metrics["accuracy_plus"] == 1 and found.num_samples == 14 * 4


def test_always_yes_is_half_of_each_accuracy_and_no_pair(monkeypatch, rows):
    found = outcome(monkeypatch, SPEC, rows, ["Yes"] * len(rows)).metrics
    assert found["perception"] == 500 and found["cognition"] == 200 and found["accuracy_plus"] == 0


def test_a_pair_counts_where_both_are_right(monkeypatch, rows):
    # In `count` the first picture is all right, of the second one question: accuracy 3/4, accuracy+ 1/2.
    said = [one.turns[-1].text for one in rows]
    place = next(i for i, one in enumerate(rows) if one.answer_type == "count") + 3
    said[place] = "I cannot tell"
    found = outcome(monkeypatch, SPEC, rows, said).metrics
    assert (found["accuracy_count"], found["accuracy_plus_count"], found["score_count"]) == (0.75, 0.5, 125)
    assert found["perception"] == 2000 - 75 and found["cognition"] == 800


def test_a_sum_without_all_its_subtasks_is_left_out(monkeypatch, rows):
    some = [one for one in rows if one.answer_type != "OCR"]
    found = outcome(monkeypatch, SPEC, some, ["Yes"] * len(some)).metrics
    assert "perception" not in found and found["cognition"] == 200 and "score_OCR" not in found
    assert len(PERCEPTION) == 10 and len(COGNITION) == 4


def test_a_question_alone_is_refused_but_in_a_trial(monkeypatch, rows):
    with pytest.raises(DataError, match=r"row 0: existence has 1 question about .*0000\.jpg; accuracy\+ is defined on"):
        outcome(monkeypatch, SPEC, rows[:1], ["Yes"])
    assert outcome(monkeypatch, SPEC, rows[:1], ["Yes"], trial=True).metrics["accuracy"] == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (row(4, "yes", kind="animals"), "row 4: `category` is 'animals', MME's subtasks are existence, "),
        (row(4, "maybe", kind="count"), "row 4: the right answer is 'maybe'; in MME it is yes or no"),
    ],
)
def test_other_rows_are_refused(monkeypatch, wrong, told):
    with pytest.raises(DataError, match=told):
        outcome(monkeypatch, SPEC, [wrong], ["yes"])
