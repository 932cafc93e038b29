"""token_grouping: GroupViT's own assignment number by number, its noise, and where it starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from orchestrator_plugins.compressors.token_grouping import TokenGrouping, TokenGroupingSpec
from pydantic import ValidationError
from torch.distributions.gumbel import Gumbel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.groupvit.modeling_groupvit import GroupViTAssignAttention, GroupViTVisionConfig

from orchestrator.compression import Context
from orchestrator.spec.components import Grid

SPEC = TokenGroupingSpec(layer="projector", keep_tokens=3)
PAIRS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("proj", "leave"))


def made(training: bool = False):
    torch.manual_seed(0)
    module = TokenGrouping(SPEC).create_module(16).train(training)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    visual_BND = torch.randn(2, 12, 16)
    ones_BN = torch.ones(2, 12, dtype=torch.long)
    context = Context(0, (torch.arange(12) + 5).expand(1, 2, -1), ones_BN, torch.arange(2), module=module)
    return module, visual_BND, context


def theirs(module, training: bool = False) -> GroupViTAssignAttention:
    attention = GroupViTAssignAttention(GroupViTVisionConfig(hidden_size=16)).train(training)
    with torch.no_grad():
        for name, mine in PAIRS:
            for kind in ("weight", "bias"):
                getattr(getattr(attention, name), kind).copy_(getattr(getattr(module, mine), kind))
    return attention


@pytest.mark.parametrize("training", [False, True])
def test_it_is_groupvits_assignment(training: bool, monkeypatch: pytest.MonkeyPatch):
    module, visual_BND, context = made(training)
    context = replace(context, seed=1, step=2, sample_indices=(8, 9))
    attention = theirs(module, training)
    drawn = []
    work = module.forward
    monkeypatch.setattr(module, "forward", lambda visual, noise: (drawn.append(noise), work(visual, noise))[1])
    ours = TokenGrouping(SPEC).compress(visual_BND, Grid(3, 4), context).hidden_BMD
    assert (drawn[0] is None) is not training
    monkeypatch.setattr(Gumbel, "sample", lambda self, shape: drawn[0])
    groups_BMD = module.groups.expand(2, -1, -1)
    plain = groups_BMD + attention(groups_BMD, visual_BND)[0]
    assert torch.allclose(ours, plain, atol=1e-6)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    mine = [getattr(module, name).weight.grad.clone() for _, name in PAIRS]
    (attention(groups_BMD.detach(), visual_BND)[0] * weights).sum().backward()
    for gradient, (name, _) in zip(mine, PAIRS, strict=True):
        assert float(gradient.abs().max()) > 1e-4
        assert torch.allclose(gradient, getattr(attention, name).weight.grad, atol=1e-5), name


def test_the_noise_is_the_samples_own_and_gumbels():
    module, visual_BND, context = made(training=True)
    method, drawn = TokenGrouping(SPEC), []
    work = module.forward
    module.forward = lambda visual, noise: (drawn.append(noise), work(visual, noise))[1]
    first = replace(context, seed=1, step=2, sample_indices=(8, 9))
    method.compress(visual_BND, Grid(3, 4), first)
    method.compress(visual_BND.flip(0), Grid(3, 4), replace(first, sample_indices=(9, 8)))
    assert torch.equal(drawn[1], drawn[0].flip(0)) and not torch.equal(drawn[0][0], drawn[0][1])
    for other in (replace(first, step=3), replace(first, seed=2), replace(first, layer=1)):
        method.compress(visual_BND, Grid(3, 4), other)
        assert not torch.equal(drawn.pop(), drawn[0])
    for step in range(200):
        method.compress(visual_BND, Grid(3, 4), replace(first, step=step))
    values = torch.stack(drawn[2:]).flatten()
    # A Gumbel variable has mean 0.5772 and standard deviation 1.2825; 14,400 draws stray by 0.011.
    assert float(values.mean()) == pytest.approx(0.5772, abs=0.055)
    assert float(values.std()) == pytest.approx(1.2825, abs=0.055)
    quiet = TokenGrouping(SPEC.model_copy(update={"noise": False}))
    quiet.compress(visual_BND, Grid(3, 4), first)
    assert drawn[-1] is None


def test_it_starts_near_the_means_of_its_groups():
    torch.manual_seed(1)
    module = TokenGrouping(SPEC).create_module(16).eval()
    visual_BND = torch.randn(1, 12, 16)
    joined = (module.query(module.groups) @ module.key(visual_BND[0]).T).argmax(0)
    for number, left_D in enumerate(module(visual_BND, None)[0]):
        members = visual_BND[0][joined == number]
        assert torch.allclose(left_D, module.groups[number] + members.sum(0) / (len(members) + 1), atol=1e-5)


def test_shapes_and_operations():
    assert SPEC.module_name(4) == SPEC.model_copy(update={"noise": False}).module_name(4)
    assert SPEC.module_name(4) != SPEC.model_copy(update={"keep_tokens": 4}).module_name(4)
    with pytest.raises(ValidationError, match="give keep_tokens"):
        TokenGroupingSpec(layer=0, stride=2)
    with pytest.raises(ValueError, match="keep_tokens 3 is more"):
        SPEC.kept_tokens(Grid(1, 2))
    module, visual_BND, _ = made()
    with FlopCounterMode(display=False) as counter:
        module(visual_BND[:1], None)
    assert counter.get_total_flops() == SPEC.module_operations(Grid(3, 4), 16)
