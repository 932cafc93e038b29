"""What a difference of scores is worth: intervals over seeds, paired tests by image and seed, Holm's correction.

Pure functions over numbers and over the records that evaluations keep (`Outcome.predictions`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds the true one at a level.

    Attributes:
        mean: The mean.
        low: Lower end; None of a single value, which says nothing of its spread.
        high: Upper end, or None.
        count: Number of values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of independent values, one a seed, and its t-interval (Student 1908).

    Args:
        values: At least one.
        level: Share of such intervals that hold the true mean, if values are normal.
    """
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    reach = _quantile(level, count - 1) * spread / math.sqrt(count)
    return Interval(mean, mean - reach, mean + reach, count)


@dataclass(frozen=True)
class Comparison:
    """The mean difference of two cells' scores on the same questions, and whether it is more than chance.

    Attributes:
        difference: Mean over seeds and questions of the first cell's score less the second's.
        standard_error: Of the difference, questions of one image and answers of one seed taken together.
        low: Lower end of the interval at the level asked for.
        high: Upper end.
        p_value: Two-sided, of no difference.
        questions: Questions compared.
        images: Clusters of questions: those about the same images.
        seeds: Seeds; with one, nothing is said of another training.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float
    questions: int
    images: int
    seeds: int


def compare(
    first: Sequence[Sequence[Mapping[str, Any]]],
    second: Sequence[Sequence[Mapping[str, Any]]],
    level: float = 0.95,
) -> Comparison:
    """Return the paired comparison of two cells' records, a list a seed, in the same order of seeds.

    The standard error is clustered two ways, by image and by seed (Cameron, Gelbach and Miller 2011): the two clustered
    variances less that of each image and seed alone, each times its number of clusters over one less; with one seed by
    image. Where the sum is less than one of its two parts, as few seeds may make it, the larger part is taken. It is
    compared with Student's t, whose degrees of freedom weigh images and seeds by their share in the variance
    (Satterthwaite 1946): three seeds alone would have two, and call nearly nothing a difference.

    Args:
        first: Records of the first cell: `row`, `images`, and `score` or `right`.
        second: Records of the second cell, of the same rows.
        level: Of the interval.

    Raises:
        UsageError: seeds or rows differ, or there are too few images.
    """
    scores_ASQ, images_Q = _scores(first, second)
    mean, error, degrees, images = _clustered(scores_ASQ[0] - scores_ASQ[1], images_Q)
    reach = _quantile(level, degrees) * error
    p_value = _p_value(mean, error, degrees)
    return Comparison(mean, error, mean - reach, mean + reach, p_value, len(images_Q), images, scores_ASQ.shape[1])


def score_interval(records: Sequence[Mapping[str, Any]], level: float = 0.95) -> Interval | None:
    """Return the mean score of one model's answers and its interval over questions, those about one image together.

    It says how far another draw of images and questions might move the score; nothing of another training.

    Args:
        records: `row`, `images`, and `score` or `right` of each answer.
        level: Of the interval.

    Returns:
        None where the answers do not tell: all scores are equal, or all questions are about one image.
    """
    import numpy as np

    scores_Q = np.asarray([_score(one) for one in records], dtype=np.float64)
    images_Q = _images(records)
    if len(set(images_Q)) < 2 or (scores_Q == scores_Q[0]).all():
        return None
    mean, error, degrees, _ = _clustered(scores_Q[None], images_Q)
    reach = _quantile(level, degrees) * error
    return Interval(mean, mean - reach, mean + reach, len(scores_Q))


def scores_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return of records what `compare` needs, as `row`, `images` and `score`; None where one has no score."""
    if not all("row" in one and ("score" in one or "right" in one) for one in records):
        return None
    return [{"row": one["row"], "images": _seen(one) or one.get("images"), "score": _score(one)} for one in records]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in the same order (Holm 1979): the k-th smallest of m times
    m - k + 1, none less than the one before it, none above 1.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _scores(
    first: Sequence[Sequence[Mapping[str, Any]]], second: Sequence[Sequence[Mapping[str, Any]]]
) -> tuple[np.ndarray, list[str]]:
    """Return the scores of two cells (2, S seeds, Q questions), and for each question which images it is about."""
    import numpy as np

    if len(first) != len(second) or not first:
        raise UsageError(f"the cells have {len(first)} and {len(second)} seeds; compare the same seeds of both")
    rows = [record["row"] for record in first[0]]
    for cell in (first, second):
        for records in cell:
            if [record["row"] for record in records] != rows:
                raise UsageError("the cells were tested on different rows; compare them on the same data")
    scores = [[[_score(one) for one in records] for records in cell] for cell in (first, second)]
    return np.asarray(scores, dtype=np.float64), _images(first[0])


def _images(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which images and videos each answer is about; one about none is alone."""
    return ["\n".join(map(str, _seen(one) or (f"row {one['row']}",))) for one in records]


def _seen(record: Mapping[str, Any]) -> list[Any]:
    """Return the paths of the images and videos that an answer is about."""
    return [*(record.get("images") or ()), *(video["path"] for video in record.get("videos") or ())]


def _clustered(values_SQ: np.ndarray, images_Q: Sequence[str]) -> tuple[float, float, float, int]:
    """Return the mean of values, its standard error clustered by image and seed, degrees of freedom, and the images.

    Raises:
        UsageError: all questions are about one image.
    """
    import numpy as np

    seeds = len(values_SQ)
    _, of_Q = np.unique(np.asarray(images_Q, dtype=object), return_inverse=True)
    images = int(of_Q.max()) + 1
    if images < 2:
        raise UsageError("all questions are about one image: there is nothing to tell chance from difference")
    mean = float(values_SQ.mean())
    rest_SQ = values_SQ - mean
    by_image_SI = np.stack([np.bincount(of_Q, weights=row_Q, minlength=images) for row_Q in rest_SQ])
    variance = _variance(by_image_SI.sum(0))
    degrees = float(images - 1)
    if seeds > 1:
        by_image, by_seed = variance, _variance(by_image_SI.sum(1))
        variance = max(by_image, by_seed, by_image + by_seed - _variance(by_image_SI.ravel()))
        parts = by_image**2 / (images - 1) + by_seed**2 / (seeds - 1)
        degrees = variance**2 / parts if parts else degrees
    return mean, math.sqrt(variance) / rest_SQ.size, degrees, images


def _score(record: Mapping[str, Any]) -> float:
    value = record.get("score", record.get("right"))
    if value is None:
        raise UsageError(f"row {record['row']}: its record has neither `score` nor `right`")
    return float(value)


def _variance(sums: np.ndarray) -> float:
    """Return the variance of the sum over clusters, whose residuals sum to these, corrected for their number."""
    import numpy as np

    return float(len(sums) / (len(sums) - 1) * np.square(sums).sum())


def _p_value(mean: float, error: float, degrees: float) -> float:
    from scipy.special import stdtr

    if mean == 0:
        return 1.0
    if error == 0:  # the same difference everywhere: as sure as signs drawn by cluster can be
        return float(2.0**-degrees)
    return float(2 * stdtr(degrees, -abs(mean) / error))


def _quantile(level: float, degrees: float) -> float:
    """Return the bound that Student's t stays within, on both sides, with probability `level`."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + level) / 2))
