"""Qwen-VL, PaliGemma and Gemma 3 under compression: against the plain model and against plain loops."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_gradients, generate, gradients, loss_of, reference_loss, reference_rows

from orchestrator.compression import attach
from orchestrator.compression.families import family_of
from orchestrator.compression.testing.families import GLM4V_VIDEO, PALIGEMMA_2
from orchestrator.compression.testing.families import TINY as ALL
from orchestrator.compression.testing.tiny import IMAGE, VIDEO
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid

GEMMA_3, PALIGEMMA, QWEN3_VL, QWEN3_VL_MOE = (ALL[n] for n in ("gemma3", "paligemma", "qwen3_vl", "qwen3_vl_moe"))
QWEN2_5_VL, QWEN2_VL = ALL["qwen2_5_vl"], ALL["qwen2_vl"]


QWEN = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_5_VL, "qwen3_vl": QWEN3_VL, "qwen3_vl_moe": QWEN3_VL_MOE}
GEMMA = {"paligemma": PALIGEMMA, "paligemma2": PALIGEMMA_2, "gemma3": GEMMA_3}
TINY = QWEN | GEMMA
CASES = [(name, attention) for name, tiny in TINY.items() for attention in tiny.attentions]

QWEN_ROWS = [[3, "image", 7], [9], [2, "small", 1, "video", 1, "image", 6], [4, "video", 5]]
GEMMA_ROWS = [[3, "image", 7], [9], [2, "image", 1, "image", 1, "image", 6], [1, "image", 8]]


def rows_of(name):
    return QWEN_ROWS if name in QWEN else GEMMA_ROWS


def lengths_of(tiny, rows):
    return [[grid.tokens for part in row if isinstance(part, str) for grid in tiny.units[part]] for row in rows]


def pooled(layer, **more):
    return {"kind": "average_pool", "layer": layer, "stride": 2, **more}


def prompt(name, rows=None, padding="left", seed=0):
    batch = TINY[name].batch(rows or rows_of(name), padding, seed, 0)
    del batch["labels"]
    return batch


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_nothing_changes_where_nothing_is_compressed(name, attention, padding):
    tiny = TINY[name]
    model = tiny.build(attention, 0).eval()
    batch = tiny.batch(rows_of(name), padding, 0, 3)
    with torch.no_grad():
        plain = model(**batch)
        attachment = attach(model, [])
        real = batch["attention_mask"].bool()
        for points in ([], [{"kind": "average_pool", "layer": 2, "stride": 1}], [pooled(2)]):
            attachment.switch(points)
            output = model(**batch, return_logits=True)
            same = points != [pooled(2)]
            assert (float(output.loss) == pytest.approx(float(plain.loss), rel=1e-5)) is same
            if same:
                assert torch.allclose(output.logits[real], plain.logits[real], atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_units_are_those_stated_by_hand(name):
    tiny = TINY[name]
    batch = tiny.batch(rows_of(name), "left", 0, 3)
    family = family_of(tiny.build("eager", 0))
    stated = [grid for row in rows_of(name) for part in row if isinstance(part, str) for grid in tiny.units[part]]
    visual_BN = family.visual_BN(batch["input_ids"])
    assert family.grids(batch, int(visual_BN.sum())) == stated
    assert int(visual_BN.sum()) == family.num_visual_tokens(batch) == sum(grid.tokens for grid in stated)
    assert family.first_layer == tiny.first_layer


@pytest.mark.parametrize("name", QWEN)
def test_grids_are_read_from_position_ids_where_generate_keeps_them_to_itself(name):
    model = QWEN[name].build("eager", 0).eval()
    rows = [["small", "video"], [2, "image", "image", 1], ["video", "small", 3]]
    batch = prompt(name, rows)
    seen = []
    attach(model, [pooled(2)])
    family = family_of(model)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    generate(model, batch, 1)
    assert "image_grid_thw" not in seen[0]
    count = int(family.visual_BN(batch["input_ids"]).sum())
    assert family.grids(seen[0], count) == family.grids(batch, count)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_loss_and_logits_equal_the_plain_computation(name, attention, padding):
    tiny = TINY[name]
    rows, model, plain = rows_of(name), tiny.build(attention, 0).eval(), tiny.build("eager", 0).eval()
    batch = tiny.batch(rows, padding, 0, 3)
    attachment = attach(model, [])
    layers = [1, 2, 3] if tiny.first_layer else [0, 1, 2, 3]
    settings = [[pooled(layer)] for layer in layers] + [[pooled(1, positions="renumber"), pooled(3)]]
    with torch.no_grad():
        for points in settings:
            attachment.switch(points)
            output = model(**batch, return_logits=True)
            expected = reference_rows(plain, batch, points, lengths_of(tiny, rows))
            assert float(output.loss) == pytest.approx(float(loss_of(expected)), abs=2e-5)
            kept = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
            for r, (tokens, logits) in enumerate(expected):
                columns = [token.column for token in tokens]
                kept[r, columns] = True
                assert torch.allclose(output.logits[r, columns], logits, atol=1e-4)
            assert output.logits[~kept & batch["attention_mask"].bool()].isnan().all()


@pytest.mark.parametrize("name", TINY)
def test_gradients_equal_the_plain_computation(name):
    tiny, points = TINY[name], [pooled(1), pooled(3)]
    rows, model, plain = rows_of(name), tiny.build(tiny.attentions[-1], 0), tiny.build("eager", 0)
    batch = tiny.batch(rows, "left", 0, 3)
    attach(model, points)
    expected = gradients(plain, reference_loss(plain, batch, points, units=lengths_of(tiny, rows)))
    assert_same_gradients(gradients(model, model(**batch).loss), expected)


@pytest.mark.parametrize("name", TINY)
def test_checkpointed_layers_give_the_same(name):
    tiny = TINY[name]
    batch = tiny.batch(rows_of(name), "left", 0, 3)
    found = []
    for checkpointing in (False, True):
        model = tiny.build("eager", 0).train()
        attach(model, [pooled(1), pooled(3)])
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**batch).loss
        found.append((float(loss.detach()), gradients(model, loss)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert_same_gradients(found[1][1], found[0][1], 1e-6)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_cached_generation_equals_recomputing_everything(name, attention):
    tiny = TINY[name]
    first = tiny.first_layer
    model, batch = tiny.build(attention, 0).eval(), prompt(name)
    attachment = attach(model, [])
    settings = [[pooled(first)], [pooled(2)], [pooled(first, positions="renumber"), pooled(3, size_bias=True)]]
    for points in settings:
        attachment.switch(points)
        cached, recomputed = generate(model, batch, 5), generate(model, batch, 5, use_cache=False)
        assert torch.equal(cached.sequences, recomputed.sequences)
        for one, other in zip(cached.logits, recomputed.logits, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        lengths = {cached.past_key_values.get_seq_length(layer) for layer in range(tiny.layers)}
        assert len(lengths) > 1 or points[0]["layer"] == 0


@pytest.mark.parametrize("name", TINY)
def test_the_first_generated_token_follows_the_plain_computation(name):
    tiny, points = TINY[name], [pooled(1), pooled(2, size_bias=True)]
    model, plain, batch = tiny.build("eager", 0).eval(), tiny.build("eager", 0).eval(), prompt(name)
    attach(model, points)
    got = generate(model, batch, 1).logits[0]
    with torch.no_grad():
        expected = reference_rows(plain, batch, points, lengths_of(tiny, rows_of(name)))
    for r, (_, logits) in enumerate(expected):
        assert torch.allclose(got[r], logits[-1], atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_beams_equal_recomputing_everything(name):
    tiny = TINY[name]
    model, batch = tiny.build(tiny.attentions[-1], 0).eval(), prompt(name)
    attach(model, [pooled(2, size_bias=True)])
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    options["suppress_tokens"] = [IMAGE, VIDEO]
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("name", TINY)
def test_steps_by_hand_go_on_with_the_right_numbers(name):
    """Without position ids the top model numbers tokens; the short cache of a point at layer 0 must not mislead it."""
    tiny = TINY[name]
    model = tiny.build("eager", 0).eval()
    attach(model, [pooled(tiny.first_layer)])
    batch = prompt(name, [[3, "image", 7]])
    del batch["attention_mask"]
    following = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        output = model(**batch, use_cache=True)
        steps = []
        for n in range(3):
            types = {k: torch.ones(1, 1).long() for k in batch if k == "token_type_ids" and name.startswith("pali")}
            token = following[:, n : n + 1]
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **types)
            steps.append(output.logits[0, -1])
        whole = dict(batch, input_ids=torch.cat([batch["input_ids"], following], 1))
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in whole:
                tail = torch.full((1, 3), int(name.startswith("pali")), dtype=whole[key].dtype)
                whole[key] = torch.cat([whole[key], tail], 1)
        expected = model(**whole).logits[0, -3:]
    assert torch.allclose(torch.stack(steps), expected, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_an_answer_sees_the_image_without_a_mask(name):
    """Without a mask transformers reads gaps in position ids as packed rows and would cut image from text."""
    tiny = TINY[name]
    model = tiny.build(tiny.attentions[-1], 0).eval()
    attach(model, [pooled(1), pooled(2)])
    batch = tiny.batch([[3, "image", 7]], "right", 0, 3)
    batch.pop("attention_mask")
    other = batch | {"pixel_values": batch["pixel_values"].flip(0) + 1}
    with torch.no_grad():
        seen = [model(**one, return_logits=True).logits[0, -1] for one in (batch, other)]
        masked = model(**batch, attention_mask=torch.ones_like(batch["input_ids"]), return_logits=True).logits[0, -1]
    assert float((seen[0] - seen[1]).abs().max()) > 1e-3
    assert torch.allclose(seen[0], masked, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_points_where_deepstack_adds_are_refused(name):
    with pytest.raises(UsageError, match=r"DeepStack.*layer from 1 on"):
        attach(TINY[name].build("eager", 0), [pooled(0)])


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_size_bias_equals_a_plain_attention_loop(name, attention):
    tiny, points = TINY[name], [pooled(1, size_bias=True), pooled(3)]
    rows, model, plain = rows_of(name), tiny.build(attention, 0).eval(), tiny.build("eager", 0).eval()
    batch = tiny.batch(rows, "left", 0, 3)
    attachment = attach(model, points)
    with torch.no_grad():
        biased = model(**batch, return_logits=True)
        expected = reference_rows(plain, batch, points, lengths_of(tiny, rows))
        for r, (tokens, logits) in enumerate(expected):
            assert torch.allclose(biased.logits[r, [token.column for token in tokens]], logits, atol=1e-4)
        attachment.switch([pooled(1), pooled(3)])
        assert float(model(**batch).loss) != pytest.approx(float(biased.loss), abs=1e-5)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_sizes_of_one_bias_nothing(name, attention):
    tiny = TINY[name]
    model, batch = tiny.build(attention, 0).eval(), tiny.batch(rows_of(name), "left", 0, 3)
    with torch.no_grad():
        plain = float(model(**batch).loss)
        attach(model, [{"kind": "average_pool", "layer": 1, "stride": 1, "size_bias": True}])
        assert float(model(**batch).loss) == pytest.approx(plain, rel=1e-5)


def test_size_bias_needs_an_attention_that_takes_it():
    model = QWEN2_VL.build("eager", 0)
    model.model.language_model.config._attn_implementation = "flex_attention"
    attach(model, [pooled(0, size_bias=True)])
    with pytest.raises(UsageError, match="eager or sdpa"):
        model(**QWEN2_VL.batch(QWEN_ROWS, "left", 0, 3))


@pytest.mark.parametrize("name", TINY)
def test_features_of_no_image_reach_tower_and_projector(name):
    """What a rank without images runs: every parameter that an image's features come from is in the graph."""
    model = TINY[name].build("eager", 0)
    family_of(model).idle_features().sum().backward()
    inner = model.model
    parts = [inner.visual] if name in QWEN else [inner.multi_modal_projector]
    lacking = [n for part in parts for n, p in part.named_parameters() if p.grad is None]
    assert not lacking


