"""What learned compressors learned goes through phases and into evaluations; the built-in ones take turns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_runs import LEARNED, OTHER, chain, equal, every_way, moments, split, weights
from repository import SUPPORT
from training_workers import MIXING, launch, make_ledger, never

from orchestrator.plan.jobs import Action, EvaluationJob, StageJob


def evaluation(state: str, points: tuple[dict[str, Any], ...], name: str, model: dict[str, Any]) -> EvaluationJob:
    spec = {"kind": "exact_match", "data": "test", "batch_size": 10, "max_new_tokens": 3}
    data = {"kind": "easy_vqa", "split": "test", "max_samples": 12}
    return EvaluationJob(f"{state}{name}", state, "vqa", "final", points, spec, data, model)


def phases(folder: Path, pretrain: StageJob, finetune: list[StageJob], frozen: StageJob) -> dict[str, Any]:
    """A pretrain that only compressors learn in, what two finetunes make of it, and evaluations of the states."""
    from orchestrator.errors import StageRunError
    from orchestrator.evaluation.evaluate import evaluate_state, lacks_modules
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    ledger, memory, model = make_ledger(folder, pretrain.model), TrainingMemory(), pretrain.model
    train_stage(pretrain, ledger, memory, never)
    found: dict[str, Any] = {"answers": []}
    for job in finetune:
        train_stage(job, ledger, memory, never)
        live = memory.session.engine.module
        for name, points in {"mix": MIXING, "full": ()}.items():
            # The first finetune stage runs on full tokens: what pretrain learned is in the ledger, not in this model.
            assert lacks_modules(live, points) == (points == MIXING and job is finetune[0])
            at_hand = None if lacks_modules(live, points) else live
            results = [evaluate_state(evaluation(job.id, points, name, model), ledger, m) for m in (at_hand, None)]
            found["answers"].append([[example["answer"] for example in result["examples"]] for result in results])
        with pytest.raises(StageRunError) as told:
            evaluate_state(evaluation(job.id, OTHER, "other", model), ledger)
        found["said"] = str(told.value)
    train_stage(frozen, ledger, memory, never)
    memory.release()
    return found


@pytest.mark.slow
def test_phases_and_evaluations(made: tuple[Path, Path], tmp_path: Path) -> None:
    from orchestrator.compression import attach
    from orchestrator.models.build import build_model
    from orchestrator.models.compressor_weights import learned_modules, learned_weights
    from orchestrator.registry import load_plugin
    from orchestrator.spec.model import ModelSpec

    only = {"train": ("compressor",), "deepspeed": "zero3", "learning_rate": {"compressor": 1e-2}}
    (pretrain,) = chain(made, (Action(0, 2, "mix", MIXING),), (2,), recipe=only, phase="pretrain", keep="weights")
    table = (Action(0, 1, "full"), Action(1, 2, "mix", MIXING))
    first, second = (replace(job, id=f"tune{job.last_step}") for job in chain(made, table, (1, 2)))
    first, second = replace(first, parent=pretrain.id), replace(second, parent=first.id)
    (frozen,) = chain(made, (Action(0, 2, "o", OTHER),), (2,), recipe={"train": ("projector",)}, seed=9)
    frozen = replace(frozen, id="frozen", parent=pretrain.id)
    found = launch(1, phases, tmp_path, pretrain, [first, second], frozen)

    root, (own, learned) = weights(tmp_path, "root"), split(weights(tmp_path, "state2"))
    assert equal(own, root) and len(learned) == 4
    # Carried through a stage that does not use it, then trained on with a new optimizer.
    assert equal(split(weights(tmp_path, "tune1"))[1], learned)
    later, metadata = moments(tmp_path, "tune2")
    assert metadata["steps"].endswith(": 1}")
    assert not any(torch.equal(later[f"weights.{name.removeprefix(LEARNED)}"], learned[name]) for name in learned)
    # Without `compressor` in `train` another one runs as (seed, name) made it, and this one stays as it was.
    load_plugin("mixing_plugin.py", SUPPORT)
    file = tmp_path / "stage_runs/frozen/weights/model.safetensors"
    model = build_model(ModelSpec.model_validate(pretrain.model), file)
    attach(model, OTHER, seed=9)
    ((name, born),) = learned_modules(model).items()
    at_rest = learned_weights(file)
    assert len(at_rest) == 2 and equal(at_rest.pop(name), dict(born.named_parameters()))
    assert equal(*at_rest.values(), {key.split(".", 2)[2]: tensor for key, tensor in learned.items()})
    for at_hand, from_ledger in found["answers"]:
        assert at_hand == from_ledger
    assert "hold no learned compressor mixing_layer1_" in found["said"] and "another variant" in found["said"]


BUILT_IN = (
    {"kind": "q_former", "layer": "projector", "keep_tokens": 16, "heads": 2},
    {"kind": "registers", "layer": 1, "keep_tokens": 8},
    {"kind": "c_abstractor", "layer": "projector", "keep_tokens": 16},
    {"kind": "q_former", "layer": 1, "keep_tokens": 8, "heads": 2},
    {"kind": "divt", "layer": "projector", "keep_ratio": "1/2", "heads": 2},
    {"kind": "token_grouping", "layer": "projector", "keep_tokens": 8},
    {"kind": "laco", "layer": "tower:0", "stride": 4},
)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "world_size"), [pytest.param("zero2", 1, marks=pytest.mark.slow), ("zero3", 2)])
def test_built_in_methods_take_turns(made: tuple[Path, Path], tmp_path: Path, zero: str, world_size: int) -> None:
    table = [Action(step, step + 1, point["kind"], (point,)) for step, point in enumerate(BUILT_IN, start=1)]
    actions = (Action(0, 1, "full"), *table, Action(8, 9, "full"))
    cuts = {"cut": (1, 2, 3, 4, 6, 7, 9), "whole": (9,)}
    recipe = {"deepspeed": zero, "group_by_modality_length": False}  # no batch without an image
    runs = {name: chain(made, actions, steps, recipe=recipe) for name, steps in cuts.items()}
    found = launch(world_size, every_way, tmp_path, runs)
    assert found["cut"]["state9"] == found["whole"]["state9"]
    tensors, metadata = moments(tmp_path / "whole", "state9")
    assert sorted(json.loads(metadata["steps"]).values()) == [1] * 7
    for name in json.loads(metadata["steps"]):
        means = [tensor for key, tensor in tensors.items() if key.startswith(f"exp_avg.{name}.")]
        assert any(bool(tensor.any()) for tensor in means)
