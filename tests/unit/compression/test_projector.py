"""Points at the projector: features pooled, projected and spliced into the rows by hand, then the plain decoder."""

from __future__ import annotations

import pytest
import torch
from reference import IMAGE, assert_same_gradients, gradients, make_batch, tiny_llava, windows_of

from orchestrator.compression import attach
from orchestrator.errors import UsageError

MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5]]


def point(kind, **amount):
    return {"kind": kind, "layer": "projector", **amount}


def features_of(model, pixels):
    """What enters the projector: the second-last layer's patches, without CLS."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def plain_loss(model, batch, setting):
    """Each row alone through the unmodified decoder, with the ids the documentation states."""
    features = iter(features_of(model, batch["pixel_values"]))
    embed, decoder = model.get_input_embeddings(), model.model.language_model
    losses = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        hidden, positions, targets, column = [], [], [], 0
        while column < len(ids):
            if not mask[column]:
                column += 1
                continue
            if ids[column] != IMAGE:
                hidden.append(embed(ids[column]))
                positions.append(column)
                targets.append(int(labels[column]))
                column += 1
                continue
            feature = next(features)
            for window in windows_of(9, setting):
                members = window[:1] if setting["kind"] == "stride" else window
                hidden.append(model.model.multi_modal_projector(feature[members].mean(0)))
                positions.append(column + sum(members) // len(members))
                targets.append(-100)
            column += 9
        out = decoder(
            inputs_embeds=torch.stack(hidden)[None],
            position_ids=torch.tensor([positions]),
            attention_mask=torch.ones(1, len(hidden), dtype=torch.bool),
        )
        logits = model.lm_head(out.last_hidden_state[0])
        losses += [
            torch.nn.functional.cross_entropy(logits[n], torch.tensor(target))
            for n, target in enumerate(targets[1:])
            if target != -100
        ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("setting", [point("average_pool", stride=4), point("stride", keep_tokens=2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_plain_computation(padding, setting, checkpointing):
    batch = make_batch(MIXED, padding)
    plain, model = tiny_llava("sdpa").train(), tiny_llava("sdpa").train()
    attachment = attach(model, [setting])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, loss = plain_loss(plain, batch, setting), model(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_same_gradients(gradients(model, loss), gradients(plain, expected))
    kept = len(windows_of(9, setting))
    assert attachment.visual_tokens_per_layer == (4 * kept,) * 4


@pytest.mark.parametrize("kind", ["average_pool", "stride", "random_drop", "downsample"])
def test_keeping_all_is_the_plain_model(kind):
    batch = make_batch(MIXED, "left")
    plain, model = tiny_llava("sdpa"), tiny_llava("sdpa")
    attach(model, [point(kind, keep_ratio=1)])
    expected, loss = plain(**batch).loss, model(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_same_gradients(gradients(model, loss), gradients(plain, expected), 1e-6)


def test_several_points_act_one_after_the_other():
    """4 windows, then 2 of them; in the decoder 1."""
    batch = make_batch(MIXED)
    model = tiny_llava("sdpa")
    attachment = attach(
        model,
        [
            {"kind": "average_pool", "layer": 2, "keep_tokens": 1},
            point("stride", keep_tokens=4),
            point("average_pool", keep_tokens=2),
        ],
    )
    both = float(model(**batch).loss.detach())
    assert attachment.visual_tokens_per_layer == (8, 8, 4, 4)
    attachment.switch([point("average_pool", keep_tokens=2), {"kind": "average_pool", "layer": 2, "keep_tokens": 1}])
    assert abs(float(model(**batch).loss.detach()) - both) > 1e-4


def test_random_drop_knows_rows_and_samples():
    """At the projector it drops what it drops at the decoder's input; a tokenwise projector makes both equal."""
    batch = make_batch(MIXED)
    losses = []
    for layer in ("projector", 0):
        model = tiny_llava("sdpa")
        attachment = attach(model, [{"kind": "random_drop", "layer": layer, "keep_tokens": 3}])
        attachment.set_step(step=4, seed=1, sample_index=[17, 3, 8])
        losses.append(float(model(**batch).loss.detach()))
        attachment.set_step(step=5, seed=1, sample_index=[17, 3, 8])
        assert abs(float(model(**batch).loss.detach()) - losses[-1]) > 1e-5
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("setting", [point("average_pool", stride=4), point("downsample", keep_tokens=4)])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_cached_generation_equals_recomputing_everything(setting, options):
    batch = make_batch(MIXED, "left", answer=0)
    del batch["labels"]
    model = tiny_llava("sdpa").eval()
    attach(model, [setting])
    common = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE], **options}
    cached, recomputed = (model.generate(**batch, **common, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, recomputed)


def test_beams_of_rows_with_several_images_see_their_own():
    """A batch's rows give what each gives alone."""
    model = tiny_llava("sdpa").eval()
    attach(model, [point("average_pool", stride=4)])
    common = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE], "num_beams": 2}
    batch = make_batch([[3, "image", 2, "image", 4], [2, "image", 3, "image", 4]], answer=0)
    together = model.generate(**{k: v for k, v in batch.items() if k != "labels"}, **common)
    for row, mask in enumerate(batch["attention_mask"]):
        ids = batch["input_ids"][row : row + 1][:, mask.bool()]
        pixels = batch["pixel_values"][2 * row : 2 * row + 2]
        alone = model.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **common)
        assert torch.equal(alone[0, -4:], together[row, -4:])


def test_a_text_only_batch_is_the_plain_models():
    batch = make_batch([[9], [6]])
    model = tiny_llava("sdpa")
    attach(model, [point("average_pool", stride=4)])
    assert float(model(**batch).loss.detach()) == pytest.approx(
        float(tiny_llava("sdpa")(**batch).loss.detach()), abs=1e-5
    )


def test_no_hooks_stay_and_features_alone_are_the_plain_models():
    batch = make_batch(MIXED)
    model = tiny_llava("sdpa")
    expected = model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    attach(model, [point("average_pool", stride=4)])
    model(**batch)
    projector = model.model.multi_modal_projector
    assert not projector._forward_hooks and not projector._forward_pre_hooks
    got = model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_ready_features_are_refused():
    batch = make_batch(MIXED)
    model = tiny_llava("sdpa")
    attach(model, [point("average_pool", stride=4)])
    pixels = batch.pop("pixel_values")
    ready = {"image": model.model.get_image_features(pixel_values=pixels)}
    with pytest.raises(UsageError, match="pixel_values"):
        model(**batch, mm_encoder_outputs=ready)


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([point("fastv", keep_tokens=2)], "projector"),
        ([{"kind": "downsample", "layer": 1, "keep_tokens": 4}], "layer: projector"),
        ([point("downsample", keep_tokens=4), point("downsample", keep_tokens=1)], "one point"),
    ],
)
def test_points_that_do_not_fit(points, told):
    with pytest.raises(UsageError, match=told):
        attach(tiny_llava(), points)
