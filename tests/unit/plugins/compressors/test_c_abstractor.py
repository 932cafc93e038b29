"""c_abstractor: shapes, what it starts from, ids and sizes; the contract kit proves the rest."""

from __future__ import annotations

import torch
from orchestrator_plugins.compressors.average_pool_2d import AveragePool2d, AveragePool2dSpec
from orchestrator_plugins.compressors.c_abstractor import CAbstractor, CAbstractorSpec

from orchestrator.compression import Context
from orchestrator.spec.components import Grid


def context_of(images, tokens, module):
    positions_ABN = (torch.arange(tokens) + 5).expand(1, images, -1)
    ones_BN = torch.ones(images, tokens, dtype=torch.long)
    return Context(0, positions_ABN, ones_BN, torch.arange(images), module=module)


def test_it_starts_from_average_pooling_and_learns():
    method = CAbstractor(CAbstractorSpec(layer="projector", keep_tokens=4, depth=2))
    module = method.create_module(24)
    visual_BND = torch.randn(3, 16, 24)
    kept = method.compress(visual_BND, Grid(4, 4), context_of(3, 16, module))
    pooled = AveragePool2d(AveragePool2dSpec(layer=0, keep_tokens=4))
    expected = pooled.compress(visual_BND, Grid(4, 4), context_of(3, 16, None))
    assert torch.allclose(kept.hidden_BMD, expected.hidden_BMD, atol=1e-6)
    for name in ("positions_ABM", "sizes_BM", "sources_BM", "grid"):
        one, other = getattr(kept, name), getattr(expected, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    kept.hidden_BMD.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for n, p in module.named_parameters() if n.endswith("up.weight"))


def test_neighbours_in_the_map_matter_and_other_images_do_not():
    method = CAbstractor(CAbstractorSpec(layer="projector", keep_tokens=9, depth=1, hidden_size=8))
    torch.manual_seed(0)
    module = method.create_module(8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    visual_BND = torch.randn(2, 9, 8)
    before = method.compress(visual_BND, Grid(3, 3), context_of(2, 9, module)).hidden_BMD
    visual_BND[0, 0] += torch.randn(8)  # a constant would not survive the norm
    changed = (method.compress(visual_BND, Grid(3, 3), context_of(2, 9, module)).hidden_BMD - before).abs().amax(2)
    assert bool((changed[0] > 1e-4).sum() > 1)
    assert float(changed[1].max()) < 1e-6
