"""isolator: DualSpeed's pruned pass, token by token; the contract kit proves the rest."""

from __future__ import annotations

import pytest
import torch
from orchestrator_plugins.compressors.divprune import farthest
from orchestrator_plugins.compressors.isolator import Isolator, IsolatorSpec
from pydantic import ValidationError

from orchestrator.compression import Context, attach
from orchestrator.compression.testing import check_compressor
from orchestrator.compression.testing.families import TINY, tiny_llava
from orchestrator.errors import UsageError
from orchestrator.spec.budgets import tokens_by_layer
from orchestrator.spec.checks.compression import check_variant
from orchestrator.spec.components import Grid
from orchestrator.spec.controls import control_points

PRUNED = {"kind": "divprune", "layer": "projector", "keep_tokens": 4}
FAST = [PRUNED, {"kind": "isolator", "positions": "renumber"}]


def test_tokens_stand_first_and_ids_follow():
    method = Isolator(IsolatorSpec(tokens=2))
    module = method.create_module(8)
    visual_BND, ids_ABN = torch.randn(2, 3, 8), torch.tensor([[[5, 7, 9], [20, 21, 22]]])
    context = Context(0, ids_ABN, torch.full((2, 3), 4), torch.arange(2), module=module)
    entered = method.enter(visual_BND, Grid(1, 3), context)
    assert torch.equal(entered.hidden_BMD[:, 2:], visual_BND)
    assert all(torch.equal(one, module.tokens) for one in entered.hidden_BMD[:, :2])
    assert entered.positions_ABM.tolist() == [[[3, 4, 5, 7, 9], [18, 19, 20, 21, 22]]]
    assert entered.sizes_BM.tolist() == [[1, 1, 4, 4, 4]] * 2
    assert (entered.before, entered.renumber, entered.sources_BM[0].tolist()) == (2, False, [-1, -1, 0, 1, 2])


@pytest.mark.parametrize("positions", ["renumber", "shift"])
def test_a_pruned_pass_is_the_releases(positions):
    """text, 4 learned tokens, DivPrune's tokens of the image, text: as LLaVA's code puts the row together."""
    batch = TINY["llava"].batch([[3, "image", 7]], "right", 0, 3)
    wanted = tiny_llava("sdpa")
    attachment = attach(model := tiny_llava("sdpa"), [PRUNED, {"kind": "isolator", "positions": positions}], seed=2)
    loss = model(**batch).loss
    assert attachment.visual_tokens_per_layer == (8,) * 4
    ((_, module),) = attachment.learned_modules.items()
    embeds = wanted.get_input_embeddings()(batch["input_ids"])
    tower = wanted.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
    features = tower.hidden_states[wanted.config.vision_feature_layer][:, 1:]
    index = farthest(features.detach(), 4)[0]
    visual = wanted.model.multi_modal_projector(features[:, index])
    row = torch.cat([embeds[:, :3], module.tokens[None], visual, embeds[:, 12:]], 1)
    ids = torch.arange(row.shape[1])
    if positions == "shift":
        ids = torch.cat([torch.arange(3), 3 + index[0] + torch.arange(4), 7 + index, torch.arange(16, 23)])
    logits = wanted.lm_head(
        wanted.model.language_model(
            inputs_embeds=row, position_ids=ids[None], attention_mask=torch.ones(1, row.shape[1])
        ).last_hidden_state
    )
    plain = torch.nn.functional.cross_entropy(logits[0, -4:-1], batch["labels"][0, -3:])
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-5)
    full = tiny_llava("sdpa")(**batch).loss
    assert abs(float((full - loss).detach())) > 1e-4
    attachment.switch([])
    assert float(model(**batch).loss.detach()) == pytest.approx(float(full.detach()), abs=1e-6), (
        "full steps never see the tokens"
    )


@pytest.mark.parametrize("positions", ["renumber", "shift"])
def test_with_divprune_it_holds_the_contract(positions):
    points = [
        {"kind": "divprune", "layer": "projector", "keep_tokens": 2},
        {"kind": "isolator", "layer": 0, "tokens": 3},
    ]
    points[1]["positions"] = positions
    assert len(check_compressor(points, ["llava", "llava_next", "qwen2_vl"]).proven) == 3


def test_the_planner_counts_them_in_every_layer():
    specs = [type(point.spec).model_validate(point.spec.model_dump()) for point in attach(tiny_llava(), FAST).points]
    assert tokens_by_layer(specs, 4, Grid(3, 3)) == [8] * 4
    assert tokens_by_layer(specs[1:], 4, Grid(3, 3)) == [13] * 4
    control = control_points("random_drop", tuple(specs), None)
    assert [point.kind for point in control] == ["random_drop", "isolator"] and control[0].keep_tokens == 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValidationError, match="takes no amount; drop keep_tokens"):
        IsolatorSpec(keep_tokens=4)
    with pytest.raises(ValidationError, match="Input should be 0"):
        IsolatorSpec(layer=1)
    after = {"kind": "average_pool", "layer": 2, "stride": 2}
    with pytest.raises(UsageError, match="average_pool after it would mix or drop; let it be the last point"):
        attach(tiny_llava(), [*FAST, after])
    specs = [point.spec for point in attach(tiny_llava(), [*FAST[:1], after]).points]
    (finding,) = check_variant([specs[0], IsolatorSpec(), specs[1]], ("compressors", "v"), None)
    assert finding.path == ("compressors", "v", 2, "kind") and "adds for good" in finding.message
    assert not list(check_variant([specs[0], IsolatorSpec()], ("compressors", "v"), None))
    assert IsolatorSpec().module_name(4) == IsolatorSpec(positions="renumber").module_name(4)
    assert IsolatorSpec().module_name(4) != IsolatorSpec(tokens=5).module_name(4)
