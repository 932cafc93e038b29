"""`keys_only`: dropped tokens stay as keys and values, as they were, and nothing else is computed of them."""

from __future__ import annotations

import pytest
import torch
from reference import decoder_facts, make_batch, tiny_llava
from torch.utils.flop_counter import FlopCounterMode

from orchestrator import registry
from orchestrator.compression import attach
from orchestrator.compression.testing import check_compressor
from orchestrator.errors import UsageError
from orchestrator.plan import cost
from orchestrator.plan.cells.identity_fields import points_identity, reached, resolve_points
from orchestrator.plan.cost import Sample

FEW = ["gemma3", "llava", "paligemma", "qwen2_5_vl"]


def point(kind="stride", layer=1, **more):
    return {"kind": kind, "layer": layer, "keys_only": True, **more}


@pytest.mark.parametrize("kind", ["average_pool", "fastv", "random_drop"])
def test_the_contract(kind):
    check_compressor({"kind": kind, "keys_only": True}, FEW)


@pytest.mark.parametrize("second", [{"keys_only": True}, {}])
def test_further_points_act_on_what_still_runs(second):
    first = point("average_pool", 1, keep_tokens=6)
    check_compressor([first, {"kind": "pyramid_drop", "layer": 2, "keep_tokens": 3, **second}], ["llava", "gemma3"])


def test_each_layer_projects_queries_of_what_is_left_alone():
    model, batch = tiny_llava("sdpa").train(), make_batch([[3, "image", 7], [2, "image", 8]])
    rows, columns = batch["input_ids"].shape
    attachment = attach(model, [point(layer=2, keep_tokens=3)])
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.model.language_model.layers.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, name=name: shapes.update({name: tuple(args[0].shape[:2])}) if args else None
        )
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name != "labels"})
    assert attachment.visual_tokens_per_layer == (18, 18, 6, 6)
    for layer in range(4):
        left = columns if layer < 2 else columns - 6
        assert shapes[f"{layer}.self_attn.k_proj"] == shapes[f"{layer}.self_attn.v_proj"] == (rows, columns)
        assert shapes[f"{layer}.self_attn.q_proj"] == shapes[f"{layer}.mlp"] == (rows, left)


@pytest.mark.parametrize("beside", [[3, "image", 2], [9], [30]])  # as many others in a row, fewer, all of a row
def test_a_row_is_what_it_is_alone(beside):
    model = tiny_llava("sdpa").train()
    attach(model, [point("average_pool", 1, keep_tokens=3)])
    row = [3, "image", 7]
    alone, both = make_batch([row]), make_batch([row, beside])
    length = alone["input_ids"].shape[1]
    both["input_ids"][0, :length] = alone["input_ids"][0]
    both["labels"][0, :length] = alone["labels"][0]
    both["labels"][1] = -100
    both["pixel_values"][0] = alone["pixel_values"][0]
    found = []
    for batch in (alone, both):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        weight = model.model.language_model.layers[0].mlp.up_proj.weight
        found.append((loss.detach(), weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_dropped_tokens_have_no_logits():
    model, batch = tiny_llava("sdpa").eval(), make_batch([[3, "image", 7]])
    attach(model, [point(layer=2, keep_tokens=3)])
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert logits[0].isnan().any(1).nonzero().flatten().tolist() == [4, 5, 7, 8, 10, 11]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (point(layer="projector", stride=2), "before the decoder"),
        (point("q_former", keep_tokens=4), "new tokens"),
        (point("tome", stride=2), "size_bias"),
        (point("average_pool", stride=2, positions="renumber"), "keep their numbers"),
    ],
)
def test_what_cannot_be_is_refused(values, reason):
    with pytest.raises(UsageError, match=reason):
        attach(tiny_llava(), [values])


def test_what_layers_do_cannot_be_recorded():
    model = tiny_llava("eager").eval()
    attach(model, [point(stride=2)])
    with pytest.raises(UsageError, match="do not ask for hidden states"):
        model(**make_batch([[3, "image", 7]]), output_hidden_states=True)


def test_without_it_a_variant_is_what_it_was():
    spec = registry.spec_class(registry.COMPRESSORS, "stride")
    bare, off, on = (spec(layer=2, stride=4, **more) for more in ({}, {"keys_only": False}, {"keys_only": True}))
    assert "keys_only" not in bare.model_dump() and "keys_only" not in reached(off)
    one, same, other = (points_identity([each], resolve_points([each], 4, None)) for each in (bare, off, on))
    assert one == same != other


def test_the_formula_counts_what_runs():
    """Operations as torch counts them; it counts scores above the diagonal, too."""
    batch = make_batch([[3, "image", 7]])
    bare = {name: value for name, value in batch.items() if name != "labels"}
    columns = batch["input_ids"].shape[1]
    found = {}
    for name, points in {"full": [], "keys": [point(layer=2, keep_tokens=3)]}.items():
        model = tiny_llava("eager").eval()
        attach(model, points)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**bare)
        found[name] = counter.get_total_flops()
    facts = decoder_facts(model.config.text_config)
    sample = Sample(columns - 9, 0)
    full, keys = (cost.forward_tflops(facts, points, sample)["decoder"] * 1e12 for points in ([], points))
    left, heads = columns - 6, facts.num_attention_heads * facts.head_dim
    above = 2 * heads * (4 * columns**2), 2 * heads * (2 * columns**2 + 2 * left**2)
    assert found["full"] - found["keys"] == pytest.approx(full + above[0] - keys - above[1], rel=1e-6)
