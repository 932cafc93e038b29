"""Learned methods under ZeRO-3 with two ranks of which one never has an image: the losses of one rank without ZeRO."""

from __future__ import annotations

import pytest
from ranks import result_of_rank_0

SCRIPT = """
from reference import make_batch, tiny_llava
from orchestrator.compression import attach
stage = {stage}
rows = [[3, "image", 7], [2, "image", 2, "image", "image", 5]], [[9], [6]]
settings = dict(
    projector_and_decoder=[
        {{"kind": "c_abstractor", "layer": "projector", "keep_tokens": 4, "depth": 1}},
        {{"kind": "q_former", "layer": 2, "keep_tokens": 2, "heads": 2, "depth": 1}},
    ],
    registers=[{{"kind": "registers", "layer": 2, "keep_tokens": 2}}],
    tower=[{{"kind": "laco", "layer": "tower:1", "stride": 9}}],
    tower_projector_and_decoder=[
        {{"kind": "c_abstractor", "layer": "tower:1", "keep_tokens": 6, "depth": 1}},
        {{"kind": "c_abstractor", "layer": "projector", "keep_tokens": 4, "depth": 1}},
        {{"kind": "q_former", "layer": 2, "keep_tokens": 2, "heads": 2, "depth": 1}},
    ],
)
results = {{}}
for name, points in settings.items():
    model = tiny_llava("sdpa").train()
    attachment = attach(model, points, seed=5)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={{
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {{"stage": stage}},
        "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-2, "torch_adam": True}}}},
        "zero_force_ds_cpu_optimizer": False}})
    losses = []
    for step in range(5):
        parts = [make_batch(part, seed=step) for part in rows]
        for part in ([parts[rank]] if world == 2 else parts):
            loss = engine(**part, num_items_in_batch=12).loss * (2 if world == 2 else 1)
            losses.append(float(loss.detach()) / (2 if world == 2 else 1))
            engine.backward(loss)
        engine.step()
    results[name] = losses if world == 2 else losses[::2]
    engine.destroy()
if rank == 0:
    print("RESULT", json.dumps(results))
"""


def losses_of_rank_0(world, stage, tmp_path):
    return result_of_rank_0(SCRIPT.format(stage=stage), world, tmp_path)


@pytest.mark.slow
def test_two_ranks_one_without_images(tmp_path):
    expected = losses_of_rank_0(1, 0, tmp_path)
    losses = losses_of_rank_0(2, 3, tmp_path)
    for name, wanted in expected.items():
        assert losses[name] == pytest.approx(wanted, abs=1e-4), name
        assert len({round(loss, 4) for loss in wanted}) == 5, "training must move the loss"
