"""Ties go to the first, whatever the kernels, threads, batch, padding, dtype and last bits: all methods that choose."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
import torch
from choices_of_all import METHODS, chosen
from hypothesis import given, settings
from hypothesis import strategies as st
from method_checks import first_largest, ranked_of, top_of

from orchestrator import registry
from orchestrator.compression.ops import TOLERANCE, argmax, argmin, is_top, ranked, top_tokens


@pytest.fixture(scope="module")
def wanted():
    return chosen()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads(wanted, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert chosen() == wanted
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(wanted, dtype):
    assert chosen(dtype) == wanted


@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (3,), (3, 1), (2, 2, 0, 1, 3, 0, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (0, 5)])
def test_batches_and_padding(wanted, rows, padding):
    found = chosen(rows=rows, left=padding[0], right=padding[1])
    for kind in METHODS:
        if kind == "random_drop" and len(set(rows)) < len(rows):
            continue  # a sample's second image is drawn anew
        assert found[kind] == [wanted[kind][row] for row in rows], kind


@settings(max_examples=15, deadline=None)
@given(noise=st.floats(1e-8, 1e-6))
def test_last_bits(wanted, noise):
    assert chosen(noise=noise) == wanted


def test_every_method_that_chooses_is_here():
    """A built-in that keeps tokens by their values is among those above; others look at places alone."""
    by_place = {"average_pool", "average_pool_2d", "downsample", "fourier", "frame_pool", "stride"}
    by_place |= {"early_exit", "late_injection"}
    learned = {"c_abstractor", "divt", "isolator", "laco", "q_former", "registers", "token_grouping"}
    ours = {e.name for e in entry_points(group=registry.COMPRESSORS) if e.value.startswith("orchestrator_plugins.")}
    assert ours == set(METHODS) | by_place | learned


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_rule_is_the_plain_loops(data):
    """Few distinct scores, each moved by less than a tenth of the tolerance: as the loop, and as without the noise."""
    scores = data.draw(st.lists(st.sampled_from([-2.0, -1.0, 0.5, 1.0, 1.0001, 3.0]), min_size=1, max_size=12))
    shakes = data.draw(st.lists(st.floats(-0.1, 0.1), min_size=len(scores), max_size=len(scores)))
    count = data.draw(st.integers(0, len(scores)))
    exact = torch.tensor([scores], dtype=torch.float64)
    moved = exact * (1 + TOLERANCE * torch.tensor([shakes], dtype=torch.float64))
    for scores_BN in (exact, moved):
        assert argmax(scores_BN).tolist() == [first_largest(scores)]
        assert argmin(scores_BN).tolist() == [first_largest([-score for score in scores])]
        assert ranked(scores_BN, count).tolist() == [ranked_of(scores, count)]
        assert top_tokens(scores_BN, count).tolist() == [top_of(scores, count)]
        assert int(is_top(scores_BN, torch.tensor([[count]])).sum()) == count


def test_near_scores_do_not_chain():
    """Scores that fall evenly by less than the tolerance: the best few are found to within twice the tolerance."""
    scores_BN = (1 - TOLERANCE / 2 * torch.arange(100, dtype=torch.float64)).flip(0).unsqueeze(0)
    assert argmax(scores_BN).tolist() == [97]
    assert min(top_tokens(scores_BN, 10)[0].tolist()) >= 90 - 2


def test_masked_scores():
    masked_BN = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0], [-torch.inf] * 4])
    assert argmax(masked_BN).tolist() == [1, 0]
    assert top_tokens(masked_BN, 3).tolist() == [[0, 1, 3], [0, 1, 2]]
