"""Loss and gradients under average_pool equal the plain computation, in every setting that may not matter."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import assert_same_gradients, gradients, make_batch, reference_loss, reference_rows, tiny_llava

from orchestrator.compression import attach

MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5], [1, "image", "image", 4]]


def pooled(layer, **amount):
    return {"kind": "average_pool", "layer": layer, **amount}


def check(points, batch, attention="sdpa", checkpointing=False, tolerance=1e-5, **model_options):
    plain = tiny_llava("eager", **model_options).train()
    expected_loss = reference_loss(plain, batch, points)
    expected = gradients(plain, expected_loss)
    model = tiny_llava(attention, **model_options).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    attach(model, points)
    output = model(**batch)
    assert output.logits is None
    assert float(output.loss.detach()) == pytest.approx(float(expected_loss.detach()), abs=tolerance)
    assert_same_gradients(gradients(model, output.loss), expected, tolerance)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_loss_and_gradients_equal_the_plain_computation(layer, stride, padding):
    check([pooled(layer, stride=stride)], make_batch(MIXED, padding))


@pytest.mark.parametrize("amount", [{"stride": 1}, {"stride": 100}, {"keep_tokens": 4}, {"keep_tokens": 1}])
@pytest.mark.parametrize("layer", [0, 2])
def test_amounts(layer, amount):
    check([pooled(layer, **amount)], make_batch(MIXED))


@pytest.mark.parametrize("positions", ["mean", "first", "renumber"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_position_ids_of_pooled_tokens(positions, padding):
    check([pooled(1, stride=4, positions=positions)], make_batch(MIXED, padding))


@pytest.mark.parametrize(
    "points",
    [
        [pooled(0, stride=2), pooled(2, stride=2)],
        [pooled(3, stride=3), pooled(1, stride=2)],
        [pooled(1, stride=2), pooled(1, stride=2, positions="first")],
        [pooled(0, keep_tokens=7), pooled(1, keep_tokens=4, positions="renumber"), pooled(3, keep_tokens=2)],
    ],
)
def test_several_points_act_on_what_the_one_before_left(points):
    ordered = sorted(points, key=lambda point: point["layer"])
    batch = make_batch(MIXED, "left")
    plain, model = tiny_llava(), tiny_llava()
    attach(model, points)
    expected = reference_loss(plain, batch, ordered)
    assert float(model(**batch).loss) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_attention_and_checkpointing_do_not_matter(attention, checkpointing, padding):
    check([pooled(2, stride=2)], make_batch(MIXED, padding), attention, checkpointing)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("qwen2", {}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"layer_types": ["full_attention", "full_attention", "full_attention", "full_attention"]}),
    ],
)
def test_any_decoder_that_is_a_list_of_layers(text, options):
    check([pooled(0, stride=2), pooled(2, stride=2)], make_batch(MIXED), text=text, **options)


@pytest.mark.parametrize(
    "rows",
    [[["image", 5]], [[4, "image", 5], [4, "image", 5]], [[6], [8]], [["image", "image", "image", 6], [3]]],
    ids=["one image first", "equal rows", "text only", "three images and text"],
)
def test_batches(rows):
    check([pooled(1, stride=2)], make_batch(rows))


def test_an_image_may_end_a_row():
    batch = make_batch([[4, "image"], [5, "image", 3]], answer=0)
    batch["labels"][:, 1:4] = batch["input_ids"][:, 1:4]
    check([pooled(1, stride=2)], batch)


def test_given_position_ids_are_used():
    batch = make_batch(MIXED, "left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) * 2
    check([pooled(1, stride=2)], batch)


@pytest.mark.slow  # the kernel is compiled for half a minute
def test_flex_attention_agrees():
    batch = make_batch([[3, "image", 7], [9]])
    eager, flex = tiny_llava("eager"), tiny_llava("flex_attention")
    for model in (eager, flex):
        attach(model.eval(), [pooled(1, stride=2)])
    with torch.no_grad():
        try:
            got = flex(**batch).loss
        except (RuntimeError, NotImplementedError, torch._dynamo.exc.BackendCompilerFailed) as error:
            pytest.skip(f"flex attention does not run on this machine: {type(error).__name__}")
        assert float(got) == pytest.approx(float(eager(**batch).loss), abs=1e-5)


def test_a_gap_in_position_ids_does_not_cut_image_from_text():
    """Without an explicit mask transformers 5 reads the gap as the start of another packed sequence."""
    batch = make_batch([[3, "image", 7]])
    del batch["attention_mask"]
    model = tiny_llava("sdpa")
    attach(model, [pooled(1, stride=4)])
    loss = model(**batch).loss
    other = dict(batch, pixel_values=batch["pixel_values"] + 1.0)
    assert abs(float(model(**other).loss - loss)) > 1e-3, "the answer does not see the image"
    expected = reference_loss(
        tiny_llava(), batch | {"attention_mask": torch.ones_like(batch["input_ids"])}, [pooled(1, stride=4)]
    )
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_keeping_all_equals_the_plain_model():
    batch = make_batch(MIXED)
    plain, model = tiny_llava("sdpa").train(), tiny_llava("sdpa").train()
    attach(model, [pooled(2, stride=1)])
    expected = plain(**batch).loss
    output = model(**batch, return_logits=True)
    assert float(output.loss) == pytest.approx(float(expected), abs=1e-5)
    assert_same_gradients(gradients(model, output.loss), gradients(plain, expected), 1e-6)
    real = batch["attention_mask"].bool()
    assert torch.allclose(output.logits[real], plain(**batch).logits[real], atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_at_original_length_are_nan_where_a_token_was_dropped(padding):
    batch = make_batch(MIXED, padding)
    points = [pooled(0, stride=2), pooled(2, stride=2)]
    model = tiny_llava("sdpa")
    attach(model, points)
    with_labels = model(**batch, return_logits=True).logits
    labels = batch.pop("labels")
    without = model(**batch).logits
    last = model(**batch, logits_to_keep=4).logits
    assert with_labels.shape[:2] == labels.shape
    expected = torch.full_like(without, float("nan"))
    for r, (tokens, logits) in enumerate(reference_rows(tiny_llava(), batch, points)):
        expected[r, [token.column for token in tokens]] = logits
    for got in (with_labels, without):
        assert torch.allclose(got, expected, atol=1e-4, equal_nan=True)
    assert torch.allclose(last, expected[:, -4:], atol=1e-4, equal_nan=True)


def test_counts_of_visual_tokens_are_what_ran():
    batch = make_batch(MIXED)
    model = tiny_llava()
    attachment = attach(model, [pooled(1, stride=2), pooled(3, stride=5)])
    model(**batch)
    assert attachment.visual_tokens_per_layer == (6 * 9, 6 * 5, 6 * 5, 6 * 1)
    attachment.switch([])
    model(**batch)
    assert attachment.visual_tokens_per_layer == (54,) * 4
    model(**make_batch([[5], [4]]))
    assert attachment.last_visual_layer_tokens == 0


def test_hidden_states_of_all_layers_are_recorded_once():
    batch = make_batch(MIXED)
    model = tiny_llava()
    attach(model, [pooled(2, stride=3)])
    for _ in range(2):
        states = model(**batch, output_hidden_states=True).hidden_states
        lengths = [state.shape[1] for state in states]
        assert lengths == [36, 36, 18, 18, 18]


def test_rows_do_not_touch_each_other():
    rows = [[3, "image", 7], [12], [2, "image", 2, "image", "image", 5]]
    points = [pooled(1, stride=2)]
    model = tiny_llava("sdpa")
    attach(model, points)
    together = make_batch(rows)
    full = model(**together, return_logits=True).logits
    start = 0
    for r, row in enumerate(rows):
        images = row.count("image")
        real = together["attention_mask"][r].bool()
        alone = {"input_ids": together["input_ids"][r : r + 1, real]}
        if images:
            alone["pixel_values"] = together["pixel_values"][start : start + images]
        start += images
        assert torch.allclose(model(**alone).logits[0], full[r, real], atol=1e-4, equal_nan=True)


def test_sliding_window_layers_keep_their_type_in_a_segment():
    """Per-layer types move with the slice; on naive slices layer 2 would take layer 0's type."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    options = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": kinds}
    batch = make_batch([[3, "image", 7], [12]])
    plain, model = tiny_llava(text="qwen2", **options), tiny_llava(text="qwen2", **options)
    attach(model, [pooled(layer, stride=1) for layer in (1, 2, 3)])
    assert float(model(**batch).loss) == pytest.approx(float(plain(**batch).loss), abs=1e-5)


def test_random_settings_against_the_plain_computation():
    generator = torch.Generator().manual_seed(5)

    def draw(n):
        return int(torch.randint(1, n, (1,), generator=generator))

    for case, padding in itertools.product(range(6), ("left", "right")):
        rows = [[draw(5), *["image"] * (draw(4) - 1), draw(6) + 3] for _ in range(3)]
        points = sorted((pooled(draw(5) - 1, stride=draw(6)) for _ in range(2)), key=lambda point: point["layer"])
        batch = make_batch(rows, padding, seed=case)
        model = tiny_llava("sdpa", seed=case)
        expected = float(reference_loss(tiny_llava(seed=case), batch, points))
        attach(model, points)
        assert float(model(**batch).loss) == pytest.approx(expected, abs=1e-5), (rows, points)
