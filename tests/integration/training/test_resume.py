"""Interrupted training, resumed, ends with the same weights bit for bit as training left alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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
    steps_told,
    uneven_data,
    weights_digest,
)

from orchestrator.plan.jobs import Action, StageJob

CLUSTERS = {"kind": "divt", "layer": "projector", "keep_ratio": "1/2", "heads": 2}
GROUPS = {"kind": "token_grouping", "layer": "projector", "keep_tokens": 8}
PIXELS = {"kind": "laco", "layer": "tower:0", "stride": 4}
KEYS = {"kind": "fastv", "layer": 1, "keep_ratio": "1/2", "keys_only": True}
MERGED = {"kind": "tome", "layer": "tower:0", "keep_ratio": "1/2", "inside_layer": True}
POOLED = {"kind": "average_pool", "layer": "projector", "stride": 2}
# Points that a learned run begins with, changes to, and those in between (full tokens where there are none).
LEARNED: dict[str, tuple[tuple[dict[str, Any], ...], ...]] = {
    "mixing": (MIXING, ({**MIXING[0], "variety": 1},)),
    "built-in": ((CLUSTERS,), (GROUPS, {"kind": "isolator"})),
    "places": (
        (PIXELS, {"kind": "late_injection", "layer": 1}),
        (MERGED, {"kind": "early_exit", "layer": 1}),
        (POOLED, KEYS),
    ),
}


def _jobs(made: tuple[Path, Path], zero: str, every: int = 2, learned: str = "") -> tuple[StageJob, StageJob]:
    """Two stage runs of one phase: three compressed steps, then three on full tokens.

    Or with a learned compressor that one of them begins with, and that the other one changes and comes back to.
    """
    model, rows = made
    table: tuple[Action, ...] = (Action(0, 3, "heavy", HEAVY), Action(3, 6, "full"))
    train = ("projector", "language_model", *(("compressor",) if learned else ()))
    if learned:
        one, other, *between = LEARNED[learned]
        table = (
            Action(0, 3, "one", one),
            Action(3, 4, "between", *between),
            Action(4, 5, "other", other),
            Action(5, 6, "one again", one),
        )
    common: dict[str, Any] = {
        "data": uneven_data(rows),
        "recipe": recipe_of(deepspeed=zero, per_device_train_batch_size=2, train=train),
        "checkpoint_every": every,
    }
    parent = stage(model_of(model), 3, table=table[:1], **common)
    child = stage(model_of(model), 6, first_step=3, parent=parent.id, table=table, **common)
    return parent, child


def left_alone(folder: Path, jobs: tuple[StageJob, StageJob]) -> dict[str, str]:
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    ledger, memory = make_ledger(folder, jobs[0].model), TrainingMemory()
    assert [train_stage(job, ledger, memory, never) for job in jobs] == ["done", "done"]
    memory.release()
    return {job.id: weights_digest(ledger, job.id) for job in jobs}


def stopped_and_resumed(folder: Path, jobs: tuple[StageJob, StageJob], calls: list[int]) -> list[Any]:
    """For each number of calls to `should_stop`: stop there, go on in a fresh memory; the child loads its parent."""
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    found = []
    for call in calls:
        ledger, outcomes = make_ledger(folder / str(call), jobs[0].model), []
        stop = StopAt(call)
        for job in jobs:
            outcome = train_stage(job, ledger, TrainingMemory(), stop)
            outcomes.append(outcome)
            if outcome == "stopped":
                outcomes.append(train_stage(job, ledger, TrainingMemory(), never))
        found.append(
            (outcomes, {job.id: weights_digest(ledger, job.id) for job in jobs}, steps_told(ledger, jobs[1].id))
        )
    return found


@pytest.fixture(scope="module")
def alone(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """What both stage runs end with when nothing disturbs them, by ZeRO stage, workers and learned compressor."""
    return functools.cache(
        lambda zero, world_size, learned: launch(
            world_size, left_alone, tmp_path_factory.mktemp("alone"), _jobs(made, zero, learned=learned)
        )
    )


def _check(
    made: tuple[Path, Path], alone: Any, folder: Path, zero: str, world_size: int, calls: list[int], learned: str
) -> None:
    found = launch(world_size, stopped_and_resumed, folder, _jobs(made, zero, learned=learned), calls)
    for call, (outcomes, digests, steps) in zip(calls, found, strict=True):
        assert digests == alone(zero, world_size, learned)
        assert steps == [3, 4, 5]
        # A stop that comes with a stage run's last step finds it finished.
        assert ("stopped" in outcomes) == (call != 5)


@pytest.mark.parametrize(
    ("zero", "world_size", "calls"),
    [
        pytest.param("zero0", 1, [0, 4], marks=pytest.mark.slow),
        pytest.param("zero2", 2, [1, 3], marks=pytest.mark.slow),
        ("zero3", 2, [4]),
        pytest.param("zero3", 1, [3], marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_is_left_alone(
    made: tuple[Path, Path], alone: Any, tmp_path: Path, zero: str, world_size: int, calls: list[int]
) -> None:
    _check(made, alone, tmp_path, zero, world_size, calls, learned="")


@pytest.mark.slow
def test_stopped_while_a_compressor_learns(made: tuple[Path, Path], alone: Any, tmp_path: Path) -> None:
    _check(made, alone, tmp_path, "zero2", 2, [1, 4], learned="mixing")


@pytest.mark.slow
def test_stopped_while_clusters_groups_and_an_isolator_learn(
    made: tuple[Path, Path], alone: Any, tmp_path: Path
) -> None:
    """Noise, and numbers of tokens that differ from rank to rank, come out again."""
    _check(made, alone, tmp_path, "zero3", 2, [1, 4], learned="built-in")


def test_stopped_where_tokens_enter_late_leave_early_or_stay_as_keys(
    made: tuple[Path, Path], alone: Any, tmp_path: Path
) -> None:
    # In a folder whose name is a pattern to those who look for files by patterns.
    _check(made, alone, tmp_path / "[a] (1)+*", "zero2", 1, [1, 3, 4], learned="places")


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("learned", ["", *LEARNED])
def test_stopped_at_every_step_is_left_alone(
    made: tuple[Path, Path], alone: Any, tmp_path: Path, zero: str, world_size: int, learned: str
) -> None:
    _check(made, alone, tmp_path, zero, world_size, [0, 1, 2, 3, 4, 5], learned)


def die_in_backward(folder: Path, jobs: tuple[StageJob, StageJob], batch: int) -> None:
    """Trains `batch` micro-batches, then the process is gone in the middle of a step, with nothing closed."""
    from orchestrator.training import stage_run as stage_module
    from orchestrator.training.engine import TrainingMemory

    ledger, memory, done = make_ledger(folder, jobs[0].model), TrainingMemory(), 0
    run = stage_module.run_step

    def dying(session: Any, *args: Any) -> Any:
        nonlocal done
        forward = session.engine.backward

        def backward(*a: Any, **k: Any) -> Any:
            nonlocal done
            done += 1
            if done > batch:
                os._exit(9)
            return forward(*a, **k)

        session.engine.backward = backward
        try:
            return run(session, *args)
        finally:
            session.engine.backward = forward

    stage_module.run_step = dying
    for job in jobs:
        stage_module.train_stage(job, ledger, memory, never)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "world_size", "batch"), [("zero2", 1, 11), ("zero3", 2, 11)])
def test_killed_in_the_middle_of_a_step(
    made: tuple[Path, Path], alone: Any, tmp_path: Path, zero: str, world_size: int, batch: int
) -> None:
    jobs = _jobs(made, zero)
    launch(world_size, die_in_backward, tmp_path, jobs, batch, exit_codes=(9,))
    assert launch(world_size, left_alone, tmp_path, jobs) == alone(zero, world_size, "")
