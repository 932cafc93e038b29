"""Stage runs of a phase in which learned compressors come and go, and what they left in the ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_workers import MIXING, make_ledger, model_of, never, recipe_of, stage, uneven_data, weights_digest

from orchestrator.plan.jobs import Action, StageJob

LEARNED = "llavolta_compressors."
OTHER = ({**MIXING[0], "variety": 1},)
TRAIN = ("projector", "language_model", "compressor")


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
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    ledger, memory = make_ledger(folder, jobs[0].model), TrainingMemory()
    for job in jobs:
        assert train_stage(job, ledger, memory, never) == "done"
        if not in_memory:
            memory.release()
            memory = TrainingMemory()
    memory.release()
    return {job.id: weights_digest(ledger, job.id) for job in jobs}


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


def moments(folder: Path, state: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = folder / "stage_runs" / state / "checkpoint/learned.safetensors"
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()
