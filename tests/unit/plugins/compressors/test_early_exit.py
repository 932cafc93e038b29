"""early_exit, and HiDrop, whose last point it is: text alone from a depth on."""

from __future__ import annotations

import math

import pytest
import torch
from orchestrator_plugins.compressors.early_exit import EarlyExitSpec
from reference import generate, make_batch, tiny_llava

from orchestrator.compression import attach
from orchestrator.compression.testing import check_compressor
from orchestrator.compression.testing.families import TINY
from orchestrator.errors import UsageError
from orchestrator.spec.budgets import layer_average, solve_layer_average, tokens_by_layer
from orchestrator.spec.components import Grid

LATE = {"kind": "late_injection", "layer": 1}
EXIT = {"kind": "early_exit", "layer": 3}
TINY_HIDROP = [LATE, {"kind": "fastv", "layer": 2, "keep_tokens": 3}, EXIT]
MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5], [1, "image", "image", 4]]


def fastv(layer, kept):
    return {"kind": "fastv", "layer": layer, "keep_tokens": kept}


def published(first):
    """HiDrop's points for a decoder of 32 layers (arXiv 2602.23699)."""
    pruned = [fastv(10, first), fastv(14, 10), fastv(16, 5), fastv(18, 1)]
    return [{"kind": "late_injection", "layer": 8}, *pruned, {"kind": "early_exit", "layer": 24}]


def plain_loop(model, batch, steps):
    """One row through the layers one by one; `steps` maps a layer to what is done before it.

    `text`: only text goes on; `image`: the image's tokens join where they stood; a number: so many of them stay, by
    what the token before the answer paid them in the layer before, mean over heads. Attention is written out.
    """
    language_model = model.model.language_model
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    visual = [c for c, token in enumerate(ids) if token == model.config.image_token_id]
    seen = {}
    hook = language_model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    hook.remove()
    entered = seen["inputs_embeds"][0]
    asks = next(c for c in range(len(ids)) if labels[c + 1] != -100)
    row = {c: entered[c] for c in range(len(ids))}
    counts, attention = [], None
    for number, layer in enumerate(language_model.layers):
        step = steps.get(number)
        if step == "text":
            row = {c: h for c, h in row.items() if c not in visual}
        elif step == "image":
            row |= {c: entered[c] for c in visual}
        elif step is not None:
            columns = sorted(row)
            paid = {c: float(attention[columns.index(asks), n].detach()) for n, c in enumerate(columns) if c in visual}
            gone = sorted(paid, key=lambda c: -paid[c])[step:]
            row = {c: h for c, h in row.items() if c not in gone}
        columns = sorted(row)
        hidden = torch.stack([row[c] for c in columns])
        hidden, attention = one_layer(language_model, layer, hidden, torch.tensor(columns))
        row = dict(zip(columns, hidden, strict=True))
        counts.append(len(set(columns) & set(visual)))
    logits = model.lm_head(language_model.norm(torch.stack([row[c] for c in columns])))
    losses = [
        -torch.log_softmax(logits[n], 0)[labels[after]] for n, after in enumerate(columns[1:]) if labels[after] != -100
    ]
    return torch.stack(losses).mean(), tuple(counts), attention


