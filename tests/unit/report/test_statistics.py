"""Intervals, paired tests by image and seed, and Holm's correction, against values made elsewhere."""

import numpy as np
import pytest

from orchestrator.errors import UsageError
from orchestrator.report.statistics import compare, holm, mean_interval


def test_a_t_interval_against_a_table():
    found = mean_interval([0.80, 0.85, 0.90])
    # Student's t of 2 degrees at 97.5 %: 4.302653; standard deviation 0.05.
    assert found.mean == pytest.approx(0.85) and found.high - 0.85 == pytest.approx(4.302653 * 0.05 / 3**0.5, rel=1e-6)
    assert found.low == pytest.approx(2 * 0.85 - found.high) and found.count == 3
    alone = mean_interval([0.5])
    assert (alone.mean, alone.low, alone.high) == (0.5, None, None)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def records(scores_Q, images_Q):
    return [
        {"row": i, "score": score, "images": [f"{image}.png"]}
        for i, (score, image) in enumerate(zip(scores_Q, images_Q, strict=True))
    ]


def cells(differences_SQ, images_Q):
    zeros = [0.0] * len(images_Q)
    return [records(d_Q, images_Q) for d_Q in differences_SQ], [records(zeros, images_Q) for _ in differences_SQ]


def drawn(seeds, images, each, of_image, of_seed, mean=0.0, seed=0):
    draw = np.random.default_rng(seed)
    shared_I, shared_S = of_image * draw.standard_normal(images), of_seed * draw.standard_normal(seeds)
    noise = draw.standard_normal((seeds, images * each))
    return mean + noise + np.repeat(shared_I, each) + shared_S[:, None], np.repeat(np.arange(images), each)


# statsmodels 0.15: OLS on a constant, `cov_cluster` by image, by seed and by both, each times G / (G - 1); the
# largest of by image, by seed, and their sum less that of both.
OF_STATSMODELS = {
    (1, 30, 4, 1.0, 0.0, 0.3, 1): (0.1380677363506251, 0.16651886692142764),
    (3, 40, 5, 0.7, 0.2, 0.2, 2): (0.22665012980408197, 0.03272914439926692**0.5),
    (4, 25, 2, 0.0, 0.5, 0.5, 3): (0.7615240893949401, 0.07681699370554793**0.5),
    (3, 30, 3, 0.8, 0.0, 0.0, 0): (-0.10949953507054938, 0.021329472848222324**0.5),
}


@pytest.mark.parametrize("case", OF_STATSMODELS)
def test_the_standard_error_is_that_of_statsmodels(case):
    found = compare(*cells(*drawn(*case)))
    assert (found.difference, found.standard_error) == pytest.approx(OF_STATSMODELS[case])
    assert (found.seeds, found.images, found.questions) == (case[0], case[1], case[1] * case[2])
    assert found.low < found.difference < found.high and (found.p_value < 0.05) == (found.low > 0 or found.high < 0)


def test_one_seed_against_a_bootstrap_of_images():
    differences_SQ, images_Q = drawn(1, 60, 4, 1.0, 0.0, 0.4, 5)
    found = compare(*cells(differences_SQ, images_Q))
    draw = np.random.default_rng(0)
    of_image_I = differences_SQ[0].reshape(60, 4).mean(1)
    means = of_image_I[draw.integers(0, 60, (4000, 60))].mean(1)
    assert found.standard_error == pytest.approx(means.std(), rel=0.05)
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


@pytest.mark.parametrize(("seeds", "of_seed"), [(1, 0.0), (3, 0.0), (3, 0.1), (5, 0.1)])
def test_where_nothing_differs_it_says_so_and_the_unclustered_test_does_not(seeds, of_seed):
    wrong, unclustered, times = 0, 0, 300
    for number in range(times):
        differences_SQ, images_Q = drawn(seeds, 40, 5, 0.7, of_seed, 0.0, number)
        wrong += compare(*cells(differences_SQ, images_Q)).p_value < 0.05
        flat = differences_SQ.ravel()
        unclustered += abs(flat.mean()) > 1.96 * flat.std(ddof=1) / len(flat) ** 0.5
    assert wrong / times < 0.1, "5 in 100, give or take"
    assert unclustered / times > 0.15, "a test that takes questions of one image for independent ones is wrong"


def test_what_is_the_same_everywhere():
    same = compare(*cells(np.zeros((2, 6)), [0, 0, 1, 1, 2, 2]))
    assert (same.difference, same.p_value, same.standard_error) == (0, 1, 0)
    all_better = compare(*cells(np.ones((1, 6)), [0, 0, 1, 1, 2, 2]))
    assert all_better.p_value == pytest.approx(2 * 0.5**3), "signs drawn by image could do it: it is not 0"


def test_records_of_evaluations_are_read_and_others_refused():
    right = [{"row": 3, "right": True, "images": ["a"]}, {"row": 4, "right": False, "images": ["b"]}]
    wrong = [{**one, "right": False} for one in right]
    assert compare([right], [wrong]).difference == 0.5
    text_only = [{**one, "images": []} for one in right]
    assert compare([text_only], [text_only]).images == 2, "without images each row is a cluster"
    with pytest.raises(UsageError, match="on different rows"):
        compare([right], [[{**one, "row": one["row"] + 1} for one in wrong]])
    with pytest.raises(UsageError, match="1 and 2 seeds"):
        compare([right], [wrong, wrong])
    with pytest.raises(UsageError, match="row 3: its record has neither"):
        compare([right], [[{"row": 3}, {"row": 4}]])
    with pytest.raises(UsageError, match="all questions are about one image"):
        compare([[{**one, "images": ["a"]} for one in right]], [wrong])
