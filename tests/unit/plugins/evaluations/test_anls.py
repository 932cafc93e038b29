"""anls: worked scores, and an edit distance written out."""

import random

import pytest
from orchestrator_plugins.evaluations.anls import AnlsSpec, similarity
from said_answers import outcome, row

from orchestrator.errors import DataError


def edits(one: str, other: str) -> int:
    """Wagner and Fischer's table, row by row."""
    before = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        now = [i]
        for j, b in enumerate(other, start=1):
            now.append(min(before[j] + 1, now[j - 1] + 1, before[j - 1] + (a != b)))
        before = now
    return before[-1]


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("Coca  Cola", ["coca cola"], 1.0),  # neither case nor runs of blanks count
        ("coca cola company", ["coca cola"], 1 - 8 / 17),
        ("cola", ["coca cola"], 0.0),  # 1 - 5/9 is below one half
        ("ab", ["abcd"], 0.5),  # exactly one half counts, as in the challenge's script
        ("ab", ["zzzz", "abc"], 2 / 3),  # the nearest of several
        ("", ["yes"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_worked_scores(answer, right, score):
    assert similarity(answer, right) == pytest.approx(score)


def test_against_an_edit_distance_written_out():
    draw = random.Random(0)
    for _ in range(300):
        answer, right = ("".join(draw.choices("abc ", k=draw.randint(1, 9))).strip() or "a" for _ in range(2))
        plain = [" ".join(text.split()) for text in (answer, right)]
        wanted = 1 - edits(*plain) / max(len(answer), len(right))
        assert similarity(answer, [right]) == pytest.approx(wanted if wanted >= 0.5 else 0.0)


def test_means_and_records(monkeypatch):
    rows = [row(0, "x", answers=["abcd", "ab"]), row(1, "x", answers=["yes"])]
    found = outcome(monkeypatch, AnlsSpec(data="test"), rows, ["AB", "nothing"])
    assert found.metrics == {"anls": 0.5} and [each["right"] for each in found.predictions] == [True, False]
    with pytest.raises(DataError, match="row 0: `answers` is missing"):
        outcome(monkeypatch, AnlsSpec(data="test"), [row(0, "x")], ["a"])
