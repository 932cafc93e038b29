"""Learned compressors come, pause, return and go: the rest is left alone, and every way gives the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learned_runs import LEARNED, OTHER, chain, equal, every_way, moments, split, trained, weights
from safetensors.torch import load_file
from training_workers import MIXING, launch, model_of

from orchestrator.models.build import WEIGHTS_FILE
from orchestrator.plan.jobs import Action, StageJob


def both_ways(folder: Path, runs: dict[str, list[StageJob]]) -> dict[str, dict[str, str]]:
    """Each run twice: its model kept in memory, and loaded for every stage run."""
    found = {}
    for name, jobs in runs.items():
        found[name] = trained(folder / name, jobs)
        assert trained(folder / f"{name} loaded", jobs, in_memory=False) == found[name]
    return found


@pytest.mark.parametrize(
    ("zero", "world_size"),
    [
        pytest.param("zero0", 1, marks=pytest.mark.slow),
        pytest.param("zero2", 1, marks=pytest.mark.slow),
        pytest.param("zero2", 2, marks=pytest.mark.slow),
        ("zero3", 2),
    ],
)
def test_one_stage_with_a_learned_compressor_touches_nothing_else(
    made: tuple[Path, Path], tmp_path: Path, zero: str, world_size: int
) -> None:
    """Its output is what a method that learns nothing gives: the rest must be what it is without it, bit for bit.

    But for ZeRO-3, where its parameters shift the model's in the flat partitions: in the tail of a vector instruction
    some processors round otherwise.
    """
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
        plain = weights(tmp_path / "plain", state)
        if zero == "zero3":
            assert max(float((own[name] - plain[name]).abs().max()) for name in plain) < 1e-6
        else:
            assert equal(own, plain)
        assert len(learned) == (0 if state == "state2" else 4)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "world_size"), [("zero2", 1), ("zero3", 2)])
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
        moments(tmp_path / "stages", state) for state in ("state2", "state4", "state6")
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
    from orchestrator.models.build import build_model
    from orchestrator.models.parts import parameter_groups, set_trainable
    from orchestrator.spec.model import ModelSpec
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.step import rate_factor

    recipe, data = job.recipe, TrainingMemory().data(job)
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
    from orchestrator.training import distributed

    found = {name: trained(folder / name, runs) for name, runs in jobs.items()}
    root = folder / next(iter(jobs)) / "stage_runs" / "root" / WEIGHTS_FILE
    job = next(iter(jobs.values()))[-1]
    distributed.decide(lambda: plain_loop(job, root, folder / "plain.safetensors"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
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
    moment = moments(tmp_path / "x", "state4")[0][f"exp_avg_sq.{linear.removeprefix(LEARNED)}"]
    assert 1e-6 < float(moment.sum().sqrt()) < 1e-3 * (4 * (1 - 0.999)) ** 0.5
