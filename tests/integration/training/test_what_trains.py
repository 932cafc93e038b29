"""What a stage run changes: frozen parts stay as they are, each part has its rate, LoRA ends as merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_workers import launch, make_ledger, model_of, never, recipe_of, stage, write_model

from orchestrator.models.build import build_model
from orchestrator.models.parts import part_of
from orchestrator.plan.jobs import StageJob
from orchestrator.spec.model import ModelSpec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("made") / "model")


def trained(folder: Path, job: StageJob) -> tuple[dict[str, float], list[str]]:
    """Names of the live model's trained parameters and the loss of its last state, by the engine itself."""
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    ledger, memory = make_ledger(folder, job.model), TrainingMemory()
    assert train_stage(job, ledger, memory, never) == "done"
    live = memory.session.engine.module
    assert live is not None
    live.eval()
    memory.session.attachment.switch([])
    with torch.no_grad():
        loss = live(**memory.data(job).collate(range(8))).loss.item()
    return {"loss": loss}, [name for name, parameter in live.named_parameters() if parameter.requires_grad]


def _moved(folder: Path, state: str) -> dict[str, float]:
    """By part, how far the furthest weight moved; 0.0 means bit-identical."""
    before, after = (load_file(folder / "stage_runs" / name / "weights/model.safetensors") for name in ("root", state))
    assert before.keys() == after.keys()
    moved: dict[str, float] = {}
    for name in before:
        distance = 0.0 if torch.equal(before[name], after[name]) else float((before[name] - after[name]).abs().max())
        moved[part_of(name)] = max(moved.get(part_of(name), 0.0), distance)
    return moved


@pytest.mark.parametrize("zero", ["zero0", pytest.param("zero3", marks=pytest.mark.slow)])
def test_frozen_parts_stay_and_each_part_has_its_rate(model: Path, tmp_path: Path, zero: str) -> None:
    rates = {"projector": 1e-2, "language_model": 1e-5}
    recipe = recipe_of(train=("projector", "language_model"), learning_rate=rates, deepspeed=zero)
    launch(1, trained, tmp_path, stage(model_of(model), 4, recipe=recipe, keep="weights"))
    moved = _moved(tmp_path, "state4")
    assert moved["vision_tower"] == 0.0
    # Adam moves a weight by about its rate in a step.
    assert 2e-3 < moved["projector"] < 6e-2
    assert 2e-6 < moved["language_model"] < 6e-5


@pytest.mark.parametrize("zero", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_lora_trains_adapters_and_leaves_merged_weights(model: Path, tmp_path: Path, zero: str) -> None:
    recipe = recipe_of(train=("language_model",), lora={"r": 4, "alpha": 8}, deepspeed=zero)
    told, names = launch(1, trained, tmp_path, stage(model_of(model), 4, recipe=recipe))
    assert names and all("lora_" in name for name in names)
    moved = _moved(tmp_path, "state4")
    assert moved["vision_tower"] == moved["projector"] == 0.0 and moved["language_model"] > 1e-4
    # The merged file, in a plain model, computes what the model with adapters did.
    merged = build_model(ModelSpec(**model_of(model)), tmp_path / "stage_runs/state4/weights/model.safetensors").eval()
    assert plain_loss(merged, stage(model_of(model), 4)) == pytest.approx(told["loss"], abs=1e-5)


def plain_loss(model: Any, job: StageJob) -> float:
    from orchestrator.training.engine import TrainingMemory

    with torch.no_grad():
        return float(model(**TrainingMemory().data(job).collate(range(8))).loss)


@pytest.mark.slow
def test_bfloat16_keeps_a_float32_master(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(train=("projector",), learning_rate=1e-6)
    job = stage(model_of(model, dtype="bfloat16"), 4, recipe=recipe, keep="weights")
    launch(1, trained_in_bfloat16, tmp_path, job)
    after = load_file(tmp_path / "stage_runs/state4/weights/model.safetensors")
    weight = after["model.multi_modal_projector.linear_1.weight"]
    # Steps of 1e-6 are lost in bfloat16; the master keeps them.
    assert not torch.equal(weight, weight.bfloat16().float())
    assert _moved(tmp_path, "state4")["vision_tower"] == 0.0


def trained_in_bfloat16(folder: Path, job: StageJob) -> None:
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    memory = TrainingMemory()
    assert train_stage(job, make_ledger(folder, job.model), memory, never) == "done"
    assert next(memory.session.engine.module.parameters()).dtype == torch.bfloat16