@pytest.mark.parametrize(("name", "kind"), [("qwen3_5", "linear_attention"), ("lfm2_vl", "conv")])
def test_what_hybrid_layers_cannot_do_is_refused_at_attach(name, kind):
    model = ALL[name].build("sdpa", 0)
    with pytest.raises(UsageError, match=f"attach: average_pool with size_bias: masks of {kind} layers"):
        attach(model, [pooled(1, size_bias=True)])
    with pytest.raises(UsageError, match=r"attach: fastv at layer 1: .* has no attention module"):
        attach(model, [{"kind": "fastv", "layer": 1, "keep_ratio": "1/2"}])
    attach(model, [{"kind": "fastv", "layer": 2, "keep_ratio": "1/2"}]).detach()


def test_frames_of_a_video_with_the_placeholder_of_images():
    tiny = GLM4V_VIDEO
    rows = [[3, "video", 7], [9], [2, "video", 1, "video", 6]]
    batch = tiny.batch(rows, "left", 1, 3)
    units = [grid for row in rows for part in row if part == "video" for grid in tiny.units["video"]]
    model = tiny.build("sdpa", 1)
    assert family_of(model).grids(batch, int((batch["input_ids"] == IMAGE).sum())) == units
    plain = model(**batch).loss
    attachment = attach(model, [pooled(2, stride=1)])
    assert abs(float((model(**batch).loss - plain).detach())) < 1e-6
    attachment.switch([pooled(2)])
    assert torch.isfinite(model(**batch).loss)
    assert attachment.last_visual_layer_tokens == 3 * (2 * 12 + 2 * 6)


def test_frames_that_the_processor_thinned_out_are_rows_of_what_is_left():
    tiny = ALL["video_llama_3"]
    model = tiny.build("sdpa", 0)
    batch = tiny.batch([[3, "video", 7]], "right", 0, 3)
    batch["video_compression_mask"] = torch.tensor([True] * 6 + [True, False, False, True, True, False])
    video = (batch["input_ids"][0] == VIDEO).nonzero().flatten()
    kept = torch.ones_like(batch["input_ids"][0], dtype=torch.bool)
    kept[video[~batch["video_compression_mask"]]] = False
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = batch[name][:, kept]
    family = family_of(model)
    assert family.grids(batch, 9) == [Grid(2, 3), Grid(1, 3)]
    plain = model(**batch).loss
    attach(model, [pooled(1, stride=1)])
    assert abs(float((model(**batch).loss - plain).detach())) < 1e-6
