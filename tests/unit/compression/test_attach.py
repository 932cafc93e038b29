"""attach, switch, detach: no trace, clear errors, and the same values through peft and DeepSpeed."""

from __future__ import annotations

import pytest
import torch
from orchestrator_plugins.compressors.average_pool import AveragePoolSpec
from peft import LoraConfig, get_peft_model
from reference import assert_same_gradients, gradients, make_batch, reference_loss, tiny_llava
from torch import nn

from orchestrator.compression import Kept, attach, take
from orchestrator.compression.testing import check_compressor
from orchestrator.errors import LlavoltaError, UsageError
from orchestrator.spec.components import CompressorSpec

MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5]]
HEAVY = [{"kind": "average_pool", "layer": 1, "stride": 4}]


def trace(model):
    """All that an attachment could leave behind."""
    return {
        name: (
            sorted(module.__dict__),
            sorted(module._modules),
            [len(module.__dict__[key]) for key in sorted(module.__dict__) if key.endswith("_hooks")],
            module.training,
        )
        for name, module in model.named_modules()
    } | {"config": model.config.to_json_string(), "state": sorted(model.state_dict())}


def test_detach_leaves_no_trace():
    model, batch = tiny_llava("sdpa").train(), make_batch(MIXED)
    expected = float(model(**batch).loss.detach())  # the plain model's first forward installs hooks of its own
    before = trace(model)
    attachment = attach(model, HEAVY)
    model(**batch).loss.backward()
    attachment.switch([{"kind": "average_pool", "layer": "50%", "keep_tokens": 3}])
    model(**batch)
    with pytest.raises(RuntimeError):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:, :1], labels=batch["labels"])
    attachment.detach()
    attachment.detach()
    assert trace(model) == before
    assert float(model(**batch).loss.detach()) == expected
    attach(model, HEAVY).detach()


def test_switch_equals_a_fresh_attachment():
    batch = make_batch(MIXED)
    model = tiny_llava("sdpa")
    attachment = attach(model, [])
    for points in (HEAVY, [{"kind": "average_pool", "layer": 2, "stride": 2}], [], HEAVY):
        attachment.switch(points)
        fresh = tiny_llava("sdpa")
        attach(fresh, points)
        assert torch.equal(model(**batch).loss, fresh(**batch).loss)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_without_compressor_the_numbers_are_the_plain_models(padding):
    batch = make_batch(MIXED, padding)
    plain, model = tiny_llava("sdpa").train(), tiny_llava("sdpa").train()
    attach(model, [])
    expected, output = plain(**batch), model(**batch)
    assert output.logits is None
    assert float(output.loss.detach()) == pytest.approx(float(expected.loss.detach()), abs=1e-5)
    assert_same_gradients(gradients(model, output.loss), gradients(plain, expected.loss), 1e-6)
    assert torch.equal(model(**batch, return_logits=True).logits, plain(**batch).logits)
    batch.pop("labels")
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_specs_and_mappings_shares_and_numbers():
    model = tiny_llava()
    attachment = attach(
        model, [AveragePoolSpec(layer="75%", stride=2), {"kind": "average_pool", "layer": 1, "stride": 2}]
    )
    assert [point.layer for point in attachment.points] == [1, 3]


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([{"kind": "average_pool", "layer": 4, "stride": 2}], "layers 0 to 3"),
        ([{"kind": "average_pool", "layer": -1, "stride": 2}], "counted from 0"),
        ([{"kind": "average_pool", "layer": 1}], "exactly one of stride"),
        ([{"kind": "average_pool", "layer": 1, "stride": 0}], "stride"),
        ([{"kind": "average_pol", "layer": 1, "stride": 2}], "average_pool"),
        ([{"kind": "average_pool", "layer": 1, "layer_average_tokens": 4}], "planner"),
        ({"kind": "average_pool", "layer": 1, "stride": 2}, "list"),
    ],
)
def test_points_that_do_not_fit(points, told):
    model = tiny_llava()
    before = trace(model)
    with pytest.raises(LlavoltaError, match=told):
        attach(model, points)
    assert trace(model) == before


