"""Every method under ZeRO-3: two ranks, one of them sometimes without an image, train as one rank does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from orchestrator import registry
from orchestrator.compression.testing.table import built_in_methods

METHODS = [kind for kind in built_in_methods() if not registry.spec_class(registry.COMPRESSORS, kind).learns]
# One process group and one engine for all methods; learned ones train in tests/training/test_learned.py.
SCRIPT = """
import json, os, sys, torch, deepspeed
from orchestrator.compression import attach
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.kit import first_place
METHODS = sys.argv[1:]
deepspeed.init_distributed("gloo")
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
IMAGES, TEXT = [[3, "image", 7], [2, "image", 2, "image", "image", 5]], [[9], [6]]

def steps(engine, attachment, points):
    attachment.switch(points)
    losses = []
    for step, second in enumerate((TEXT, [[4, "image", 5], [8]])):
        parts = [TINY["llava"].batch(rows, "right", step, 3) for rows in (IMAGES, second)]
        for number in [rank] if world == 2 else [0, 1]:
            attachment.set_step(step=step, seed=1, sample_index=[2 * number, 2 * number + 1])
            loss = engine(**parts[number], num_items_in_batch=12).loss * (2 if world == 2 else 1)
            losses.append(loss.detach())
            engine.backward(loss)
        engine.step()
    total = torch.stack(losses).sum()
    torch.distributed.all_reduce(total)
    return float(total) / world

model = TINY["llava"].build("sdpa", 0).train()
attachment = attach(model, [])
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False})
results = {}
for method in METHODS:
    results[method] = steps(engine, attachment, first_place({"kind": method}, "llava"))
if rank == 0:
    print("RESULT", json.dumps(results))
"""


def run(world, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / f"zero_{world}.py"
    script.write_text(SCRIPT)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    common |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(world)}
    processes = []
    for rank in range(world):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(script), *METHODS]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    lines = [line for line in outputs[0].splitlines() if line.startswith("RESULT")]
    assert lines, "\n".join(output[-3000:] for output in outputs)
    return json.loads(lines[0].removeprefix("RESULT"))


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    one, two = run(1, tmp_path), run(2, tmp_path)
    assert sorted(one) == sorted(METHODS)
    assert two == pytest.approx(one, abs=1e-4)
    assert len({round(loss, 4) for loss in one.values()}) > len(one) // 2, "methods and steps must move the loss"
