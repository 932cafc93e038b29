"""Generation under compression: cached equals recomputing everything, for single prompts, batches and beams."""

from __future__ import annotations

import pytest
import torch
from reference import IMAGE, generate, make_batch, reference_rows, tiny_llava

from orchestrator.compression import attach
from orchestrator.errors import UsageError

MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5], [4, "image", "image"]]
SETTINGS = [
    [{"kind": "average_pool", "layer": 0, "stride": 4}],
    [{"kind": "average_pool", "layer": 2, "stride": 2}],
    [{"kind": "average_pool", "layer": 1, "stride": 2, "positions": "renumber"}],
    [
        {"kind": "average_pool", "layer": 0, "stride": 2},
        {"kind": "average_pool", "layer": 2, "stride": 2, "positions": "renumber"},
        {"kind": "average_pool", "layer": 3, "stride": 2},
    ],
]


def prompt(rows, padding="left", seed=0):
    batch = make_batch(rows, padding, seed, answer=0)
    del batch["labels"]
    return batch


def model_for(points, attention="sdpa", **options):
    model = tiny_llava(attention, **options).eval()
    return model, attach(model, points)


@pytest.mark.parametrize("points", SETTINGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_generation_equals_recomputing_everything(points, attention):
    model, _ = model_for(points, attention)
    batch = prompt(MIXED)
    cached, recomputed = generate(model, batch, 6), generate(model, batch, 6, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)
    for one, other in zip(cached.logits, recomputed.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("points", SETTINGS)
def test_generation_equals_the_plain_computation(points):
    """Every step of every row against the loop over layers; the batch is padded on the left."""
    model, _ = model_for(points)
    batch = prompt(MIXED)
    got = generate(model, batch, steps=3)
    start = batch["input_ids"].shape[1]
    for step in range(3):
        ids = got.sequences[:, : start + step]
        mask = torch.cat([batch["attention_mask"], torch.ones(len(ids), step, dtype=torch.long)], 1)
        now = {"input_ids": ids, "attention_mask": mask, "pixel_values": batch["pixel_values"]}
        for r, (_, logits) in enumerate(reference_rows(tiny_llava(), now, points)):
            assert torch.allclose(got.logits[step][r], logits[-1], atol=1e-4)


def test_layers_above_the_point_cache_the_short_prompt():
    model, _ = model_for([{"kind": "average_pool", "layer": 2, "stride": 3}])
    batch = prompt([[3, "image", 7]])
    cache = generate(model, batch, steps=4).past_key_values
    assert [cache.get_seq_length(layer) for layer in range(4)] == [19 + 3, 19 + 3, 13 + 3, 13 + 3]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beam_search_equals_recomputing_everything(options):
    model, _ = model_for(SETTINGS[1])
    batch = prompt([[3, "image", 7], [2, "image", 2], [1, "image", 6]])
    common = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE], **options}
    assert torch.equal(model.generate(**batch, **common), model.generate(**batch, **common, use_cache=False))


def test_sampled_return_sequences():
    model, _ = model_for(SETTINGS[1])
    batch = prompt([[3, "image", 7], [2, "image", 2]])
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3, "suppress_tokens": [IMAGE]}
        results.append(model.generate(**batch, **options, use_cache=use_cache))
    assert results[0].shape[0] == 6
    assert torch.equal(*results)


@pytest.mark.parametrize("points", [[{"kind": "average_pool", "layer": layer, "stride": 1}] for layer in (0, 2)] + [[]])
def test_keeping_all_generates_what_the_plain_model_does(points):
    batch = prompt(MIXED)
    plain = generate(tiny_llava("sdpa").eval(), batch, 6)
    model, _ = model_for(points)
    assert torch.equal(generate(model, batch, 6).sequences, plain.sequences)


def test_a_switch_during_generation_leaves_filled_caches_alone():
    model, attachment = model_for(SETTINGS[1])
    batch = prompt([[3, "image", 7], [8]])
    expected = generate(model, batch, steps=4)
    with torch.no_grad():
        output = model(**batch, use_cache=True, logits_to_keep=1)
        attachment.switch([])
        mask, token = batch["attention_mask"], output.logits[:, -1:].argmax(-1)
        for step in range(1, 4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            positions = mask.sum(1, keepdim=True) - 1
            # Without a shift the row's ids are columns, as the plain forward numbers them.
            positions = positions * 0 + mask.shape[1] - 1
            output = model(
                input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=output.past_key_values
            )
            token = output.logits[:, -1:].argmax(-1)
            assert torch.allclose(output.logits[:, -1], expected.logits[step], atol=1e-4)


def test_a_later_turn_with_another_image_goes_on_in_the_same_cache():
    points = [{"kind": "average_pool", "layer": 1, "stride": 2, "positions": "renumber"}]
    whole = prompt([[3, "image", 7, "image", 4]])
    model, _ = model_for(points)
    cut = 3 + 9 + 7
    with torch.no_grad():
        first = model(input_ids=whole["input_ids"][:, :cut], pixel_values=whole["pixel_values"][:1], use_cache=True)
        second = model(
            input_ids=whole["input_ids"][:, cut:],
            pixel_values=whole["pixel_values"][1:],
            attention_mask=whole["attention_mask"],
            past_key_values=first.past_key_values,
        )
        together = model(**whole)
    assert torch.allclose(second.logits[0, -4:], together.logits[0, -4:], atol=1e-4)


def test_ready_made_masks_are_refused():
    model, _ = model_for(SETTINGS[1])
    with pytest.raises(UsageError, match="static"):
        generate(model, prompt([[3, "image", 7]]), 6, cache_implementation="static")


def test_embeddings_without_ids_are_refused():
    model, _ = model_for(SETTINGS[1])
    batch = prompt([[3, "image", 7]])
    with pytest.raises(UsageError, match="input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]))