def test_more_tokens_than_the_image_has():
    model = tiny_llava()
    attach(model, [{"kind": "average_pool", "layer": 1, "keep_tokens": 10}])
    with pytest.raises(UsageError, match="keep_tokens 10"):
        model(**make_batch(MIXED))


def test_attached_twice():
    model = tiny_llava()
    attachment = attach(model, HEAVY)
    with pytest.raises(UsageError, match="attached already"):
        attach(model, HEAVY)
    attachment.detach()
    with pytest.raises(UsageError, match="detached"):
        attachment.switch([])


def test_models_that_cannot_be_served():
    with pytest.raises(UsageError, match="LlamaModel cannot be served: its config has no image_token_id"):
        attach(tiny_llava().model.language_model, HEAVY)
    model = tiny_llava()
    model.model.language_model.rotary_emb = None
    del model.model.language_model._modules["rotary_emb"]
    with pytest.raises(UsageError, match="rotary_emb"):
        attach(model, HEAVY)
    patched = tiny_llava()
    patched.forward = patched.forward
    with pytest.raises(UsageError, match="replaced by something else"):
        attach(patched, HEAVY)


def test_placeholders_that_do_not_match_the_images():
    model = tiny_llava()
    attach(model, HEAVY)
    batch = make_batch(MIXED)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises((UsageError, ValueError, RuntimeError), match=r"match|placeholders"):
        model(**batch)


def test_packed_rows_are_refused():
    model = tiny_llava()
    attach(model, HEAVY)
    batch = make_batch([[3, "image", 7]])
    del batch["attention_mask"]
    with pytest.raises(UsageError, match="packed"):
        model(**batch, position_ids=(torch.arange(19) % 10).unsqueeze(0))


def test_loss_is_divided_by_the_number_given():
    batch = make_batch(MIXED)
    model = tiny_llava("sdpa")
    attachment = attach(model, HEAVY)
    for points in (HEAVY, []):
        attachment.switch(points)
        mean = model(**batch).loss
        for number in (18, torch.tensor(18), torch.tensor(18.0)):
            assert torch.allclose(model(**batch, num_items_in_batch=number).loss, mean / 2)


def test_micro_batches_add_up_to_the_batch():
    rows = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5], [4, "image", 6]]
    model = tiny_llava("sdpa")
    attach(model, HEAVY)
    whole = gradients(model, model(**make_batch(rows), num_items_in_batch=12).loss)
    batch, images, total = make_batch(rows), [1, 0, 3, 1], 0.0
    pixels = iter(batch["pixel_values"].split([n for n in images if n]))
    for r, n in enumerate(images):
        part = {name: batch[name][r : r + 1] for name in ("input_ids", "attention_mask", "labels")}
        if n:
            part["pixel_values"] = next(pixels)
        total = total + model(**part, num_items_in_batch=12).loss
    assert_same_gradients(gradients(model, total), whole)


@pytest.mark.parametrize("points", [HEAVY, []])
@pytest.mark.parametrize("rows", [MIXED, [[4], [6]]])
def test_a_batch_without_labels_gives_zero_with_a_graph(points, rows):
    model = tiny_llava("sdpa")
    attach(model, points)
    loss = model(**make_batch(rows, answer=0)).loss
    assert float(loss.detach()) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in gradients(model, loss).values())


def test_labels_at_visual_places_are_ignored():
    batch = make_batch(MIXED)
    model = tiny_llava("sdpa")
    attach(model, HEAVY)
    expected = model(**batch).loss
    visual = batch["input_ids"] == 63
    assert torch.equal(model(**batch | {"labels": batch["labels"].masked_fill(visual, 5)}).loss, expected)


