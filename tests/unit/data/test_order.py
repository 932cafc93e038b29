"""The order of the data: a pure function of (seed, step), every row once an epoch, batches of one modality."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.train_data import DataOrder, SetSize, permutation
from orchestrator.spec.phase import rows_per_epoch


def make(count: int, share_of_text: float = 0.4, per_epoch: int | None = None) -> DataOrder:
    draws = np.random.default_rng(count)
    return DataOrder(
        [SetSize(count, count if per_epoch is None else per_epoch)],
        draws.integers(1, 50, count),
        draws.random(count) >= share_of_text,
    )


counts, batches = st.integers(1, 200), st.integers(1, 40)


@settings(deadline=None, max_examples=60)
@given(counts, batches, st.booleans(), st.integers(0, 5))
def test_every_epoch_visits_every_row_once(count, batch, grouped, seed):
    order = make(count)
    stream = [row for step in range(-(-3 * count // batch)) for row in order.batch(seed, step, batch, False)]
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    # Batches may be sorted inside, so grouped ones are compared as far as whole epochs fill whole batches.
    if grouped:
        steps = np.lcm(count, batch) // batch
        epochs = steps * batch // count
        if epochs <= 20:
            seen = Counter(row for step in range(steps) for row in order.batch(seed, step, batch, True))
            assert seen == Counter(dict.fromkeys(range(count), epochs))


@settings(deadline=None, max_examples=60)
@given(counts, batches, st.booleans(), st.integers(0, 2**40), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_step_only(count, batch, grouped, seed, steps):
    one, other = make(count), make(count)
    forward = {step: one.batch(seed, step, batch, grouped) for step in sorted(steps)}
    for step in reversed(steps):  # another history, another object
        assert other.batch(seed, step, batch, grouped) == forward[step]
        assert len(forward[step]) == batch


@settings(deadline=None, max_examples=60)
@given(st.integers(40, 300), st.integers(2, 16), st.integers(0, 3))
def test_grouped_batches_are_of_one_modality_except_at_an_epochs_ends(count, batch, seed):
    order = make(count)
    mixed = 0
    steps = 3 * count // batch
    for step in range(steps):
        rows = order.batch(seed, step, batch, True)
        mixed += len({bool(order._has_image[row]) for row in rows}) == 2
        keys = [(bool(order._has_image[row]), -order._lengths[row]) for row in rows]
        assert keys == sorted(keys)
    assert mixed <= 2 * 3 + 1


def test_seeds_and_epochs_differ():
    order = make(500)
    assert order.batch(0, 0, 100, False) != order.batch(1, 0, 100, False)
    assert order.batch(0, 0, 500, False) != order.batch(0, 1, 500, False)


def test_the_first_numbers_are_fixed_for_all_time():
    """A change here moves every training run: raise SEMANTICS_VERSION with it."""
    assert permutation(10, 0, "order", 0).tolist() == [1, 4, 0, 7, 8, 6, 2, 5, 3, 9]
    assert sorted(permutation(1000, 3, "x")) == list(range(1000))


def test_shares_of_a_mixture_take_every_row_in_turn():
    order = DataOrder([SetSize(10, 10), SetSize(9, 3), SetSize(4, 8)], np.ones(23), np.ones(23, dtype=bool))
    assert order.epoch_length == 21
    epochs = [order.batch(7, epoch, 21, False) for epoch in range(3)]
    for rows in epochs:
        assert sorted(row for row in rows if row < 10) == list(range(10))
        assert sum(10 <= row < 19 for row in rows) == 3
        assert Counter(row for row in rows if row >= 19) == Counter(dict.fromkeys(range(19, 23), 2))
    third = [row for rows in epochs for row in rows if 10 <= row < 19]
    assert sorted(third) == list(range(10, 19)), "three epochs of a third see every row once"


def test_an_epoch_takes_whole_rows_of_each_set_and_one_at_least():
    assert [rows_per_epoch([each]) for each in ((10, 0.3), (10, 1.0), (3, 0.01))] == [3, 10, 1]


@pytest.mark.timeout(60)
def test_a_big_set_is_ordered():
    order = DataOrder([SetSize(665_298, 665_298)], np.ones(665_298), np.arange(665_298) % 5 > 0)
    assert len(order.batch(0, 5000, 128, True)) == 128
