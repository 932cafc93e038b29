"""pope: LLaVA's reading of answers, the measures by hand, and the release's files as rows."""

import json

import pytest
from benchmark_sets import CATEGORIES, write_pope
from orchestrator_plugins.data.llava_json import LlavaJsonSpec
from orchestrator_plugins.evaluations.pope import PopeSpec, yes_or_no
from said_answers import outcome, row

from orchestrator.data.rows import open_data_set
from orchestrator.errors import DataError
from orchestrator.evaluation.protocol import metric_problem


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a car. Yes.", "no"),
        ("Yes. It is not far.", "yes"),  # the first sentence counts
        ("NO", "yes"),  # of these words only, as written
        ("None", "yes"),
        ("No\nreally", "yes"),  # words are what blanks part
        ("", "yes"),
    ],
)
def test_answers_are_read_as_llava_does(answer, said):
    assert yes_or_no(answer) == said


def test_the_measures_by_hand(monkeypatch):
    # 3 hits, 1 false alarm, 2 misses, 4 right refusals.
    right = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    said = ["Yes"] * 4 + ["No"] * 6
    rows = [row(n, answer) for n, answer in enumerate(right)]
    found = outcome(monkeypatch, PopeSpec(data="test"), rows, said)
    wanted = {"accuracy": 0.7, "precision": 3 / 4, "recall": 3 / 5, "f1": 2 * 0.75 * 0.6 / 1.35, "yes_ratio": 0.4}
    assert found.metrics == pytest.approx({**wanted, "f1_mean": wanted["f1"]})
    assert found.num_samples == 10 and [each["said"] for each in found.predictions] == ["yes"] * 4 + ["no"] * 6


def test_the_release_by_category(tmp_path, monkeypatch):
    (tmp_path / "pope.json").write_text(json.dumps(write_pope(tmp_path)))
    rows = open_data_set(LlavaJsonSpec(data_path=str(tmp_path / "pope.json"), columns=("category",))).rows()
    # Of each category: yes, no, yes, no. `random` is all right, `popular` always yes, `adversarial` misses one.
    said = ["Yes", "No", "Yes", "No"] + ["Yes"] * 4 + ["Yes", "No", "No", "No"]
    found = outcome(monkeypatch, PopeSpec(data="test"), list(rows), said).metrics
    assert [found[f"f1_{name}"] for name in CATEGORIES] == pytest.approx([1, 2 / 3, 2 / 3])
    assert [found[f"accuracy_{name}"] for name in CATEGORIES] == [1, 0.5, 0.75]
    assert [found[f"yes_ratio_{name}"] for name in CATEGORIES] == [0.5, 1, 0.25]
    assert found["f1_mean"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3), "the figure of LLaVA-1.5's table"
    assert found["f1"] == pytest.approx(2 * 5 / (7 + 6)), "over all rows it is another"


def test_a_measure_without_cases_is_left_out(monkeypatch):
    rows = [row(0, "yes", kind="random"), row(1, "no", kind="popular")]
    found = outcome(monkeypatch, PopeSpec(data="test"), rows, ["No", "No"]).metrics
    assert found["accuracy"] == 0.5 and found["f1"] == 0 and found["recall"] == 0
    assert "precision" not in found and "f1_mean" not in found, "no yes, and no F1 of popular: 0 / 0"
    assert metric_problem(found) is None


def test_a_right_answer_that_is_neither_is_refused(monkeypatch):
    with pytest.raises(DataError, match="row 3: the right answer is 'red'; here it is yes or no"):
        outcome(monkeypatch, PopeSpec(data="test"), [row(3, "red")], ["yes"])
