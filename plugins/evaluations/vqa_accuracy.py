"""`vqa_accuracy`: VQA's soft accuracy against ten human answers, normalised as EvalAI does (VQAv2, TextVQA, VizWiz)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from orchestrator import plugin

ANSWERS = 10
"""Human answers of a question in VQA, TextVQA and VizWiz, over which the score is defined."""


class VqaAccuracySpec(plugin.GenerationSpec):
    """Greedy answers against ten human ones: an answer that k people gave scores min(k / 3, 1).

    It is the mean over the ten ways to leave one person out (Antol et al., arXiv:1505.00468, and the organisers'
    `vqaEval.py`): 0.3, 0.6, 0.9 and 1 for one, two, three and more people. Both sides are normalised as LLaVA's TextVQA
    evaluator does, by EvalAI's rules. VQAv2's own script leaves both as they are where all ten agree, which only
    matters to answers in other letters or with articles.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.vqa_accuracy:VqaAccuracy"
    metric_names: ClassVar[tuple[str, ...] | None] = ("accuracy", "accuracy_*")
    columns: ClassVar[tuple[str, ...]] = ("answers",)

    kind: Literal["vqa_accuracy"] = "vqa_accuracy"
    max_new_tokens: plugin.Count = 128
    """Longest answer in tokens; LLaVA-1.5's is 128."""


class VqaAccuracy:
    """Scores answers by how many of ten people gave them."""

    def __init__(self, spec: VqaAccuracySpec) -> None:
        self._spec = spec

    @staticmethod
    def example_rows(rows: Sequence[plugin.Row]) -> list[plugin.Row]:
        """Return rows with ten human answers each."""
        return [replace(row, columns={"answers": [plugin.last_answer(row), "no"] * 5}) for row in rows]

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return the metrics `accuracy` and, where rows have types, `accuracy_<type>`, all between 0 and 1.

        Raises:
            DataError: a row does not have ten answers, or cannot be read.
        """
        spec, rows = self._spec, list(data.rows)
        people = [_ten_answers(row) for row in rows]
        answers = workers.divide(
            rows, lambda mine: plugin.greedy_answers(model, mine, data, spec.batch_size, spec.max_new_tokens)
        )
        scores = [soft_accuracy(answer, ten) for answer, ten in zip(answers, people, strict=True)]
        predictions = [
            {**plugin.prediction(row, answer, _most_given(ten), score >= 0.5), "score": score}
            for row, answer, ten, score in zip(rows, answers, people, scores, strict=True)
        ]
        return plugin.outcome_of(plugin.mean_scores("accuracy", scores, rows), predictions)


def _ten_answers(row: plugin.Row) -> list[str]:
    found = plugin.text_column(row, "answers")
    if len(found) != ANSWERS:
        raise plugin.DataError(
            f"row {row.index}: `answers` has {len(found)}; VQA's accuracy is defined over the answers of {ANSWERS} "
            "people. For a single right answer take exact_match"
        )
    return found


def _most_given(people: Sequence[str]) -> str:
    return max(people, key=list(people).count)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the score of an answer: the mean over people of min(others who gave it / 3, 1).

    Args:
        answer: The model's answer.
        people: The people's answers.
    """
    wanted, given = normalised(answer), list(map(normalised, people))
    same = given.count(wanted)
    return sum(min((same - (one == wanted)) / 3, 1.0) for one in given) / len(given)


def normalised(text: str) -> str:
    """Return an answer as EvalAI compares it: lower case, without punctuation and articles, numbers as digits.

    The steps and their order are those of the evaluation server, as Pythia and LLaVA have them, oddities included: a
    mark of punctuation that touches a blank somewhere in the text goes, another becomes a blank; at most 32 full stops
    go, and none before a digit.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if apart else " ")
    words = (NUMBERS.get(word, word) for word in _STOPS.sub("", cleaned, count=32).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


_STOPS = re.compile(r"\.(?!\d)")
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
# As the server has them, with `somebody'd` the wrong way round, and capitals that a word in lower case never has.
_SPELLINGS = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've couldnt've=couldn't've
didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't
hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm
Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't
mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't
notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't
shed've=she'd've she'dve=she'd've she's=she's shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've
shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've
somebodyll=somebody'll somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
something'dve=something'd've somethingll=something'll thats=that's thered=there'd thered've=there'd've
there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've
theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've
werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's
whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll
whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've
yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd
youd've=you'd've you'dve=you'd've youll=you'll youre=you're youve=you've
"""
CONTRACTIONS = dict(one.split("=") for one in _SPELLINGS.split())