def one_layer(language_model, layer, hidden_ND, ids_N):
    """A Llama layer by its formulas: hidden states, and attention as the mean over heads."""
    attention, config = layer.self_attn, language_model.config
    heads, keys, size = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    normed = layer.input_layernorm(hidden_ND)
    q, k, v = (
        project(normed).unflatten(1, (count, size)).transpose(0, 1)
        for project, count in ((attention.q_proj, heads), (attention.k_proj, keys), (attention.v_proj, keys))
    )
    angle = ids_N[:, None] * config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)
    q, k = (x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin for x in (q, k))
    k, v = (x.repeat_interleave(heads // keys, 0) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(size)).masked_fill(ids_N[:, None] < ids_N, -math.inf)
    seen = scores.softmax(-1)
    hidden_ND = hidden_ND + attention.o_proj((seen @ v).transpose(0, 1).flatten(1))
    return hidden_ND + layer.mlp(layer.post_attention_layernorm(hidden_ND)), seen.mean(0)


@pytest.mark.parametrize(
    ("points", "steps"),
    [
        ([EXIT], {3: "text"}),
        ([{"kind": "early_exit", "layer": 1}], {1: "text"}),
        ([{"kind": "late_injection", "layer": 2}], {0: "text", 2: "image"}),
        (TINY_HIDROP, {0: "text", 1: "image", 2: 3, 3: "text"}),
        (
            [{"kind": "late_injection", "layer": "25%"}, fastv(3, 4), fastv(5, 2), fastv(6, 1),
             {"kind": "early_exit", "layer": "90%"}],
            {0: "text", 2: "image", 3: 4, 5: 2, 6: 1, 7: "text"},
        ),
    ],
)  # fmt: skip
def test_it_is_a_plain_loop_over_the_layers(points, steps):
    depth = 8 if len(points) > 3 else 4
    batch = TINY["llava"].batch([[3, "image", 7]], "right", 1, 3)
    wanted, counts, _ = plain_loop(tiny_llava("eager", layers=depth), batch, steps)
    attachment = attach(model := tiny_llava("sdpa", layers=depth), points)
    loss = model(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-5)
    assert attachment.visual_tokens_per_layer == counts
    full = tiny_llava("sdpa", layers=depth)(**batch).loss
    assert abs(float((full - loss).detach())) > 1e-4


def test_at_the_last_layer_only_that_one_sees_text_alone():
    batch = make_batch(MIXED, "left")
    attachment = attach(model := tiny_llava("sdpa"), [EXIT])
    with torch.no_grad():
        output = model(**batch, return_logits=True, output_hidden_states=True)
        plain = tiny_llava("sdpa")(**batch, output_hidden_states=True)
    assert attachment.visual_tokens_per_layer == (54, 54, 54, 0)
    for got, wanted in zip(output.hidden_states[:3], plain.hidden_states[:3], strict=True):
        assert torch.allclose(got[batch["attention_mask"].bool()], wanted[batch["attention_mask"].bool()], atol=1e-5)
    visual = batch["input_ids"] == model.config.image_token_id
    real_text = batch["attention_mask"].bool() & ~visual
    assert output.logits[visual].isnan().all() and not output.logits[real_text].isnan().any()


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "gemma3", "qwen2_vl", "lfm2_vl", "qwen3_vl"])
def test_it_holds_the_contract(family):
    assert check_compressor({"kind": "early_exit"}, [family]).proven == (family,)


@pytest.mark.parametrize("kind", ["fastv", "pyramid_drop"])
def test_hidrop_holds_the_contract(kind):
    points = [LATE, {"kind": kind, "layer": 2, "keep_tokens": 2}, EXIT]
    families = ["llava", "llava_next", "qwen2_vl", "gemma3"]
    assert check_compressor(points, families).proven == tuple(families)


def test_newlines_and_images_of_one_token_leave_too():
    """LLaVA-OneVision's newline is a unit of one token, which other methods leave alone."""
    batch = TINY["llava_onevision"].batch([[3, next(iter(TINY["llava_onevision"].units)), 7]], "right", 0, 3)
    attachment = attach(model := TINY["llava_onevision"].build("sdpa", 0), [LATE, fastv(2, 1), EXIT])
    model(**batch)
    first, full, one, none = attachment.visual_tokens_per_layer
    assert first == none == 0 < one < full


@pytest.mark.parametrize("points", [[EXIT], TINY_HIDROP, [LATE, {**fastv(2, 4), "kind": "pyramid_drop"}, EXIT]])
def test_generation_with_a_cache_and_beams_equals_recomputing_everything(points):
    batch = make_batch([[3, "image", 7], [8], [2, "image", 2, "image", 5]], "left", answer=0)
    del batch["labels"]
    attach(model := tiny_llava("sdpa").eval(), points)
    cached, recomputed = generate(model, batch, 5), generate(model, batch, 5, use_cache=False)
    for one, other in zip(cached.logits, recomputed.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    common = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "suppress_tokens": [model.config.image_token_id]}
    assert torch.equal(model.generate(**batch, **common), model.generate(**batch, **common, use_cache=False))


def test_a_prompt_that_ends_with_an_image_is_refused():
    """Its last token's logits, from which the answer would begin, do not exist; so for any method that drops it."""
    batch = make_batch([[4, "image"], [3, "image", 2]], "left", answer=0)
    del batch["labels"]
    for point in (EXIT, {"kind": "stride", "layer": 2, "keep_tokens": 4}):
        attach(model := tiny_llava("sdpa").eval(), [point])
        with pytest.raises(UsageError, match="a prompt ends with an image"):
            model.generate(**batch, max_new_tokens=2)


