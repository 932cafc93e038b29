"""A state's checkpoint is opened by another number of workers: what is learned from there on is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_workers import (
    HEAVY,
    MIXING,
    StopAt,
    launch,
    make_ledger,
    model_of,
    never,
    recipe_of,
    stage,
    uneven_data,
)

from orchestrator.models.build import WEIGHTS_FILE
from orchestrator.plan.jobs import Action, StageJob


def _jobs(made: tuple[Path, Path], zero: str) -> list[StageJob]:
    """A learned compressor in the first stage run; the second one goes on with another."""
    train = ("projector", "language_model", "compressor")
    common = {
        "data": uneven_data(made[1]),
        "recipe": recipe_of(
            deepspeed=zero, per_device_train_batch_size=2, train=train, learning_rate=1e-3, weight_decay=0.1
        ),
    }
    table = (Action(0, 4, "mix", MIXING), Action(4, 6, "heavy", HEAVY))
    parent = stage(model_of(made[0]), 4, table=table[:1], **common)
    return [parent, stage(model_of(made[0]), 6, first_step=4, parent=parent.id, table=table, **common)]


def trained(folder: Path, jobs: list[StageJob], stop_at: int | None = None) -> list[str]:
    """Outcomes; a stage run that is told to stop is the last one."""
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    ledger, outcomes = make_ledger(folder, jobs[0].model), []
    for job in jobs:
        memory = TrainingMemory()
        outcomes.append(train_stage(job, ledger, memory, never if stop_at is None else StopAt(stop_at)))
        memory.release()
        if outcomes[-1] == "stopped":
            break
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "before", "after"),
    [("zero2", 2, 1), ("zero3", 1, 2), ("zero0", 1, 2), ("zero1", 1, 2), ("zero2", 1, 2), ("zero3", 2, 1)],
)
def test_other_workers_go_on(made: tuple[Path, Path], tmp_path: Path, zero: str, before: int, after: int) -> None:
    jobs = _jobs(made, zero)
    changed, left_alone = tmp_path / "[a] (1)+*", tmp_path / "alone"  # the first is a pattern to who looks for such
    assert launch(before, trained, changed, jobs, 1) == ["stopped"]
    # In the middle of the first stage run, and from its state into the second.
    assert launch(after, trained, changed, jobs[:1]) == ["done"]
    assert launch(before, trained, changed, jobs) == ["done", "done"]
    assert launch(before, trained, left_alone, jobs) == ["done", "done"]
    files = [folder / f"stage_runs/{jobs[1].id}/weights/model.safetensors" for folder in (changed, left_alone)]
    ours, alone = map(load_file, files)
    assert ours.keys() == alone.keys()
    assert max(float((ours[name] - alone[name]).abs().max()) for name in ours) < 1e-5
    start = load_file(changed / "stage_runs" / "root" / WEIGHTS_FILE)
    assert max(float((ours[name] - start[name]).abs().max()) for name in start) > 1e-3
    assert not list(tmp_path.rglob("universal"))
