"""Learned methods: names and seeds, gradients of a plain reference, rows without images, no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from orchestrator_plugins.compressors.q_former import QFormerSpec
from reference import assert_same_gradients, gradients, make_batch, tiny_llava

from orchestrator.compression import attach
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid

MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5]]
QUERIES = {"kind": "q_former", "layer": 2, "keep_tokens": 3, "heads": 2, "depth": 1}
FEATURES = {"kind": "c_abstractor", "layer": "projector", "keep_tokens": 4, "depth": 1}
REGISTERS = {"kind": "registers", "layer": 2, "keep_tokens": 2}
CLUSTERS = {"kind": "divt", "layer": "projector", "keep_ratio": "3/4", "threshold": 0.5}
GROUPS = {"kind": "token_grouping", "layer": "projector", "keep_tokens": 4, "noise": False}


def parameters(attachment):
    return {
        f"{name}.{inner}": value.detach().clone()
        for name, module in attachment.learned_modules.items()
        for inner, value in module.named_parameters()
    }


def stirred(attachment):
    """Modules moved from their first values, of which some are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in attachment.learned_modules.values():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_parameters_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = parameters(attach(tiny_llava(seed=0), [QUERIES, FEATURES], seed=3))
    tiny_llava(seed=0)
    assert not torch.equal(torch.get_rng_state(), state), "the models of this test draw, or it proves nothing"
    torch.manual_seed(99)
    state = torch.get_rng_state()
    model = tiny_llava(seed=0)
    state = torch.get_rng_state()
    again = parameters(attach(model, [], modules=[FEATURES, REGISTERS, QUERIES], seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() <= again.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    other = parameters(attach(tiny_llava(seed=0), [QUERIES, FEATURES], seed=4))
    assert any(not torch.equal(other[name], value) for name, value in first.items())


def test_names_follow_place_and_shape():
    spec = QFormerSpec(**{**QUERIES, "kind": "q_former"})
    name = spec.module_name(4)
    assert name.startswith("q_former_layer2_") and len(name) == len("q_former_layer2_") + 8
    attachment = attach(tiny_llava(), [QUERIES])
    assert attachment.learned_names() == (name,) == tuple(attachment.learned_modules)
    assert spec.model_copy(update={"layer": "50%"}).module_name(4) == name
    assert spec.model_copy(update={"keep_tokens": 4}).module_name(4) != name
    assert spec.model_copy(update={"depth": 2}).module_name(4) != name
    elastic = [spec.model_copy(update={"max_queries": 8, "keep_tokens": n}).module_name(4) for n in (2, 5)]
    assert elastic[0] == elastic[1]
    assert spec.model_copy(update={"layer": "projector"}).module_name(4).startswith("q_former_projector_")
    assert attachment.learned_names([{"kind": "stride", "layer": 1, "stride": 2}]) == ()


def test_width_and_dtype_are_those_of_the_place():
    model = tiny_llava(hidden_size=48).to(torch.bfloat16)
    attachment = attach(model, [QUERIES, FEATURES])
    features, queries = (attachment.learned_modules[name] for name in attachment.learned_names())
    assert next(features.parameters()).shape == (32,)
    assert queries.leave.out_features == 48
    assert {p.dtype for p in (*features.parameters(), *queries.parameters())} == {torch.bfloat16}
    assert torch.isfinite(model(**make_batch(MIXED)).loss)


def run_row(model, hidden, positions, first, last):
    """Layers `first` to `last` on one row."""
    decoder = model.model.language_model
    for layer in decoder.layers[first:last]:
        n = hidden.shape[1]
        mask = torch.zeros(1, 1, n, n).masked_fill(~torch.ones(n, n).tril().bool(), torch.finfo(torch.float32).min)
        rotary = decoder.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
    return hidden


def loss_of(model, hidden, labels):
    logits = model.lm_head(model.model.language_model.norm(hidden))[0]
    return torch.nn.functional.cross_entropy(logits[-4:-1], labels[0, -3:])


def one_row():
    batch = make_batch([[3, "image", 7]])
    model = tiny_llava()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    visual = model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output[0]
    return batch, model, torch.cat([embeds[:, :3], visual[None], embeds[:, 12:]], 1)


def check(points, batch, reference, module, loss):
    """The attached model's loss and gradients, the module's included, are the reference's."""
    model = tiny_llava("sdpa")
    attachment = attach(model, points)
    stirred(attachment)
    got_loss = model(**batch).loss
    assert float(got_loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-5)
    wanted = gradients(reference, loss)
    (name,) = attachment.learned_modules
    wanted |= {f"llavolta_compressors.{name}.{inner}": p.grad for inner, p in module.named_parameters()}
    learned = [key for key in wanted if "llavolta" in key]
    assert all(float(wanted[key].abs().max()) > 0 for key in learned if not key.endswith("bias"))
    assert_same_gradients(gradients(model, got_loss), wanted)


def module_like(points):
    attachment = attach(tiny_llava(), points)
    stirred(attachment)
    (module,) = attachment.learned_modules.values()
    return copy.deepcopy(module)


def test_queries_in_the_decoder_learn_like_a_plain_model():
    batch, plain, hidden = one_row()
    module = module_like([QUERIES])
    hidden = run_row(plain, hidden, torch.arange(19)[None], 0, 2)
    hidden = torch.cat([hidden[:, :3], module(hidden[:, 3:12], Grid(3, 3), 3), hidden[:, 12:]], 1)
    positions = torch.tensor([[0, 1, 2, 3, 6, 9, *range(12, 19)]])
    hidden = run_row(plain, hidden, positions, 2, 4)
    check([QUERIES], batch, plain, module, loss_of(plain, hidden, batch["labels"]))


def test_registers_learn_like_a_plain_model():
    batch, plain, hidden = one_row()
    module = module_like([REGISTERS])
    hidden = torch.cat([hidden[:, :12], module(1), hidden[:, 12:]], 1)
    positions = torch.arange(21)[None]
    hidden = run_row(plain, hidden, positions, 0, 2)
    hidden, positions = (torch.cat([x[:, :3], x[:, 12:]], 1) for x in (hidden, positions))
    hidden = run_row(plain, hidden, positions, 2, 4)
    check([REGISTERS], batch, plain, module, loss_of(plain, hidden, batch["labels"]))


@pytest.mark.parametrize("point", [QUERIES, FEATURES, REGISTERS, CLUSTERS, GROUPS])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_alone_and_together_are_the_same(point, padding):
    model = tiny_llava("sdpa")
    stirred(attach(model, [point]))
    batch = make_batch(MIXED, padding)
    together = float(model(**batch, num_items_in_batch=1).loss.detach())
    pixels, alone = batch["pixel_values"].split([1, 3]), 0.0
    for row in range(3):
        mask = batch["attention_mask"][row].bool()
        part = {name: batch[name][row : row + 1][:, mask] for name in ("input_ids", "attention_mask", "labels")}
        if padding == "left" and not mask[0]:  # the plain model numbers padded columns too
            part["position_ids"] = torch.arange(len(mask))[None][:, mask]
        if row != 1:
            part["pixel_values"] = pixels[row // 2]
        alone += float(model(**part, num_items_in_batch=1).loss.detach())
    assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("point", [QUERIES, FEATURES, REGISTERS, CLUSTERS, GROUPS])
def test_a_rank_without_images_calls_all_that_learns(point, tmp_path):
    """In a process group the module takes part with zeros, in the order of a rank that has images."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model, text = tiny_llava("sdpa").train(), make_batch([[9], [6]])
        plain = float(tiny_llava("sdpa")(**text).loss.detach())
        attachment = attach(model, [point])
        called = []
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)) or name in map(
                "llavolta_compressors.{}".format, attachment.learned_modules
            ):
                module.register_forward_pre_hook(lambda _, args, name=name: called.append(name))
        model(**make_batch(MIXED))
        # What is inside a learned module is gathered with it, as a whole.
        with_images = [name for name in called if "llavolta" not in name or name.count(".") == 1]
        called.clear()
        loss = model(**text).loss
        assert [name for name in called if "llavolta" not in name or name.count(".") == 1] == with_images
        assert float(loss.detach()) == pytest.approx(plain, abs=1e-5)
        got = gradients(model, loss)
        learned = {name for name, _ in model.named_parameters() if "llavolta" in name}
        assert learned <= got.keys()
        assert all(float(got[name].abs().max()) == 0 for name in learned)
    finally:
        torch.distributed.destroy_process_group()


def trace(model):
    return {
        name: (
            sorted(module.__dict__),
            sorted(module._modules),
            [len(module.__dict__[key]) for key in sorted(module.__dict__) if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    } | {"state": sorted(model.state_dict())}


def test_switch_and_detach_leave_no_trace():
    model, batch = tiny_llava("sdpa"), make_batch(MIXED)
    expected = float(model(**batch).loss.detach())
    before = trace(model)
    attachment = attach(model, [FEATURES], modules=[FEATURES, QUERIES, REGISTERS])
    attached = trace(model)
    losses = []
    for points in ([FEATURES], [QUERIES], [REGISTERS], [], [FEATURES]):
        attachment.switch(points)
        losses.append(float(model(**batch).loss.detach()))
        assert trace(model) == attached
    assert losses[0] == losses[-1] and losses[3] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UsageError, match="modules="):
        attachment.switch([{**QUERIES, "layer": 1}])
    attachment.detach()
    assert trace(model) == before
    assert attachment.learned_modules == {}


def test_stages_share_a_module_and_points_of_one_forward_do_not():
    """A stage that keeps more goes on learning what one that kept less learned; ZeRO-3 wants one call a forward."""
    less, more = ({**FEATURES, "layer": 2, "keep_tokens": kept} for kept in (1, 4))
    attachment = attach(tiny_llava(), [less], modules=[less, more])
    (name,) = attachment.learned_modules
    attachment.switch([more])
    assert attachment.learned_names() == (name,)
    with pytest.raises(UsageError, match=f"two points would share the learned module {name}"):
        attachment.switch([more, less])
    assert attachment.learned_names() == (name,), "a refused switch changes nothing"