def test_tuples_and_positional_arguments():
    batch = make_batch(MIXED)
    model = tiny_llava("sdpa")
    attach(model, HEAVY)
    named = model(**batch).loss
    loss, *_ = model(
        batch["input_ids"], batch["pixel_values"], batch["attention_mask"], labels=batch["labels"], return_dict=False
    )
    assert torch.equal(loss, named)


@pytest.mark.parametrize("attach_first", [True, False])
def test_through_peft(attach_first):
    batch = make_batch(MIXED)
    model = tiny_llava("sdpa")
    lora = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", init_lora_weights=False)
    torch.manual_seed(3)
    if attach_first:
        attach(model, HEAVY)
        wrapped = get_peft_model(model, lora)
    else:
        wrapped = get_peft_model(model, lora)
        attachment = attach(wrapped, HEAVY)
        assert attachment.model is model
    expected = reference_loss(model, batch, HEAVY)
    loss = wrapped(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    got = gradients(wrapped, loss)
    assert_same_gradients(got, gradients(wrapped, expected))
    assert all("lora" in name for name in got)


class HalfSpec(CompressorSpec):
    learns = True
    implementation = f"{__name__}:Half"
    kind: str = "half"

    def kept_tokens(self, grid):
        return grid.tokens


class Half:
    """A learned method: scales every visual token."""

    def __init__(self, spec):
        self.spec = spec

    def create_module(self, width):
        torch.manual_seed(0)
        return nn.Linear(width, width)

    def compress(self, visual_BND, grid, context):
        return Kept(context.module(visual_BND), context.positions_ABN, context.sizes_BN, grid=grid)


class MoreThanSaidSpec(CompressorSpec):
    implementation = f"{__name__}:MoreThanSaid"
    kind: str = "more_than_said"


class MoreThanSaid:
    def __init__(self, spec):
        self.spec = spec

    def compress(self, visual_BND, grid, context):
        index_BM = torch.arange(self.spec.kept_tokens(grid) + 1).expand(len(visual_BND), -1)
        return take(visual_BND, index_BM, context)


def test_a_method_that_keeps_more_than_planned_is_refused():
    model = tiny_llava()
    attach(model, [MoreThanSaidSpec(layer=1, keep_tokens=3)])
    with pytest.raises(UsageError, match=r"more_than_said at .* returned 4 tokens .* kept_tokens says 3"):
        model(**make_batch(MIXED))


class PlainTensor(MoreThanSaid):
    def compress(self, visual_BND, grid, context):
        return visual_BND[:, : self.spec.kept_tokens(grid)]


class PlainTensorSpec(MoreThanSaidSpec):
    implementation = f"{__name__}:PlainTensor"
    kind: str = "plain_tensor"


@pytest.mark.parametrize("use", [lambda point: attached_run(point), lambda point: check_compressor(point, ["llava"])])
def test_a_method_that_returns_a_plain_tensor_is_told_what_to_return(use):
    with pytest.raises((UsageError, AssertionError), match=r"compress\(\) returned a Tensor; .* plugin\.take\("):
        use(PlainTensorSpec(layer=1, keep_tokens=3))


def attached_run(point):
    model = tiny_llava()
    attach(model, [point])
    model(**make_batch(MIXED))


def test_learned_modules_are_named_trained_and_taken_out():
    batch = make_batch(MIXED)
    model = tiny_llava()
    model(**batch)
    before = trace(model)
    attachment = attach(model, [], modules=[HalfSpec(layer=2, stride=1)])
    names = [name for name, _ in model.named_parameters() if "llavolta" in name]
    (name,) = attachment.learned_modules
    assert name.startswith("half_layer2_")
    assert names == [f"llavolta_compressors.{name}.weight", f"llavolta_compressors.{name}.bias"]
    attachment.switch([HalfSpec(layer=2, stride=1)])
    got = gradients(model, model(**batch).loss)
    assert float(got[names[0]].abs().max()) > 0
    with pytest.raises(UsageError, match="modules="):
        attachment.switch([HalfSpec(layer=1, stride=1)])
    attachment.detach()
    assert trace(model) == before
