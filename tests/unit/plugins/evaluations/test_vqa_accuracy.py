"""vqa_accuracy: the soft score against all ways to leave a person out, EvalAI's rules case by case."""

from itertools import combinations

import pytest
from orchestrator_plugins.evaluations.vqa_accuracy import (
    ARTICLES,
    CONTRACTIONS,
    NUMBERS,
    PUNCTUATION,
    VqaAccuracySpec,
    normalised,
    soft_accuracy,
)
from said_answers import outcome, row

from orchestrator.errors import DataError


@pytest.mark.parametrize(("people", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_worked_scores_of_the_benchmark(people, score):
    given = ["red"] * people + ["blue"] * (10 - people)
    assert soft_accuracy("red", given) == pytest.approx(score)
    # The definition: all sets of nine of the ten people.
    nines = [min(nine.count("red") / 3, 1) for nine in combinations(given, 9)]
    assert soft_accuracy("red", given) == pytest.approx(sum(nines) / 10)


def test_people_who_disagree_are_counted_after_normalising():
    given = ["2", "two", "Two.", "three", "a couple", "2 dogs", "2", "3", "4", "5"]
    assert soft_accuracy("two", given) == 1.0 and soft_accuracy("three", given) == pytest.approx(0.6)


NORMALISED = {
    "Yes.": "yes",
    "The  Red\nCar": "red car",
    "two dogs": "2 dogs",
    "none": "0",
    "dont": "don't",
    "it doesnt, really?": "it doesn't really",
    "dog's": "dog 's",
    "1,000": "1000",
    "3.5": "3.5",
    "e.g.": "eg",
    "t-shirt": "t shirt",  # a mark inside a word becomes a blank
    "a - b": "b",  # one that touches a blank goes, and the article with it
    "t-shirt - red": "tshirt red",  # anywhere in the text
    "(left)": "left",
    "": "",
    "somebody'd": "somebodyd",
    "." * 33: ".",  # the server's script takes 32
}


@pytest.mark.parametrize("text", NORMALISED)
def test_evalais_rules(text):
    assert normalised(text) == NORMALISED[text]


def test_the_tables_are_those_of_the_server():
    assert len(CONTRACTIONS) == 120 and len(PUNCTUATION) == 21
    # Of each pair one is the other with an apostrophe more, less, or elsewhere.
    assert all(short.replace("'", "") == long.replace("'", "") for short, long in CONTRACTIONS.items())
    assert [NUMBERS[word] for word in ("none", "zero", "one", "ten")] == ["0", "0", "1", "10"] and len(NUMBERS) == 12
    assert sorted(ARTICLES) == ["a", "an", "the"]


def test_the_mean_overall_and_by_type_and_records(monkeypatch):
    rows = [
        row(0, "red", kind="color", answers=["red"] * 2 + ["blue"] * 8),
        # As VQA's annotations have them.
        row(1, "2", kind="number", answers=[{"answer": "2", "answer_id": n} for n in range(10)]),
        row(2, "no", kind="color", answers=["no"] * 9 + ["yes"]),
    ]
    found = outcome(monkeypatch, VqaAccuracySpec(data="test"), rows, ["Red", "two", "yes"])
    assert found.metrics == pytest.approx(
        {"accuracy": (0.6 + 1 + 0.3) / 3, "accuracy_color": (0.6 + 0.3) / 2, "accuracy_number": 1}
    )
    assert [each["score"] for each in found.predictions] == pytest.approx([0.6, 1, 0.3])
    assert [each["right"] for each in found.predictions] == [True, True, False]
    assert found.predictions[0]["expected"] == "blue", "what most people said"


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({}, "row 7: `answers` is missing; it is a list of texts, which the data's `columns` names"),
        ({"answers": "red"}, "row 7: `answers` is 'red'; it is a list of texts"),
        ({"answers": ["red"]}, "row 7: `answers` has 1; VQA's accuracy is defined over the answers of 10 people"),
    ],
)
def test_other_rows_are_refused_by_number(monkeypatch, columns, told):
    with pytest.raises(DataError, match=told):
        outcome(monkeypatch, VqaAccuracySpec(data="test"), [row(7, "red", **columns)], ["red"])
