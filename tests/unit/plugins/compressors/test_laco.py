"""laco: torch's pixel-unshuffle and an MLP beside the mean of the window; what it starts from, what it refuses."""

from __future__ import annotations

import pytest
import torch
from orchestrator_plugins.compressors.laco import LaCo, LaCoSpec
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.compression import Context
from orchestrator.spec.components import Grid


def context_of(images, tokens, module):
    positions_ABN = (torch.arange(tokens) + 5).expand(1, images, -1)
    ones_BN = torch.ones(images, tokens, dtype=torch.long)
    return Context(0, positions_ABN, ones_BN, torch.arange(images), module=module)


def made(stride=4, width=8, **more):
    method = LaCo(LaCoSpec(layer="tower:25%", stride=stride, **more))
    return method, method.create_module(width)


@pytest.mark.parametrize(("stride", "grid"), [(4, Grid(4, 6)), (9, Grid(3, 6))])
def test_channels_are_those_of_pixel_unshuffle(stride, grid):
    """A map of B x D x h x w: its channels at r x r lower resolution through the MLP, plus the mean of each window."""
    method, module = made(stride, hidden_size=5)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    visual_BND = torch.randn(2, grid.tokens, 8)
    kept = method.compress(visual_BND, grid, context_of(2, grid.tokens, module))
    window = round(stride**0.5)
    map_BDhw = visual_BND.mT.unflatten(2, (grid.height, grid.width))
    channels_BCHW = torch.nn.functional.pixel_unshuffle(map_BDhw, window)
    pooled_BDHW = torch.nn.functional.avg_pool2d(map_BDhw, window)
    expected = pooled_BDHW.flatten(2).mT + module(channels_BCHW.flatten(2).mT)
    assert torch.allclose(kept.hidden_BMD, expected, atol=1e-5)
    # The shortcut is also the mean over the channels that one channel became.
    averaged_BDHW = channels_BCHW.unflatten(1, (8, stride)).mean(2)
    assert torch.allclose(averaged_BDHW, pooled_BDHW, atol=1e-6)
    assert kept.grid == Grid(grid.height // window, grid.width // window)
    assert kept.sizes_BM.unique().tolist() == [stride]


def test_it_starts_from_the_shortcut_and_learns():
    method, module = made()
    visual_BND = torch.randn(3, 16, 8)
    kept = method.compress(visual_BND, Grid(4, 4), context_of(3, 16, module))
    first = visual_BND[:, [0, 1, 4, 5]].mean(1)
    assert torch.allclose(kept.hidden_BMD[:, 0], first, atol=1e-6)
    assert kept.positions_ABM[0, 0].tolist() == [7, 9, 15, 17]  # 5 + (0 + 1 + 4 + 5) / 4, rounded down, ...
    kept.hidden_BMD.square().sum().backward()
    assert float(module[3].weight.grad.abs().max()) > 0


def test_operations_are_those_torch_counts():
    method, module = made(9, width=64, hidden_size=32)
    with FlopCounterMode(display=False) as counter:
        method.compress(torch.randn(1, 36, 64), Grid(6, 6), context_of(1, 36, module))
    assert method.spec.module_operations(Grid(6, 6), 64) == counter.get_total_flops()


def test_only_windows_that_fill_the_grid():
    method, _ = made()
    with pytest.raises(ValueError, match=r"windows of 2 x 2 \(stride 4\) do not fill 3 x 4 tokens"):
        method.spec.kept_tokens(Grid(3, 4))
    for amount in ({"stride": 2}, {"keep_tokens": 4}, {"keep_ratio": "1/4"}, {"layer_average_tokens": 100}):
        with pytest.raises(ValidationError, match="give stride, a square number"):
            LaCoSpec(layer="tower:25%", **amount)


def test_the_window_and_the_width_shape_the_module():
    spec = LaCoSpec(layer="tower:25%", stride=4)
    assert spec.module_name(32, 24) == LaCoSpec(layer="tower:6", stride=4).module_name(8, 24)
    assert spec.module_name(32, 24) != LaCoSpec(layer="tower:6", stride=9).module_name(32, 24)
    assert spec.module_name(32, 24) != LaCoSpec(layer="tower:6", stride=4, hidden_size=9).module_name(32, 24)
    assert LaCoSpec(layer="projector", stride=4).module_name(32).startswith("laco_projector_")
