"""registers: what enters, what stays, ids; the contract kit and test_learned.py prove the rest."""

from __future__ import annotations

import pytest
import torch
from orchestrator_plugins.compressors.registers import Registers, RegistersSpec
from pydantic import ValidationError

from orchestrator.compression import Context
from orchestrator.spec.components import Grid


def test_registers_stand_last_and_stay():
    spec = RegistersSpec(layer=2, keep_tokens=3)
    method = Registers(spec)
    module = method.create_module(8)
    visual_BND = torch.randn(2, 6, 8)
    ids_ABN = torch.stack([torch.arange(6) + 5, torch.arange(6) + 20]).unsqueeze(0)
    context = Context(0, ids_ABN, torch.ones(2, 6, dtype=torch.long), torch.arange(2), module=module)
    entered = method.enter(visual_BND, Grid(2, 3), context)
    assert entered.hidden_BMD.shape[1] == spec.tokens_before(Grid(2, 3)) == 9
    assert torch.equal(entered.hidden_BMD[:, :6], visual_BND)
    assert torch.equal(entered.hidden_BMD[1, 6:], module.registers)
    assert entered.positions_ABM[0, :, 6:].tolist() == [[11, 12, 13], [26, 27, 28]]
    assert entered.sources_BM[0].tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]
    later = Context(2, entered.positions_ABM, entered.sizes_BM, torch.arange(2))
    left = method.compress(entered.hidden_BMD, Grid(1, 9), later)
    assert torch.equal(left.hidden_BMD, entered.hidden_BMD[:, 6:])
    assert torch.equal(left.positions_ABM, entered.positions_ABM[:, :, 6:])


def test_several_axes_go_on_from_the_highest():
    method = Registers(RegistersSpec(layer=1, keep_tokens=2))
    axes = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 3, 0, 3]]).unsqueeze(1)
    ones = torch.ones(1, 4, dtype=torch.long)
    context = Context(0, axes, ones, torch.zeros(1, dtype=torch.long), module=method.create_module(8))
    entered = method.enter(torch.randn(1, 4, 8), Grid(2, 2), context)
    assert entered.positions_ABM[:, 0, 4:].tolist() == [[4, 5]] * 3


@pytest.mark.parametrize("options", [{"layer": 0, "keep_tokens": 2}, {"layer": "0%", "keep_tokens": 2}])
def test_layer_0_is_refused(options):
    with pytest.raises(ValidationError, match="layer 1"):
        RegistersSpec(**options)


def test_other_amounts_are_refused():
    with pytest.raises(ValidationError, match="keep_tokens"):
        RegistersSpec(layer=1, stride=2)
    with pytest.raises(ValueError, match="keep_tokens 7"):
        RegistersSpec(layer=1, keep_tokens=7).kept_tokens(Grid(2, 3))
