"""Points inside the vision tower: on every family that takes them as computed by hand; all others refuse."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from reference import IMAGE, assert_same_gradients, gradients, make_batch, tiny_llava
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.compression import attach
from orchestrator.compression.families import family_of
from orchestrator.compression.testing import check_compressor
from orchestrator.compression.testing.families import LLAVA_PIXTRAL, TINY
from orchestrator.errors import UsageError
from orchestrator.plan import cost
from orchestrator.plan.cost import Sample
from orchestrator.spec.model_facts import FAMILIES, _family_facts

SERVED = ("llava", "vipllava", "paligemma")
MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5]]
POOLED = {"kind": "average_pool", "layer": "tower:1", "stride": 3}
LACO = {"kind": "laco", "layer": "tower:1", "stride": 9}


def point(kind, layer="tower:1", **more):
    return {"kind": kind, "layer": layer, **more}


@pytest.mark.parametrize(
    "points",
    [
        [point("average_pool", "tower:0")],
        [point("average_pool", stride=2, size_bias=True)],
        [point("average_pool_2d", keep_tokens=4)],
        [point("k_means", keep_tokens=4)],
        [point("laco")],
        [point("stride", "tower:50%", stride=2)],
        [point("tome", stride=2)],
        [point("tome", keep_tokens=6, size_bias=False)],
        [point("tome", keep_tokens=2)],  # several rounds
        [  # a few in each block, between its attention and its MLP
            point("tome", "tower:0", keep_tokens=7, inside_layer=True),
            point("tome", keep_tokens=5, inside_layer=True),
        ],
        # Merged twice in the tower (proportional attention between), pooled at the projector, dropped in the decoder.
        [
            point("average_pool", "tower:0", keep_tokens=7, size_bias=True),
            point("tome", keep_tokens=5),
            point("average_pool", "projector", keep_tokens=3),
            {"kind": "fastv", "layer": 2, "keep_tokens": 2},
        ],
    ],
    ids=lambda points: "+".join(f"{one['kind']}@{one['layer']}" for one in points),
)
def test_points_in_the_tower_are_the_plain_computation(points):
    """The contract kit: loss, gradients, padding, checkpointing, generation, attach and detach."""
    assert check_compressor(points, SERVED).proven == SERVED


@pytest.mark.parametrize("family", [name for name in TINY if name not in SERVED])
def test_every_other_family_refuses(family):
    with pytest.raises(UsageError, match="no compressor acts inside the vision tower of"):
        attach(TINY[family].build("eager", 0), [POOLED])


@pytest.mark.parametrize("family", [name for name in TINY if name in FAMILIES])
def test_the_planner_refuses_what_attach_refuses(family):
    """By config alone: how deep the tower is, and before which of its layers points may act."""
    model = TINY[family].build("eager", 0)
    facts = _family_facts(model.config.to_dict(), FAMILIES[family])
    try:
        tower = family_of(model).tower
    except UsageError as error:
        assert facts.tower_points == 0 and facts.tower_refusal in str(error)
    else:
        assert (facts.vision_depth, facts.tower_points, facts.tower_refusal) == (tower.depth, tower.limit, "")
        assert facts.vision_hidden_size == tower.width
        assert facts.vision_tokens == facts.image_grid.tokens + tower.front


def by_hand(model, pixels):
    """Features of a LLaVA whose patches are averaged by threes before its tower's second layer."""
    tower = model.model.vision_tower
    hidden_BTD = tower.pre_layrnorm(tower.embeddings(pixels))
    hidden_BTD = tower.encoder.layers[0](hidden_BTD, None)
    pooled_BMD = hidden_BTD[:, 1:].unflatten(1, (3, 3)).mean(2)
    hidden_BTD = tower.encoder.layers[1](torch.cat([hidden_BTD[:, :1], pooled_BMD], 1), None)
    return model.model.multi_modal_projector(hidden_BTD[:, 1:])