def test_an_answer_that_nothing_would_predict_is_refused():
    batch = make_batch([["image", 5], [9]])
    batch["labels"][0, 9:] = batch["input_ids"][0, 9:]
    attachment = attach(model := tiny_llava("sdpa"), [EXIT])
    with pytest.raises(UsageError, match="a row begins with an image, and the token after it has a label"):
        model(**batch)
    attachment.switch([LATE])
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([{"kind": "early_exit", "layer": 0}], "no layer would see the image; give it 1 or more"),
        ([{"kind": "late_injection", "layer": 3}, EXIT], "no layer would see the image; give it 4 or more"),
        ([EXIT, {"kind": "stride", "layer": 3, "stride": 2}], "stride after it has none"),
        ([EXIT, EXIT], "early_exit after it has none"),
        ([EXIT, {"kind": "late_injection", "layer": 3}], "early_exit acts before it"),
        ([LATE, {"kind": "late_injection", "layer": 2}], "cannot a second time"),
        ([{"kind": "late_injection", "layer": 2}, {"kind": "stride", "layer": 1, "stride": 2}], "stride acts before"),
        ([{"kind": "late_injection", "layer": 2}, fastv(2, 3)], "fastv looks at the layer before its own"),
        ([{"kind": "late_injection", "layer": 2}, {"kind": "dart", "layer": 1, "keep_tokens": 3}], "dart acts before"),
        ([LATE, {"kind": "registers", "layer": 2, "keep_tokens": 3}], "registers adds tokens beside them"),
        ([LATE, {"kind": "isolator"}], "isolator adds tokens"),
        ([{"kind": "isolator"}, EXIT], "isolator adds tokens for good"),
    ],
)  # fmt: skip
def test_points_that_do_not_go_together(points, message):
    with pytest.raises(UsageError, match=message):
        attach(tiny_llava(), points)
    with pytest.raises(UsageError, match=message):
        attach(tiny_llava(), []).switch(points)


def test_the_planner_counts_what_runs():
    points = [point.spec for point in attach(tiny_llava(), TINY_HIDROP).points]
    assert tokens_by_layer(points, 4, Grid(3, 3)) == [0, 9, 3, 0]
    for first, average in ((87, 48), (215, 64)):
        deep = [point.spec for point in attach(tiny_llava(layers=32), published(first)).points]
        assert layer_average(deep, 32, Grid(24, 24)) == average


def test_an_amount_between_them_is_solved_for_the_mean():
    late, _, last = (
        point.spec for point in attach(tiny_llava(layers=32), [published(9)[n] for n in (0, 1, -1)]).points
    )
    pooled = {"kind": "average_pool", "layer": 10, "layer_average_tokens": 96}
    kind = type(attach(tiny_llava(), [{"kind": "average_pool", "layer": 1, "stride": 2}]).points[0].spec)
    point = kind.model_validate(pooled)
    solved = solve_layer_average(point, 32, Grid(24, 24), [late, point, last])
    assert solved.keep_tokens == 137  # (2 * 576 + 14 * 137) / 32 = 95.9
    with pytest.raises(ValueError, match=r"the mean lies between 36\.4 and 288"):
        low = kind.model_validate(pooled | {"layer_average_tokens": 30})
        solve_layer_average(low, 32, Grid(24, 24), [late, low, last])


def test_it_takes_no_amount_and_keeps_nothing():
    assert EarlyExitSpec(layer=24).kept_tokens(Grid(1, 1)) == 0
    with pytest.raises(ValueError, match="it takes no amount"):
        EarlyExitSpec(layer=24, keep_ratio="1/2")


@pytest.mark.parametrize("points", [[{**fastv(2, 3), "keys_only": True}, EXIT], [
    {"kind": "stride", "layer": 0, "stride": 2, "keys_only": True}, LATE]])  # fmt: skip
def test_layers_of_text_alone_see_no_keys_of_the_image(points):
    with pytest.raises(UsageError, match="keys_only keeps keys of the image"):
        attach(tiny_llava(), points)
