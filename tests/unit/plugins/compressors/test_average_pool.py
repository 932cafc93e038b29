"""average_pool: windows, positions and sizes, against loops; and that its spec needs no torch."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orchestrator_plugins.compressors.average_pool import AveragePool, AveragePoolSpec

from orchestrator.compression import Context
from orchestrator.spec.components import Grid


def run(tokens, images=2, dtype=torch.float32, **options):
    spec = AveragePoolSpec(layer=0, **options)
    generator = torch.Generator().manual_seed(tokens)
    visual_BND = torch.randn(images, tokens, 3, generator=generator).to(dtype)
    positions_ABN = torch.randint(0, 900, (1, images, tokens), generator=generator)
    sizes_BN = torch.randint(1, 4, (images, tokens), generator=generator)
    context = Context(layer=0, positions_ABN=positions_ABN, sizes_BN=sizes_BN, rows_B=torch.arange(images))
    return visual_BND, context, AveragePool(spec).compress(visual_BND, Grid(1, tokens), context)


def check(tokens, windows, options):
    visual_BND, context, kept = run(tokens, **options)
    assert kept.hidden_BMD.shape[1] == len(windows) == AveragePoolSpec(layer=0, **options).kept_tokens(Grid(1, tokens))
    for b in range(2):
        for m, window in enumerate(windows):
            assert torch.allclose(kept.hidden_BMD[b, m], visual_BND[b, window].mean(0), atol=1e-6)
            assert kept.positions_ABM[0, b, m] == sum(context.positions_ABN[0, b, window].tolist()) // len(window)
            assert kept.sizes_BM[b, m] == context.sizes_BN[b, window].sum()
            assert kept.sources_BM[b, m] == window[0]


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 60), stride=st.integers(1, 70))
def test_windows_of_a_stride(tokens, stride):
    windows = [list(range(start, min(start + stride, tokens))) for start in range(0, tokens, stride)]
    check(tokens, windows, {"stride": stride})


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 60))
def test_a_number_of_windows(data, tokens):
    count = data.draw(st.integers(1, tokens))
    cuts = [window * tokens // count for window in range(count + 1)]
    windows = [list(range(cuts[w], cuts[w + 1])) for w in range(count)]
    lengths = [len(window) for window in windows]
    assert max(lengths) - min(lengths) <= 1
    check(tokens, windows, {"keep_tokens": count})


def test_the_paper_stride_on_llava():
    _, _, kept = run(576, stride=8)
    assert kept.hidden_BMD.shape[1] == 72


def test_positions_are_floored_not_rounded_through_half():
    """35..42 has the mean 38.5; the reference code's float16 fails from 1024 on."""
    spec = AveragePoolSpec(layer=0, stride=8)
    for start in (35, 1035, 2051):
        positions = (torch.arange(8) + start).view(1, 1, 8)
        ones = torch.ones(1, 8, dtype=torch.long)
        context = Context(layer=0, positions_ABN=positions, sizes_BN=ones, rows_B=torch.zeros(1, dtype=torch.long))
        kept = AveragePool(spec).compress(torch.zeros(1, 8, 2), Grid(1, 8), context)
        assert kept.positions_ABM.item() == start + 3


def test_first_and_renumber():
    _, context, kept = run(9, stride=4, positions="first")
    assert torch.equal(kept.positions_ABM, context.positions_ABN[:, :, [0, 4, 8]])
    assert run(9, stride=4, positions="renumber")[2].renumber
    assert not kept.renumber


def test_bfloat16_is_summed_in_float32():
    for stride in (32, 33):
        visual_BND, _, kept = run(96, dtype=torch.bfloat16, stride=stride)
        expected = visual_BND.float()[:, :stride].mean(1)
        assert torch.allclose(kept.hidden_BMD[:, 0].float(), expected, atol=2e-3)
        assert kept.hidden_BMD.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"stride": 4}, {"stride": 3}, {"keep_tokens": 5}, {"keep_tokens": 9}])
def test_size_bias_weighs_by_size_and_is_passed_on(options):
    visual_BND, context, plain = run(9, **options)
    _, _, kept = run(9, size_bias=True, **options)
    assert kept.size_bias and not plain.size_bias
    starts = [*plain.sources_BM[0].tolist(), 9]
    for m, (start, end) in enumerate(itertools.pairwise(starts)):
        weights_BN1 = context.sizes_BN[:, start:end, None]
        expected_BD = (visual_BND[:, start:end] * weights_BN1).sum(1) / weights_BN1.sum(1)
        assert torch.allclose(kept.hidden_BMD[:, m], expected_BD, atol=1e-6)
    assert torch.equal(kept.positions_ABM, plain.positions_ABM) and torch.equal(kept.sizes_BM, plain.sizes_BM)


def test_tokens_that_stand_for_one_each_are_averaged_plainly():
    visual_BND, context, plain = run(10, stride=4)
    context = dataclasses.replace(context, sizes_BN=torch.ones_like(context.sizes_BN))
    kept = AveragePool(AveragePoolSpec(layer=0, stride=4, size_bias=True)).compress(visual_BND, Grid(2, 5), context)
    assert torch.allclose(kept.hidden_BMD, plain.hidden_BMD, atol=1e-6)


def test_too_many_tokens():
    with pytest.raises(ValueError, match="keep_tokens 10"):
        run(9, keep_tokens=10)
