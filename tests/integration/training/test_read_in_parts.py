"""Under ZeRO-3 weights are read one after the other: when the engine is made, each rank has its share alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_workers import launch, make_ledger, model_of, recipe_of, stage, write_model

from orchestrator.errors import StageRunError
from orchestrator.models.build import WEIGHTS_FILE
from orchestrator.models.parts import plain_name
from orchestrator.plan.jobs import StageJob
from orchestrator.plan.ledger import Ledger

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}


class Made(Exception):
    """An engine would be made of this model now."""


def before_the_engine(folder: Path, job: StageJob) -> dict[str, tuple[int, int]]:
    """Each parameter's size, and the size of what this rank has of it; all put together again are in a file."""
    import deepspeed

    from orchestrator.training import distributed, engine

    def initialize(model: Any, **_: Any) -> Any:
        raise Made(model)

    weights = make_ledger(folder, job.model).state_folder("root") / WEIGHTS_FILE
    engine.deepspeed.initialize = initialize
    with pytest.raises(Made) as made:
        engine.open_session(job, weights)
    found, values = {}, {}
    for name, parameter in made.value.args[0].named_parameters():
        assert parameter.numel() == 0, name
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = (parameter.numel(), parameter.ds_tensor.numel())
            values[name] = parameter.detach().clone()
    if distributed.rank() == 0:
        save_file(values, folder / "together.safetensors")
    return found


@pytest.mark.parametrize("lora", [None, LORA], ids=["", "lora"])
def test_a_rank_has_its_share_of_every_weight(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    model = model_of(write_model(tmp_path / "model"), dtype="bfloat16")
    more = {} if lora is None else {"lora": lora, "train": ("projector", "language_model")}
    job = stage(model, 2, recipe=recipe_of(deepspeed="zero3", **more))
    found = launch(2, before_the_engine, tmp_path / "ledger", job)
    file = load_file(Ledger(tmp_path / "ledger").state_folder("root") / WEIGHTS_FILE)
    assert {plain_name(name) for name in found if "lora_" not in name} == set(file)
    assert any("lora_" in name for name in found) is (lora is not None)
    assert all(share == -(-whole // 2) for whole, share in found.values())
    for name, value in load_file(tmp_path / "ledger" / "together.safetensors").items():
        assert value.dtype == torch.bfloat16, name
        if "lora_" not in name:
            assert torch.equal(value, file[plain_name(name)].to(torch.bfloat16)), name


def refused(folder: Path, job: StageJob) -> str:
    """What is told of weights without one of the model's, and of another shape."""
    from orchestrator.training import engine

    weights = make_ledger(folder, job.model).state_folder("root") / WEIGHTS_FILE
    tensors = load_file(weights)
    lost, cut = sorted(tensors)[:2]
    changed = {name: value[:1] if name == cut else value for name, value in tensors.items() if name != lost}
    save_file({name: value.contiguous() for name, value in changed.items()}, folder / "other.safetensors")
    with pytest.raises(StageRunError) as error:
        engine.open_session(job, folder / "other.safetensors")
    return f"{error.value} {lost} {cut}"


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    job = stage(model_of(write_model(tmp_path / "model")), 2, recipe=recipe_of(deepspeed="zero3"))
    told = launch(1, refused, tmp_path / "ledger", job)
    lost, cut = told.split()[-2:]
    assert f"missing: {lost}" in told and f"other shapes: {cut}" in told
