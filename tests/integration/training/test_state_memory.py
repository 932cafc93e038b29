"""What an engine holds of weights, gradients and optimizer states is what the memory formula says."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from bench_micro_batch import widen
from training_workers import easy_vqa_data, launch, make_ledger, model_of, recipe_of, stage, write_model

from orchestrator.plan.jobs import StageJob
from orchestrator.plan.memory import state_bytes
from orchestrator.spec.deepspeed import given_config
from orchestrator.spec.model_facts import model_facts
from orchestrator.training.micro_batch import set_accumulation

WORKERS, SAMPLES = 2, 4
BATCH_BYTES = 500_000
"""What is there beside states, a batch above all."""
SMALL = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
ALL_FIT = {"reduce_bucket_size": 8_000_000}
OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
LORA = {"r": 8, "alpha": 16, "dropout": 0.0}


def held_bytes() -> int:
    """Bytes of all tensors that Python knows of; those of one storage count once."""
    import torch

    found: dict[int, int] = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            for tensor in (each, each.grad if each.is_leaf else None, getattr(each, "ds_tensor", None)):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measure(folder: Path, job: StageJob) -> int:
    """The most that is held, activations aside, when a step is taken or about to be; every rank calls it."""
    from orchestrator.models.build import WEIGHTS_FILE
    from orchestrator.training import distributed
    from orchestrator.training.batches import MicroBatch
    from orchestrator.training.engine import TrainingMemory, open_session
    from orchestrator.training.step import run_step

    weights = make_ledger(folder, job.model).state_folder("root") / WEIGHTS_FILE
    memory = TrainingMemory()
    session = memory.session = open_session(job, weights)
    session.prepare(job)
    data, held, take_step = memory.data(job), list[int](), session.engine.step
    set_accumulation(session.engine, job.recipe["global_batch_size"], 1, 1)

    def looking() -> Any:
        gc.collect()
        held.append(held_bytes())
        return take_step()

    session.engine.step = looking
    session.switch(())
    for step in range(2):
        own = data.batch_indices(job.seed, step, SAMPLES, True)[distributed.rank() :: WORKERS]
        batches = [MicroBatch([index], data.collate([index])) for index in own]
        run_step(session, job, step, batches, should_stop=False)
    return max(held)


@pytest.mark.parametrize(
    ("dtype", "number", "more"),
    [
        pytest.param("float32", 0, {}, marks=pytest.mark.slow),
        pytest.param("float32", 1, {"zero": ALL_FIT}, marks=pytest.mark.slow),
        pytest.param("float32", 2, {}, marks=pytest.mark.slow),
        pytest.param("float32", 3, {}, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1, {}, marks=pytest.mark.slow),
        ("bfloat16", 2, {}),
        ("bfloat16", 3, {}),
        pytest.param("bfloat16", 2, {"zero": OFFLOADED}, id="offloaded-2", marks=pytest.mark.slow),
        pytest.param("bfloat16", 3, {"zero": OFFLOADED}, id="offloaded-3", marks=pytest.mark.slow),
        pytest.param("bfloat16", 3, {"recipe": {"train": ("projector",)}}, id="projector-3", marks=pytest.mark.slow),
        pytest.param("bfloat16", 2, {"recipe": {"lora": LORA}}, id="lora-2", marks=pytest.mark.slow),
    ],
)
def test_states_are_what_the_formula_says(dtype: str, number: int, more: Any, tmp_path: Path) -> None:
    folder = widen(write_model(tmp_path / "model"), 256, 6)
    facts = model_facts(str(folder))
    assert facts is not None
    config = {"zero_optimization": {"stage": number, **SMALL, **more.get("zero", {})}}
    asked = {"global_batch_size": SAMPLES, "per_device_train_batch_size": 1, "deepspeed": config}
    recipe = recipe_of(**asked, **more.get("recipe", {}))
    job = stage(model_of(folder, dtype=dtype), 2, recipe=recipe, data=easy_vqa_data())
    states = state_bytes(facts, recipe, 4 if dtype == "float32" else 2, given_config(config, False), WORKERS)
    expected = states.weights + states.optimizer + states.gradients + states.host
    if more.get("zero") == ALL_FIT:
        expected += states.buffers  # stage 2 has none left by then
    held = launch(WORKERS, measure, tmp_path / "ledger", job)
    assert held == pytest.approx(expected, rel=0.03, abs=BATCH_BYTES), f"{held / expected:.3f}"