def test_one_row_by_hand():
    """Position ids of the window's middle, its text unmoved: as pooling at the decoder's input has them."""
    batch = make_batch([[3, "image", 7]])
    plain, model = tiny_llava("sdpa").train(), tiny_llava("sdpa").train()
    assert len(model.model.vision_tower.encoder.layers) == 3, "the second-last hidden state must lie behind layer 1"
    attachment = attach(model, [POOLED])
    embeds = plain.get_input_embeddings()(batch["input_ids"])
    rows = torch.cat([embeds[:, :3], by_hand(plain, batch["pixel_values"]), embeds[:, 12:]], 1)
    out = plain.model.language_model(
        inputs_embeds=rows,
        position_ids=torch.tensor([[0, 1, 2, 4, 7, 10, *range(12, 19)]]),
        attention_mask=torch.ones(1, 13, dtype=torch.bool),
    )
    logits = plain.lm_head(out.last_hidden_state)[0, -4:-1]
    expected = nn.functional.cross_entropy(logits, batch["labels"][0, -3:])
    loss = model(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_same_gradients(gradients(model, loss), gradients(plain, expected))
    assert attachment.visual_tokens_per_layer == (3, 3, 3, 3)


def test_merging_inside_a_block_by_hand():
    """ToMe's place: residual and attention, merging by the keys of that attention, then the MLP on what is left."""
    batch = make_batch([[3, "image", 7]])
    plain, model = tiny_llava("sdpa").eval(), tiny_llava("sdpa").eval()
    attach(model, [point("tome", "tower:0", keep_tokens=5, inside_layer=True, size_bias=False)])
    given: list[torch.Tensor] = []
    model.model.vision_tower.encoder.layers[1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    tower = plain.model.vision_tower
    block, hidden_BTD = tower.encoder.layers[0], tower.pre_layrnorm(tower.embeddings(batch["pixel_values"]))
    normed_BTD = block.layer_norm1(hidden_BTD)
    hidden_BTD = hidden_BTD + block.self_attn(hidden_states=normed_BTD, attention_mask=None)[0]
    keys_ND = block.self_attn.k_proj(normed_BTD)[0, 1:].unflatten(1, (block.self_attn.num_heads, -1)).mean(1)
    alike_AC = nn.functional.normalize(keys_ND, dim=1)[::2] @ nn.functional.normalize(keys_ND, dim=1)[1::2].T
    merged = sorted(alike_AC.amax(1).argsort(descending=True)[:4].tolist())  # four of nine go
    members = {2 * one + 1: [2 * one + 1] for one in range(4)}
    for one in merged:
        members[2 * int(alike_AC[one].argmax()) + 1].append(2 * one)
    members |= {2 * one: [2 * one] for one in range(5) if one not in merged}
    left = [hidden_BTD[0, 1:][members[place]].mean(0) for place in sorted(members)]
    hidden_BTD = torch.cat([hidden_BTD[:, :1], torch.stack(left).unsqueeze(0)], 1)
    hidden_BTD = hidden_BTD + block.mlp(block.layer_norm2(hidden_BTD))
    with torch.no_grad():
        model(**batch)
    torch.testing.assert_close(given[0], hidden_BTD, atol=1e-5, rtol=1e-5)


def test_the_tower_is_as_it_was_after_a_forward_and_after_an_error():
    model = tiny_llava("sdpa")
    attach(model, [point("tome", keep_tokens=4)])
    encoder, batch = model.model.vision_tower.encoder, make_batch(MIXED)

    def untouched():
        own = encoder.layers is encoder._modules["layers"] and "layers" not in encoder.__dict__
        configs = {type(layer.self_attn.__dict__["config"]) for layer in encoder.layers}
        return own and configs == {hf.CLIPVisionConfig}

    model(**batch)
    assert untouched()
    with pytest.raises(UsageError, match="placeholders"):
        model(**batch | {"pixel_values": batch["pixel_values"][:2]})
    assert untouched()
    features = model.model.get_image_features(pixel_values=batch["pixel_values"])
    assert len(features.pooler_output[0]) == 9
    with pytest.raises(UsageError, match="pixel_values"):
        model(**{k: v for k, v in batch.items() if k != "pixel_values"}, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_cached_generation_equals_recomputing_everything(options):
    batch = make_batch(MIXED, "left", answer=0)
    del batch["labels"]
    model = tiny_llava("sdpa").eval()
    attach(model, [point("tome", keep_tokens=4)])
    common = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE], **options}
    cached, recomputed = (model.generate(**batch, **common, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, recomputed)


@pytest.mark.parametrize(
    ("points", "entering"),
    [([POOLED], [10, 4]), ([point("tome", "tower:0", keep_tokens=3, inside_layer=True)], [10, 4])],
    ids=["before a layer", "inside one"],
)
def test_the_tower_runs_what_the_cost_formula_counts(points, entering):
    """Operations that torch counts in each used layer of four images' tower, and in the projector."""
    config = tiny_llava().config
    facts = _family_facts(config.to_dict(), FAMILIES["llava"])
    model, batch = tiny_llava("eager"), make_batch(MIXED)
    attach(model, points)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    counts = counter.get_flop_counts()
    inside = [f"LlavaForConditionalGeneration.model.vision_tower.encoder.layers.{number}" for number in range(2)]
    halves = ("self_attn", "mlp")  # choosing is not counted
    layers = [sum(sum(counts[f"{name}.{half}"].values()) for half in halves) for name in inside]
    parts = cost.forward_tflops(facts, points, Sample(0, 0, images=4))
    assert cost.tower_tokens_by_layer(facts, points) == entering
    assert sum(layers) == pytest.approx(1e12 * parts["vision_tower"]) and layers[1] < layers[0]
    projected = counts["LlavaForConditionalGeneration.model.multi_modal_projector"]
    assert sum(projected.values()) == pytest.approx(1e12 * parts["projector"])


def test_a_module_in_the_tower_has_its_width_and_a_name_of_its_layer():
    model = tiny_llava(hidden_size=48)
    attachment = attach(model, [LACO])
    ((name, module),) = attachment.learned_modules.items()
    assert name.startswith("laco_tower1_")
    assert module[1].in_features == 9 * 32 and module[3].out_features == 32
    assert attachment.learned_names([LACO | {"layer": "tower:34%"}]) == (name,)  # of three layers
    assert attachment.learned_names([LACO | {"layer": "tower:0"}]) != (name,)
    frozen = model.model.vision_tower.requires_grad_(False)
    model(**make_batch(MIXED)).loss.backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert float(module[3].weight.grad.abs().max()) > 0, "gradients pass the frozen layers after it"


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([point("average_pool", "tower:2", stride=3)], "takes what layer 1 gives; give tower:0 to tower:1"),
        ([point("average_pool", "tower:99%", stride=3)], "tower:99% is layer 2 of 3"),
        ([point("tome", "tower:0", keep_tokens=3)], "give tower:1 or more"),
        ([point("tome", 1, keep_tokens=3, inside_layer=True)], "inside_layer is for a layer of the vision tower"),
        ([point("divprune", keep_tokens=3)], "cannot act at layer tower:1; give a decoder layer or layer: projector"),
        ([point("laco", 1, stride=9)], "give layer: projector or layer: tower:N"),
        ([POOLED, POOLED], "one point acts before a layer"),
        ([POOLED, point("visionzip", 2, keep_tokens=2)], "one point of a variant may"),
        ([POOLED, point("downsample", "projector", keep_tokens=1)], "one point of a variant may"),
        (
            [point("downsample", "projector", keep_ratio="1/2"), point("visionzip", "projector", keep_tokens=2)],
            "downsample resizes the image, and visionzip needs the CLS attention of a tower that sees the whole image",
        ),
        (
            [point("tome", "tower:1", stride=2), point("stride", 2, stride=2, keys_only=True)],
            "tome before it has attention weigh tokens by size .size_bias., and a token that stays as a key has none",
        ),
        ([point("tome", 1, stride=2), point("fastv", 2, keep_tokens=1, keys_only=True)], "or drop keys_only"),
    ],
)
def test_points_that_do_not_fit(points, told):
    with pytest.raises(UsageError, match=told):
        attach(tiny_llava(), points)


def test_towers_whose_tokens_are_not_their_patches_refuse():
    model = LLAVA_PIXTRAL.build("eager", 0)
    with pytest.raises(UsageError, match="it is a pixtral, not one of clip_vision_model, siglip_vision_model"):
        attach(model, [POOLED])
    keeps_cls = tiny_llava()
    keeps_cls.config.vision_feature_select_strategy = "full"
    with pytest.raises(UsageError, match="not its patches one to one"):
        attach(keeps_cls, [POOLED])
    flash = tiny_llava()
    flash.model.vision_tower.encoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="use eager or sdpa, or size_bias: false"):
        attach(flash, [point("tome", keep_tokens=3)])


def test_a_layer_that_hides_its_attention_is_refused_at_attach():
    model = tiny_llava()
    model.model.vision_tower.encoder.layers[0].self_attn = nn.Identity()
    with pytest.raises(UsageError, match="has no attention module"):
        attach(model, [point("tome", keep_tokens=3)])
