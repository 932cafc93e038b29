"""Families that resemble LLaVA, InternVL, Idefics3, Mistral 3: adapters against hand-stated units and plain loops."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_gradients, generate, gradients, reference_loss

from orchestrator.compression import attach
from orchestrator.compression.families import family_of
from orchestrator.compression.testing.families import LLAVA_PIXTRAL, TINY
from orchestrator.compression.testing.tiny import IMAGE, PAD
from orchestrator.errors import UsageError
from orchestrator.models.parts import AUDIO_TOWER, PARTS, PROJECTOR, VISION_TOWER, part_of, set_trainable

NAMES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "video_llava",
    "vipllava",
    "internvl",
    "idefics3",
    "smolvlm",
    "mistral3",
    "llava_next_video",
    "aya_vision",
    "cohere2_vision",
    "ovis2",
    "lfm2_vl",
    "video_llama_3",
)
FAMILIES = {name: TINY[name] for name in NAMES} | {"llava_pixtral": LLAVA_PIXTRAL}


@pytest.fixture(params=FAMILIES)
def tiny(request):
    return FAMILIES[request.param]


def mixed(tiny):
    """Rows of 0, 1 and 3 images of unequal size side by side, and videos among images where there are any."""
    small = "small" if "small" in tiny.units else "image"
    rows = [[3, "image", 7], [9], [2, small, "image", 2, "image", 6]]
    return [*rows, [4, "video", 2, "image", "video", 5]] if "video" in tiny.units else rows


def units_of(tiny, row):
    return [grid for part in row if isinstance(part, str) for grid in tiny.units[part]]


def pool(layer, stride):
    return [{"kind": "average_pool", "layer": layer, "stride": stride}]


def loss_and_gradients(model, batch):
    loss = model(**batch).loss
    return float(loss.detach()), gradients(model, loss)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_nothing_and_keep_all_equal_the_plain_model(tiny, padding):
    model = tiny.build("sdpa", 0)
    batch = tiny.batch(mixed(tiny), padding, 0, 3)
    plain = model(**batch)
    attachment = attach(model, [])
    for points in ([], *(pool(layer, 1) for layer in range(tiny.first_layer, tiny.layers))):
        attachment.switch(points)
        got = model(**batch, return_logits=True)
        assert abs(float(got.loss.detach() - plain.loss.detach())) < 1e-5
        real = batch["attention_mask"].bool()
        assert torch.allclose(got.logits[real], plain.logits[real], atol=2e-5)


def test_units_are_those_stated_by_hand(tiny):
    model, rows = tiny.build("sdpa", 0), mixed(tiny)
    batch = tiny.batch(rows, "left", 0, 3)
    family = family_of(model)
    placeholders = int(family.visual_BN(batch["input_ids"]).sum())
    expected = [grid for row in rows for grid in units_of(tiny, row)]
    assert family.grids(batch, placeholders) == expected
    assert family.num_visual_tokens(batch) == placeholders == sum(grid.tokens for grid in expected)


@pytest.mark.parametrize(("layer", "padding"), [(1, "right"), (2, "left")])
def test_loss_and_gradients_equal_a_plain_loop(tiny, layer, padding):
    if tiny.model_type == "lfm2_vl":
        pytest.skip(
            "the plain loop runs slices of the layers, which a hybrid decoder numbers; the contract kit has one"
        )
    rows = mixed(tiny)
    batch = tiny.batch(rows, padding, 1, 3)
    plain = tiny.build("eager", 1)
    units = [[grid.tokens for grid in units_of(tiny, row)] for row in rows]
    expected = reference_loss(plain, batch, pool(layer, 2), units=units)
    wanted = gradients(plain, expected)
    model = tiny.build("sdpa", 1)
    attach(model, pool(layer, 2))
    loss, got = loss_and_gradients(model, batch)
    assert abs(loss - float(expected.detach())) < 1e-5
    assert_same_gradients(got, wanted)


def test_eager_and_checkpointing_give_the_same(tiny):
    batch = tiny.batch(mixed(tiny), "right", 2, 3)
    results = []
    for attention, checkpointing in (("sdpa", False), ("eager", False), ("sdpa", True)):
        model = tiny.build(attention, 2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        attach(model, pool(1, 2))
        results.append(loss_and_gradients(model, batch))
    for loss, found in results[1:]:
        assert abs(loss - results[0][0]) < 1e-5
        assert_same_gradients(found, results[0][1], 1e-4)


def test_generation_with_a_cache_sees_what_forward_sees(tiny):
    """`generate` encodes images beforehand and drops their sizes; a 2-D method would notice another grid."""
    model = tiny.build("sdpa", 3).eval()
    attach(model, [{"kind": "average_pool_2d", "layer": 1, "keep_ratio": 0.5}, *pool(2, 2)])
    batch = tiny.batch(mixed(tiny), "left", 3, 0)
    del batch["labels"]
    cached, recomputed = generate(model, batch, 4), generate(model, batch, 4, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)
    for one, other in zip(cached.logits, recomputed.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    with torch.no_grad():
        last = model(**batch).logits[:, -1]
    assert torch.allclose(cached.logits[0], last, atol=1e-5)


def test_text_after_a_pooled_image_still_sees_it(tiny):
    """A gap in position ids without a mask would cut the row in two, and the loss would not know the image."""
    model = tiny.build("sdpa", 4)
    attach(model, pool(1, 4))
    batch = tiny.batch([[3, "image", 7]], "right", 4, 3)
    fresh = tiny.batch([[3, "image", 7]], "right", 5, 3)
    other = batch | {name: value for name, value in fresh.items() if name.startswith("pixel_values")}
    assert abs(float(model(**batch).loss.detach() - model(**other).loss.detach())) > 1e-4


def test_text_alone_and_a_rank_without_images(tiny):
    model = tiny.build("sdpa", 5)
    text = tiny.batch([[5], [8]], "right", 5, 3)
    assert not any(name.startswith("pixel_values") for name in text)
    plain = model(**text).loss
    attachment = attach(model, pool(1, 2))
    assert abs(float(model(**text).loss.detach() - plain.detach())) < 1e-5
    assert attachment.last_visual_layer_tokens == 0
    images = tiny.batch([[3, "image", 7]], "right", 5, 3)
    with_images = {
        name for name in gradients(model, model(**images).loss) if part_of(name) in (VISION_TOWER, PROJECTOR)
    }
    idle = gradients(model, model(**text).loss + family_of(model).idle_features().sum())
    assert with_images
    assert with_images <= set(idle)


def test_detach_takes_out_what_families_put_in(tiny):
    model = tiny.build("sdpa", 6)
    before = sorted(model.model.__dict__)
    attach(model, pool(1, 2)).detach()
    assert sorted(model.model.__dict__) == before


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_parameter_has_a_part(name):
    model = TINY[name].build(TINY[name].attentions[-1], 0)
    found = {part_of(parameter) for parameter, _ in model.named_parameters()}
    assert found - {AUDIO_TOWER} == {VISION_TOWER, PROJECTOR, "language_model"}
    set_trainable(model, PARTS, lora=False)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "audio" in name)


def test_one_of_several_images_is_one_tile_in_onevision():
    """The processor counts each row's images: a row's only image is tiled, others are a tile and a newline."""
    tiny = FAMILIES["llava_onevision"]
    batch = tiny.batch([[3, "image", 7], [2, "small", 4, "small", 5]], "right", 0, 3)
    single = [IMAGE] * 10
    rows = [
        [*batch["input_ids"][0].tolist()[: 3 + 27], *[5] * 7],
        [*[4] * 2, *single, *[4] * 4, *single, *[5] * 5, *[PAD] * 6],
    ]
    ids = torch.tensor(rows)
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": ids.masked_fill(ids != 5, -100),
        "pixel_values": batch["pixel_values"],
        "image_sizes": batch["image_sizes"],
        "batch_num_images": torch.tensor([1, 2]),
    }
    units = [[9, 18], [9, 1, 9, 1]]
    plain = tiny.build("sdpa", 0)
    expected = float(reference_loss(tiny.build("eager", 0), inputs, pool(1, 2), units=units).detach())
    attach(plain, pool(1, 2))
    assert abs(float(plain(**inputs).loss.detach()) - expected) < 1e-5
    prompt = {name: value for name, value in inputs.items() if name != "labels"} | {"input_ids": ids[:, :-6]}
    prompt["attention_mask"] = prompt["attention_mask"][:, :-6]
    logits = plain.generate(
        **prompt, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=PAD
    ).logits[0]
    with torch.no_grad():
        assert torch.allclose(logits, plain(**prompt).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "mistral3", "llava_pixtral"])
def test_features_without_sizes_are_refused(name):
    tiny = FAMILIES[name]
    model = tiny.build("sdpa", 0).eval()
    batch = tiny.batch([[3, "small", 7]], "right", 0, 0)
    encoded = model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"], return_dict=True)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    attach(model, pool(1, 2))
    with pytest.raises(UsageError, match="pass image_sizes"):
        model(**inputs, mm_encoder_outputs={"image": encoded})
    again = model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"], return_dict=True)
    with torch.no_grad():
        wanted = model(**inputs, pixel_values=batch["pixel_values"], image_sizes=batch["image_sizes"]).logits
        got = model(**inputs, mm_encoder_outputs={"image": again}).logits
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_beams_of_tiled_images_equal_beams_that_recompute():
    tiny = FAMILIES["llava_next"]
    model = tiny.build("sdpa", 3).eval()
    attach(model, pool(1, 2))
    batch = tiny.batch([[3, "small", "image", 7], [9]], "left", 3, 0)
    one, other = (generate(model, batch, 3, num_beams=2, use_cache=cache) for cache in (True, False))
    assert torch.equal(one.sequences, other.sequences)
