"""Every method under ZeRO-3: two ranks, one of them sometimes without an image, train as one rank does."""

from __future__ import annotations

import pytest
from ranks import result_of_rank_0

from orchestrator import registry
from orchestrator.compression.testing.__main__ import built_in_methods

# One process group for all methods; those that learn nothing share an engine too, the others bring parameters.
SCRIPT = """
from orchestrator.compression import attach
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.kit import first_place
plain, learned = (names.split(",") for names in sys.argv[1:3])
FAMILY, KIND = sys.argv[3:]
IMAGES, TEXT = [[3, KIND, 7], [2, KIND, 2, KIND, KIND, 5]], [[9], [6]]

def start(points):
    model = TINY[FAMILY].build("sdpa", 0).train()
    attachment = attach(model, points, seed=3)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False})
    return engine, attachment

def steps(engine, attachment):
    losses = []
    for step, second in enumerate((TEXT, [[4, KIND, 5], [8]])):
        parts = [TINY[FAMILY].batch(rows, "right", step, 3) for rows in (IMAGES, second)]
        for number in [rank] if world == 2 else [0, 1]:
            attachment.set_step(step=step, seed=1, sample_index=[2 * number, 2 * number + 1])
            loss = engine(**parts[number], num_items_in_batch=12).loss * (2 if world == 2 else 1)
            losses.append(loss.detach())
            engine.backward(loss)
        engine.step()
    total = torch.stack(losses).sum()
    torch.distributed.all_reduce(total)
    return float(total) / world

results = {}
engine, attachment = start([])
for method in plain:
    attachment.switch(first_place({"kind": method}, FAMILY))
    results[method] = steps(engine, attachment)
engine.destroy()
for method in filter(None, learned):
    engine, attachment = start(first_place({"kind": method}, FAMILY))
    results[method] = steps(engine, attachment)
    engine.destroy()
if rank == 0:
    print("RESULT", json.dumps(results))
"""


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    classes = {kind: registry.spec_class(registry.COMPRESSORS, kind) for kind in built_in_methods()}
    across = [kind for kind, cls in classes.items() if cls.across_frames]
    learned = [kind for kind, cls in classes.items() if cls.learns]
    plain = [kind for kind in classes if kind not in (*across, *learned)]
    found = {}
    for names in ((",".join(plain), ",".join(learned), "llava", "image"), (",".join(across), "", "qwen2_vl", "video")):
        one, two = (result_of_rank_0(SCRIPT, ranks, tmp_path, *names) for ranks in (1, 2))
        assert two == pytest.approx(one, abs=1e-4)
        found |= one
    assert sorted(found) == sorted(classes)
    assert len({round(loss, 4) for loss in found.values()}) > len(found) // 2, "methods and steps must move the loss"
