"""attach() under DeepSpeed's ZeRO: one rank and two, with and without images."""

from __future__ import annotations

import itertools

import pytest
import torch
from ranks import result_of_rank_0
from reference import make_batch, tiny_llava

from orchestrator.compression import attach
from orchestrator.compression.testing.families import TINY

MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5]]
HEAVY = [{"kind": "average_pool", "layer": 1, "stride": 4}]
POINTS = {
    "pooled": {"kind": "average_pool", "layer": 1, "stride": 2},
    "keys": {"kind": "average_pool", "layer": 1, "stride": 2, "keys_only": True},
    "inside the tower's layer": {"kind": "tome", "layer": "tower:0", "keep_tokens": 5, "inside_layer": True},
}


ZERO = """
from reference import make_batch, tiny_llava
from orchestrator.compression import attach
rows = [[3, "image", 7], [2, "image", 2, "image", "image", 5]], [[9], [6]]
results = {{}}
for stage in {stages}:
    model = tiny_llava("sdpa").train()
    if {attach_first}:
        attachment = attach(model, [])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={{
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {{"stage": stage}},
        "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-2, "torch_adam": True}}}},
        "zero_force_ds_cpu_optimizer": False}})
    if not {attach_first}:
        attachment = attach(engine, [])
    losses = []
    for step in range(6):
        attachment.switch([{point}] if step % 2 else [])
        parts = [make_batch(part, seed=step) for part in rows]
        for part in ([parts[rank]] if world == 2 else parts):
            loss = engine(**part, num_items_in_batch=12).loss * (2 if world == 2 else 1)
            losses.append(float(loss.detach()))
            engine.backward(loss)
        engine.step()
    results[stage] = losses
    engine.destroy()
if rank == 0:
    print("RESULT", json.dumps(results))
"""


def run_zero(world, stages, attach_first, tmp_path, point):
    script = ZERO.format(stages=stages, attach_first=attach_first, point=POINTS[point])
    return result_of_rank_0(script, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["pooled", "keys"])
def test_zero3_gives_the_losses_of_zero0(tmp_path, point):
    losses = run_zero(1, [0, 3], False, tmp_path, point)
    assert losses["3"] == pytest.approx(losses["0"], abs=1e-5)
    assert len({round(loss, 4) for loss in losses["0"]}) > 6, "training must move the loss"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "point"), [(2, "pooled"), *((3, point) for point in POINTS)])
def test_two_ranks_one_without_images(tmp_path, stage, point):
    """Rank 1 never has an image; it must still take part in what rank 0's tower and projector do."""
    losses = run_zero(2, [0, stage], True, tmp_path, point)
    assert losses[str(stage)] == pytest.approx(losses["0"], abs=1e-4)


def test_every_stage_calls_the_same_modules_in_the_same_order():
    """ZeRO-3 gathers parameters by the order of hooked calls; a rank or stage with another order hangs the others."""
    model, batch = tiny_llava("sdpa").train(), make_batch(MIXED)
    called = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: called.append(name))
    model(**batch)
    plain = called.copy()
    attachment = attach(model, [])
    several = [{"kind": "average_pool", "layer": layer, "stride": 2} for layer in (0, 1, 3)]
    inside = [{"kind": "tome", "layer": "tower:0", "keep_tokens": 5, "inside_layer": True}]
    for points in ([], HEAVY, several, inside):
        attachment.switch(points)
        called.clear()
        model(**batch)
        assert called == plain


@pytest.fixture(scope="module")
def group_of_one(tmp_path_factory):
    """A process group, as training has one: a batch without an image then calls the tower all the same."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def calls_of(model):
    """The names of modules that are called from now on, forward and backward."""
    called = []

    def told(name, output):
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda _: called.append(f"backward of {name}"))

    # To ZeRO-3 a leaf is one module.
    leaves = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "_z3_leaf", False))
    for module_name, module in model.named_modules():
        if module_name and not module_name.startswith(leaves):
            module.register_forward_pre_hook(lambda _, args, name=module_name: called.append(name))
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(lambda _, args, output, name=module_name: told(name, output))
    return called


OF_KINDS = {"text": [[9], [6]], "image": [[3, "image", 7], [2]], "video": [[3, "video", 7], [2]]}
OF_KINDS["both"] = [[3, "video", 7], [2, "image", 4]]


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision", "qwen2_vl", "qwen3_vl", "video_llava"])
def test_ranks_that_see_text_images_or_videos_call_the_same_modules_in_the_same_order(name, group_of_one, monkeypatch):
    """What the other of two ranks says its batch holds is put in; test_kinds_zero.py runs two, under ZeRO-3."""
    tiny = TINY[name]
    model = tiny.build(tiny.attentions[-1], 0).train()
    attachment = attach(model, [])
    called, elsewhere = calls_of(model), [0, 0]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, op: tensor.copy_(tensor.maximum(torch.tensor(elsewhere).int()))
    )
    says = {"text": [0, 0], "image": [1, 0], "video": [0, 1], "both": [1, 1]}
    pairs = list(itertools.combinations(OF_KINDS, 2))
    evs = {"kind": "evs", "layer": max(1, tiny.first_layer)}
    for points, some in (([], pairs), ([evs], [("text", "video")])):
        attachment.switch(points)
        for one, other in some:
            found = []
            for mine, others in ((one, other), (other, one)):
                elsewhere[:] = says[others]
                called.clear()
                model(**tiny.batch(OF_KINDS[mine], "right", 0, 3), use_cache=False).loss.backward()
                found.append(called.copy())
            assert found[0] == found[1], (one, other)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_batch_of_a_family_calls_the_same_modules_in_the_same_order(name, group_of_one):
    """Forward and backward: what ranks of ZeRO-3 need, and what `zero3_refusal` says of a family."""
    tiny = TINY[name]
    model = tiny.build(tiny.attentions[-1], 0).train()
    attachment = attach(model, [])
    called = calls_of(model)
    images = [kind for kind in tiny.units if kind != "video"]
    batches = ([[3, images[0], 7], [2]], [[9], [6]], [[2, images[0], 1, images[-1], 3], [1, images[-1], 4]])
    found = []
    for points in ([], [{"kind": "average_pool", "layer": max(1, tiny.first_layer), "stride": 2}]):
        attachment.switch(points)
        for rows in batches[: 2 if points else 3]:
            called.clear()
            model(**tiny.batch(rows, "right", 0, 3), use_cache=False).loss.backward()
            found.append(called.copy())
    alike = all(one == found[0] for one in found)
    assert alike != bool(attachment.zero3_refusal)
