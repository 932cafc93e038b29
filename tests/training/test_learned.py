"""Learned compressors come, pause, return and go: the rest is left alone, and every way gives the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_workers import (
    MIXING,
    launch,
    make_ledger,
    model_of,
    never,
    recipe_of,
    stage,
    uneven_data,
    weights_digest,
    write_model,
    write_uneven_rows,
)

from orchestrator.plan.jobs import Action, EvaluationJob, StageJob

LEARNED = "llavolta_compressors."
OTHER = ({**MIXING[0], "variety": 1},)
TRAIN = ("projector", "language_model", "compressor")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    return write_model(folder / "model"), write_uneven_rows(folder)


def chain(made: tuple[Path, Path], table: tuple[Action, ...], cuts: tuple[int, ...], **values: Any) -> list[StageJob]:
    """Stage runs of one phase, cut at these steps; `recipe=` changes the recipe."""
    recipe = recipe_of(**{"train": TRAIN, "per_device_train_batch_size": 2, **values.pop("recipe", {})})
    model = values.pop("model", None) or model_of(made[0])
    jobs: list[StageJob] = []
    for first, last in zip((0, *cuts), cuts, strict=False):
        known = tuple(replace(a, last_step=min(a.last_step, last)) for a in table if a.first_step < last)
        parent = jobs[-1].id if jobs else "root"
        fields = {"data": uneven_data(made[1]), "recipe": recipe, "first_step": first, "parent": parent, **values}
        jobs.append(stage(model, last, table=known, **fields))
    return jobs


def trained(folder: Path, jobs: list[StageJob], in_memory: bool = True) -> dict[str, str]:
    """Digest of every state's weights, trained in a ledger of its own."""
    from orchestrator.training.memory import TrainingMemory
    from orchestrator.training.stage import train_stage

    ledger, memory = make_ledger(folder, jobs[0].model), TrainingMemory()
    for job in jobs:
        assert train_stage(job, ledger, memory, never) == "done"
        if not in_memory:
            memory.release()
            memory = TrainingMemory()
    memory.release()
    return {job.id: weights_digest(ledger, job.id) for job in jobs}


def both_ways(folder: Path, runs: dict[str, list[StageJob]]) -> dict[str, dict[str, str]]:
    """Each run twice: its model kept in memory, and loaded for every stage run."""
    found = {}
    for name, jobs in runs.items():
        found[name] = trained(folder / name, jobs)
        assert trained(folder / f"{name} loaded", jobs, in_memory=False) == found[name]
    return found


def every_way(folder: Path, runs: dict[str, list[StageJob]]) -> dict[str, dict[str, str]]:
    """Each run once: the one that is cut most is loaded for every stage run, the others stay in memory."""
    return {name: trained(folder / name, jobs, in_memory=name != "cut") for name, jobs in runs.items()}


def weights(folder: Path, state: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "stage_runs" / state / "weights/model.safetensors")


