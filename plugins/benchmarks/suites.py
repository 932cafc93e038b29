"""Suites of lmms-eval's tasks, the score of each that is reported, and what is made of all of them.

`llavolta13`: the image benchmarks of the paper (section 4.1 and Table 2), by the names that lmms-eval 0.7.2 has for
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """The figure of a task that goes into tables.

    Attributes:
        metric: Its name in lmms-eval; `accuracy` where a server gives it (`llavolta record`), in per cent.
        most: Its largest value.
        judged: Whether a language model scores the answers.
        left_out: Metrics of the task that are not taken.
    """

    metric: str
    most: float = 1.0
    judged: bool = False
    left_out: tuple[str, ...] = ()


# lmms-eval asks a language model for the option that an answer means, and draws one at random where none replies.
_BY_SERVER = ("gpt_eval_score",)
SCORES = {
    "gqa": Score("exact_match"),
    "mmvet": Score("gpt_eval_score", 100.0, judged=True),
    "scienceqa": Score("exact_match"),
    "mme": Score("mme_perception_score", 2000.0),
    "textvqa_val": Score("exact_match"),
    "pope": Score("pope_f1_score"),
    "mmbench_en_dev": Score("accuracy", 100.0, left_out=_BY_SERVER),
    "mmbench_cn_dev": Score("accuracy", 100.0, left_out=_BY_SERVER),
    "vqav2_test": Score("accuracy", 100.0),
    "llava_in_the_wild": Score("gpt_eval_llava_all", 100.0, judged=True),
    "vizwiz_vqa_test": Score("accuracy", 100.0),
    "seedbench": Score("seed_image"),
    "mmmu_val": Score("mmmu_acc"),
}
SUITES = {"llavolta13": tuple(SCORES)}
AVERAGES = {"raw": "average", "retained": "retained"}
"""The metric that each way of averaging gives."""


def average(tasks: Sequence[str], scores: Mapping[str, float]) -> float | None:
    """Return the mean of all tasks' scores in per cent of their largest value; None where one is missing.

    That is the average of the paper's tables, MME's perception divided by 2000.

    Args:
        tasks: Tasks of `SCORES`.
        scores: `TASK/METRIC` to value.
    """
    found = [_share(task, scores) for task in tasks]
    known = [share for share in found if share is not None]
    return 100 * math.fsum(known) / len(known) if known and len(known) == len(found) else None


def retained(tasks: Sequence[str], scores: Mapping[str, float], baseline: Mapping[str, float]) -> float | None:
    """Return the mean over all tasks of the score divided by the baseline's; None where one of them is missing or 0."""
    ours, theirs = ([_share(task, each) for task in tasks] for each in (scores, baseline))
    shares = [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b]
    return math.fsum(shares) / len(shares) if shares and len(shares) == len(tasks) else None


def _share(task: str, scores: Mapping[str, float]) -> float | None:
    value = scores.get(f"{task}/{SCORES[task].metric}")
    return None if value is None else value / SCORES[task].most
