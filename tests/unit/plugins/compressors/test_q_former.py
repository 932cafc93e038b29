"""q_former: amounts, elastic queries, positions; the contract kit proves the rest."""

from __future__ import annotations

import pytest
import torch
from orchestrator_plugins.compressors.q_former import QFormer, QFormerSpec, sinusoids
from pydantic import ValidationError

from orchestrator.compression import Context
from orchestrator.spec.components import Grid


def run(spec, module, visual_BND, grid):
    images, tokens = visual_BND.shape[:2]
    positions_ABN = (torch.arange(tokens) + 5).expand(1, images, -1)
    ones_BN = torch.ones(images, tokens, dtype=torch.long)
    context = Context(0, positions_ABN, ones_BN, torch.arange(images), module=module)
    return QFormer(spec).compress(visual_BND, grid, context)


def test_elastic_queries_are_the_first_ones_of_one_module():
    specs = [QFormerSpec(layer=0, keep_tokens=n, max_queries=5, self_attention=False) for n in (2, 5)]
    module = QFormer(specs[0]).create_module(16)
    visual_BND = torch.randn(2, 6, 16)
    few, many = (run(spec, module, visual_BND, Grid(2, 3)) for spec in specs)
    assert torch.allclose(many.hidden_BMD[:, :2], few.hidden_BMD, atol=1e-6)
    assert few.positions_ABM[0, 0].tolist() == [5, 8]
    assert many.sizes_BM.sum(1).tolist() == [6, 6]


def test_tokens_carry_their_row_and_column():
    """Two tokens that change places give another result; without positions they would not."""
    spec = QFormerSpec(layer=0, keep_tokens=2, heads=2)
    module = QFormer(spec).create_module(16)
    visual_BND = torch.randn(1, 6, 16)
    before = run(spec, module, visual_BND, Grid(2, 3)).hidden_BMD
    swapped = run(spec, module, visual_BND[:, [4, 1, 2, 3, 0, 5]], Grid(2, 3)).hidden_BMD
    assert float((before - swapped).detach().abs().max()) > 1e-5
    table = sinusoids(Grid(3, 4), 16)
    assert len(torch.unique(table, dim=0)) == 12
    assert sinusoids(Grid(3, 4), 10).shape == (12, 10)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stride": 2}, "max_queries"),
        ({"keep_tokens": 9, "max_queries": 8}, "more than max_queries"),
        ({"keep_tokens": 2, "hidden_size": 20}, "multiple of heads"),
    ],
)
def test_what_is_no_shape_is_refused(options, told):
    with pytest.raises(ValidationError, match=told):
        QFormerSpec(layer=0, **options)


def test_amounts_that_do_not_fit_an_image():
    with pytest.raises(ValueError, match="keep_tokens 7"):
        QFormerSpec(layer=0, keep_tokens=7).kept_tokens(Grid(2, 3))
    with pytest.raises(ValueError, match="max_queries 2"):
        QFormerSpec(layer=0, stride=2, max_queries=2).kept_tokens(Grid(2, 3))
    assert QFormerSpec(layer=0, keep_tokens=2, max_queries=4).nearest_amount(9, Grid(2, 3)) == 4
