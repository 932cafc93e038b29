"""Methods that ask what attention saw, inside a model: all kept, checkpointing, padding, caches, row by row."""

from __future__ import annotations

import pytest
import torch
from reference import IMAGE, TOKENS, assert_same_gradients, gradients, make_batch, tiny_llava

from orchestrator.compression import attach
from orchestrator.errors import UsageError

ROWS = [[3, "image", 7], [9], [2, "image", 2, "image", 5], [2, "image", 4, "image", 6, "image", 5]]
POINTS = {
    "fastv": [{"kind": "fastv", "layer": 2, "keep_tokens": 4}],
    "pyramid_drop": [{"kind": "pyramid_drop", "layer": layer, "keep_ratio": "1/2"} for layer in (1, 2, 3)],
    "dart": [{"kind": "dart", "layer": 1, "keep_tokens": 5, "visual_pivots": 2, "text_pivots": 2}],
    "visionzip": [{"kind": "visionzip", "layer": 0, "keep_tokens": 4, "contextual_ratio": "1/2"}],
    "visionzip_late": [{"kind": "visionzip", "layer": 2, "keep_tokens": 4, "contextual_ratio": "1/4"}],
    "visionzip_projector": [{"kind": "visionzip", "layer": "projector", "keep_tokens": 4, "contextual_ratio": "1/2"}],
    "mixed": [
        {"kind": "visionzip", "layer": 0, "keep_tokens": 8, "contextual_ratio": "1/4"},
        {"kind": "dart", "layer": 1, "keep_tokens": 6, "visual_pivots": 1, "text_pivots": 1},
        {"kind": "fastv", "layer": 3, "keep_tokens": 3},
    ],
}
names = pytest.mark.parametrize("name", POINTS)


@names
@pytest.mark.parametrize("padding", ["left", "right"])
def test_all_kept_is_the_plain_model(name, padding):
    model, batch = tiny_llava("sdpa"), make_batch(ROWS, padding)
    plain = model(**batch).loss
    expected = gradients(model, plain)
    points = [
        {key: value for key, value in point.items() if key not in ("keep_tokens", "keep_ratio")} | {"stride": 1}
        for point in POINTS[name]
    ]
    attach(model, points)
    loss = model(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-5)
    assert_same_gradients(gradients(model, loss), expected)


@names
def test_rows_padding_and_attention_do_not_matter(name):
    """Each row alone, both paddings and both attention implementations give one loss and the same gradients."""
    results = []
    for attention, padding in (("eager", "right"), ("sdpa", "left"), ("sdpa", "right")):
        model = tiny_llava(attention)
        attach(model, POINTS[name])
        loss = model(**make_batch(ROWS, padding)).loss
        results.append((loss, gradients(model, loss)))
    model = tiny_llava("eager")
    attach(model, POINTS[name])
    batch, image, losses = make_batch(ROWS, "right"), 0, []
    for row in range(len(ROWS)):
        real = batch["attention_mask"][row].bool()
        one = {key: batch[key][row : row + 1, real] for key in ("input_ids", "labels", "attention_mask")}
        count = int((one["input_ids"] == IMAGE).sum()) // TOKENS
        if count:
            one["pixel_values"] = batch["pixel_values"][image : image + count]
        image += count
        losses.append(model(**one, num_items_in_batch=3 * len(ROWS)).loss)
    alone = sum(losses)
    expected = gradients(model, alone)
    for loss, found in results:
        assert float(loss.detach()) == pytest.approx(float(alone.detach()), abs=1e-5)
        assert_same_gradients(found, expected)


@names
def test_checkpointing_changes_nothing(name):
    batch, found = make_batch(ROWS, "left"), []
    for checkpointing in (False, True):
        model = tiny_llava("sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        attach(model, POINTS[name])
        loss = model(**batch).loss
        found.append((float(loss.detach()), gradients(model, loss)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert_same_gradients(found[1][1], found[0][1])


@names
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_with_a_cache_equals_recomputing(name, options):
    """The tokens that are added ask for nothing."""
    model = tiny_llava("sdpa").eval()
    batch = make_batch(ROWS, "left")
    batch.pop("labels")
    attach(model, POINTS[name])
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE], **options}
    cached = model.generate(**batch, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **options))


def test_detach_takes_generate_off_too():
    model = tiny_llava()
    attachment = attach(model, POINTS["fastv"])
    assert "generate" in model.__dict__
    attachment.detach()
    assert "generate" not in model.__dict__ and "forward" not in model.__dict__


@pytest.mark.parametrize("kind", ["fastv", "pyramid_drop", "dart", "visionzip"])
def test_more_than_there_is_is_refused(kind):
    model = tiny_llava()
    attach(model, [{"kind": kind, "layer": 1, "keep_tokens": TOKENS + 1}])
    with pytest.raises(UsageError, match=f"{kind} at layer 1: keep_tokens 10 is more than the image's 9 tokens"):
        model(**make_batch(ROWS))


@pytest.mark.parametrize("kind", ["fastv", "pyramid_drop", "dart"])
def test_nothing_is_known_before_the_first_layer(kind):
    with pytest.raises(UsageError, match=f"{kind} at layer 0"):
        attach(tiny_llava(), [{"kind": kind, "layer": 0, "keep_tokens": 4}])