def split(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's own weights, and the learned ones."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(LEARNED)}
    return own, {name: tensor for name, tensor in tensors.items() if name.startswith(LEARNED)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("zero", "world_size"),
    [
        pytest.param("zero0", 1, marks=pytest.mark.slow),
        ("zero2", 1),
        pytest.param("zero2", 2, marks=pytest.mark.slow),
        ("zero3", 2),
    ],
)
def test_one_stage_with_a_learned_compressor_touches_nothing_else(
    made: tuple[Path, Path], tmp_path: Path, zero: str, world_size: int
) -> None:
    """Its output is what a method that learns nothing gives: the rest must be, bit for bit, what it is without it."""
    recipe = {"recipe": {"deepspeed": zero, "weight_decay": 0.1}}
    neutral = {"learned": (MIXING[0] | {"stride": 1, "neutral": True},)}
    neutral["plain"] = ({"kind": "average_pool", "layer": 1, "stride": 1},)
    runs = {
        name: chain(made, (Action(0, 2, "full"), Action(2, 4, name, points), Action(4, 6, "full")), (2, 4, 6), **recipe)
        for name, points in neutral.items()
    }
    launch(world_size, both_ways, tmp_path, runs)
    for state in ("state2", "state4", "state6"):
        own, learned = split(weights(tmp_path / "learned", state))
        assert equal(own, weights(tmp_path / "plain", state))
        assert len(learned) == (0 if state == "state2" else 4)


def _moments(folder: Path, state: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = folder / "stage_runs" / state / "checkpoint/learned.safetensors"
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


@pytest.mark.parametrize(("zero", "world_size"), [("zero2", 1), pytest.param("zero3", 2, marks=pytest.mark.slow)])
def test_a_compressor_pauses_unchanged_and_returns(
    made: tuple[Path, Path], tmp_path: Path, zero: str, world_size: int
) -> None:
    table = (Action(0, 2, "mix", MIXING), Action(2, 4, "other", OTHER), Action(4, 6, "mix", MIXING))
    common: dict[str, Any] = {"recipe": {"deepspeed": zero, "weight_decay": 0.1}}
    runs = {"stages": chain(made, table, (2, 4, 6), **common), "cut": chain(made, table, (1, 2, 3, 4, 5, 6), **common)}
    runs |= {"whole": chain(made, table, (6,), **common), "short": chain(made, table[:1], (2,), **common)}
    found = launch(world_size, every_way, tmp_path, runs)
    # Where a table is cut, and what comes later, changes no bit.
    assert len({found[name]["state6"] for name in ("stages", "cut", "whole")}) == 1
    assert found["short"]["state2"] == found["stages"]["state2"]
    (first, steps), (paused, paused_steps), (last, last_steps) = (
        _moments(tmp_path / "stages", state) for state in ("state2", "state4", "state6")
    )
    name = next(key for key in first if key.startswith("weights.")).split(".")[1]
    assert all(torch.equal(first[key], paused[key]) for key in first)
    assert len(first) == 12 and len(paused) == 24
    assert not any(torch.equal(first[key], last[key]) for key in first)
    assert [f'"{name}": {count}' in told["steps"] for told, count in ((steps, 2), (paused_steps, 2), (last_steps, 4))]
    _, learned = split(weights(tmp_path / "stages", "state6"))
    assert equal(learned, {f"{LEARNED}{key[8:]}": last[key] for key in last if key.startswith("weights.")})


def plain_loop(job: StageJob, root: Path, target: Path) -> None:
    """The job without DeepSpeed, micro-batches or ranks: torch's AdamW and its clipping over all that trains."""
    from safetensors.torch import save_file

    from orchestrator.compression import attach
    from orchestrator.models import build_model
    from orchestrator.models.parts import parameter_groups, set_trainable
    from orchestrator.spec.model import ModelSpec
    from orchestrator.training.data import training_data
    from orchestrator.training.memory import TrainingMemory
    from orchestrator.training.rates import rate_factor

    recipe, data = job.recipe, training_data(job, TrainingMemory())
    model = build_model(ModelSpec.model_validate(job.model), root)
    attachment = attach(model, [], modules=[point for action in job.table for point in action.points], seed=job.seed)
    set_trainable(model, recipe["train"], lora=False)
    groups = parameter_groups(model, recipe["learning_rate"], recipe["weight_decay"])
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups)
    model.train()
    for step in range(job.last_step):
        attachment.switch(list(job.action_at(step).points))
        factor = rate_factor(recipe["lr_scheduler_type"], step, job.total_steps, recipe["warmup_ratio"])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        indices = data.batch_indices(job.seed, step, recipe["global_batch_size"], recipe["group_by_modality_length"])
        optimizer.zero_grad()
        model(**data.collate(indices), use_cache=False).loss.backward()
        if recipe["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["max_grad_norm"])
        optimizer.step()
    save_file({name: parameter.detach() for name, parameter in model.named_parameters()}, target)


def compared(folder: Path, jobs: dict[str, list[StageJob]]) -> dict[str, dict[str, str]]:
    from orchestrator.training import group

    found = {name: trained(folder / name, runs) for name, runs in jobs.items()}
    root = folder / next(iter(jobs)) / "stage_runs/root/weights/model.safetensors"
    job = next(iter(jobs.values()))[-1]
    group.decide(lambda: plain_loop(job, root, folder / "plain.safetensors"))
    return found


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_it_learns_what_a_plain_loop_learns(made: tuple[Path, Path], tmp_path: Path, world_size: int) -> None:
    """The clipping at 0.5 binds, so that its norm must be over the model and the compressors together."""
    rates = {"projector": 1e-3, "language_model": 5e-4, "compressor": 2e-3}
    recipe = {"learning_rate": rates, "max_grad_norm": 0.5, "weight_decay": 0.01, "warmup_ratio": 0.0}
    both = (*MIXING, {**OTHER[0], "layer": 0, "stride": 2})
    table = (Action(0, 2, "full"), Action(2, 4, "mix", MIXING), Action(4, 5, "both", both))
    zeros = ("zero0", "zero2", "zero3") if world_size == 1 else ("zero2", "zero3")
    runs = {zero: chain(made, table, (2, 5), recipe={**recipe, "deepspeed": zero}) for zero in zeros}
    launch(world_size, compared, tmp_path, runs)
    plain, start = load_file(tmp_path / "plain.safetensors"), weights(tmp_path / zeros[0], "root")
    assert sum(name.startswith(LEARNED) for name in plain) == 8
    assert max(float((plain[name] - start[name]).abs().max()) for name in start) > 1e-3
    for zero in zeros:
        ours = weights(tmp_path / zero, "state5")
        assert ours.keys() == plain.keys()
        assert max(float((ours[name] - plain[name]).abs().max()) for name in plain) < 1e-5


@pytest.mark.parametrize(
    "zero", [pytest.param("zero1", marks=pytest.mark.slow), "zero2", pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_bfloat16_keeps_a_float32_master(made: tuple[Path, Path], tmp_path: Path, zero: str) -> None:
    """Small steps are not lost in the rounded copies, and a clipping that binds is one norm here too."""
    rates = {"projector": 1e-6, "compressor": 1e-6}
    recipe = {"train": ("projector", "compressor"), "learning_rate": rates, "deepspeed": zero, "max_grad_norm": 1e-3}
    model = model_of(made[0], dtype="bfloat16")
    jobs = chain(made, (Action(0, 4, "mix", MIXING),), (2, 4), recipe=recipe, model=model)
    launch(1, both_ways, tmp_path, {"x": jobs})
    before, after = (split(weights(tmp_path / "x", state))[1] for state in ("state2", "state4"))
    linear = next(name for name in after if name.endswith(".1.weight"))
    assert after[linear].dtype == torch.float32 and not torch.equal(after[linear], after[linear].bfloat16().float())
    assert 1e-8 < float((after[linear] - before[linear]).abs().max()) < 1e-5
    # Adam's moments say how large the clipped gradients were: together with the projector's at most 1e-3 in each step.
    moment = _moments(tmp_path / "x", "state4")[0][f"exp_avg_sq.{linear.removeprefix(LEARNED)}"]
    assert 1e-6 < float(moment.sum().sqrt()) < 1e-3 * (4 * (1 - 0.999)) ** 0.5


def evaluation(state: str, points: tuple[dict[str, Any], ...], name: str, model: dict[str, Any]) -> EvaluationJob:
    spec = {"kind": "exact_match", "data": "test", "batch_size": 10, "max_new_tokens": 3}
    data = {"kind": "easy_vqa", "split": "test", "max_samples": 12}
    return EvaluationJob(f"{state}{name}", state, "vqa", "final", points, spec, data, model)


def phases(folder: Path, pretrain: StageJob, finetune: list[StageJob], frozen: StageJob) -> dict[str, Any]:
    """A pretrain that only compressors learn in, what two finetunes make of it, and evaluations of the states."""
    from orchestrator.errors import StageRunError
    from orchestrator.evaluation.evaluate import evaluate_state, lacks_modules
    from orchestrator.training.memory import TrainingMemory
    from orchestrator.training.stage import train_stage

    ledger, memory, model = make_ledger(folder, pretrain.model), TrainingMemory(), pretrain.model
    train_stage(pretrain, ledger, memory, never)
    found: dict[str, Any] = {"answers": []}
    for job in finetune:
        train_stage(job, ledger, memory, never)
        live = memory.model_of(job.id)
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


def test_phases_and_evaluations(made: tuple[Path, Path], tmp_path: Path) -> None:
    from orchestrator.compression import attach
    from orchestrator.models import build_model
    from orchestrator.models.learned import learned_modules, learned_weights
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
    later, metadata = _moments(tmp_path, "tune2")
    assert metadata["steps"].endswith(": 1}")
    assert not any(torch.equal(later[f"weights.{name.removeprefix(LEARNED)}"], learned[name]) for name in learned)
    # Without `compressor` in `train` another one runs as (seed, name) made it, and this one stays as it was.
    load_plugin("mixing_plugin.py", Path(__file__).parent)
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
)


@pytest.mark.parametrize(("zero", "world_size"), [pytest.param("zero2", 1, marks=pytest.mark.slow), ("zero3", 2)])
def test_built_in_methods_take_turns(made: tuple[Path, Path], tmp_path: Path, zero: str, world_size: int) -> None:
    table = [Action(step, step + 1, point["kind"], (point,)) for step, point in enumerate(BUILT_IN, start=1)]
    actions = (Action(0, 1, "full"), *table, Action(5, 6, "full"))
    cuts = {"cut": (1, 2, 3, 4, 6), "whole": (6,)}
    recipe = {"deepspeed": zero, "group_by_modality_length": False}  # no batch without an image
    runs = {name: chain(made, actions, steps, recipe=recipe) for name, steps in cuts.items()}
    found = launch(world_size, every_way, tmp_path, runs)
    assert found["cut"]["state6"] == found["whole"]["state6"]
    tensors, metadata = _moments(tmp_path / "whole", "state6")
    assert sorted(json.loads(metadata["steps"]).values()) == [1, 1, 1, 1]
    for name in json.loads(metadata["steps"]):
        moments = [tensor for key, tensor in tensors.items() if key.startswith(f"exp_avg.{name}.")]
        assert any(bool(tensor.any()) for tensor in moments)
