"""stride: which tokens stay, and their ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orchestrator_plugins.compressors.stride import Stride, StrideSpec

from orchestrator.compression import Context
from orchestrator.spec.components import Grid


def run(tokens: int, **options):
    spec = StrideSpec(layer=0, **options)
    visual_BND = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(tokens))
    positions_ABN = 5 + torch.arange(tokens).expand(1, 2, tokens)
    context = Context(
        layer=0, positions_ABN=positions_ABN, sizes_BN=torch.ones(2, tokens, dtype=torch.long), rows_B=torch.arange(2)
    )
    kept = Stride(spec).compress(visual_BND, Grid(1, tokens), context)
    assert kept.hidden_BMD.shape[1] == spec.kept_tokens(Grid(1, tokens))
    return visual_BND, kept


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 60), stride=st.integers(1, 70))
def test_every_nth_token(tokens, stride):
    visual_BND, kept = run(tokens, stride=stride)
    assert torch.equal(kept.hidden_BMD, visual_BND[:, ::stride])
    assert kept.positions_ABM[0, 1].tolist() == list(range(5, 5 + tokens, stride))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 60))
def test_a_number_evenly_spaced(data, tokens):
    count = data.draw(st.integers(1, tokens))
    _, kept = run(tokens, keep_tokens=count)
    places = [place - 5 for place in kept.positions_ABM[0, 0].tolist()]
    gaps = [b - a for a, b in zip(places, [*places[1:], tokens], strict=True)]
    assert places[0] == 0 and max(gaps) - min(gaps) <= 1


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="keep_tokens 9"):
        run(8, keep_tokens=9)
