"""Checkpoints written while training goes on hold the state they were taken of, and one rank's failure ends all."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_workers import HEAVY, launch, make_ledger, model_of, never, recipe_of, stage, uneven_data, weights_digest

from orchestrator.errors import StorageError
from orchestrator.plan.jobs import Action, StageJob

SECONDS = 60


def _job(made: tuple[Path, Path], zero: str, dtype: str = "float32") -> StageJob:
    model, rows = made
    table = (Action(0, 3, "heavy", HEAVY), Action(3, 6, "full"))
    recipe, data = recipe_of(deepspeed=zero, per_device_train_batch_size=2), uneven_data(rows)
    return stage(model_of(model, dtype=dtype), 6, table=table, checkpoint_every=2, data=data, recipe=recipe)


def _save_as(save: Callable[[Callable[..., None], Any, str], None]) -> None:
    """Puts something in the place of DeepSpeed's writing; each worker is a process of its own."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    real = TorchCheckpointEngine.save
    TorchCheckpointEngine.save = lambda self, state, path: save(lambda *args: real(self, *args), state, path)


def slow_writing(folder: Path, job: StageJob) -> tuple[list[int], str, str, list[bool]]:
    """The checkpoint of step 2 reaches the disk when step 3 has been trained; training dies, and goes on from it."""
    from orchestrator.plan.ledger import Ledger
    from orchestrator.training import distributed
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    alone = make_ledger(folder / "alone", job.model)
    train_stage(job, alone, TrainingMemory(), never)
    trained, beside, asked = threading.Event(), [], 0

    def save(real: Callable[..., None], state: Any, path: str) -> None:
        beside.append(threading.current_thread() is not threading.main_thread())
        if "step_000002" in path and not trained.wait(SECONDS):
            raise OSError(errno.ETIMEDOUT, "training waited for the write")
        real(state, path)

    def dies_at_step_5() -> bool:
        nonlocal asked
        asked += 1
        if asked == 4:
            trained.set()
        if asked == 6:
            raise InterruptedError
        return False

    _save_as(save)
    ledger = make_ledger(folder / "killed", job.model)
    with contextlib.suppress(InterruptedError):
        train_stage(job, ledger, TrainingMemory(), dies_at_step_5)
    distributed.decide(lambda: ledger.store.drop_step(job.id, 4))
    steps = Ledger(folder / "killed").checkpoint_steps(job.id)
    train_stage(job, ledger, TrainingMemory(), never)
    return steps, weights_digest(alone, job.id), weights_digest(ledger, job.id), beside


@pytest.mark.parametrize(
    ("zero", "world_size", "dtype"),
    [("zero0", 1, "float32"), ("zero1", 1, "bfloat16"), ("zero2", 2, "float32"), ("zero3", 2, "bfloat16")],
)
def test_training_goes_on_while_a_checkpoint_is_written(
    made: tuple[Path, Path], tmp_path: Path, zero: str, world_size: int, dtype: str
) -> None:
    steps, alone, resumed, beside = launch(world_size, slow_writing, tmp_path, _job(made, zero, dtype))
    assert steps == [2]
    assert resumed == alone
    assert any(beside)


def failing_rank(folder: Path, job: StageJob) -> tuple[str, list[int], str]:
    """Rank 1's disk is full at the checkpoint of step 4; afterwards it has room."""
    from orchestrator.training import distributed
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    full = distributed.rank() == 1

    def save(real: Callable[..., None], state: Any, path: str) -> None:
        if full and "step_000004" in path:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        real(state, path)

    _save_as(save)
    ledger = make_ledger(folder, job.model)
    try:
        train_stage(job, ledger, TrainingMemory(), never)
        message = ""
    except StorageError as error:
        message = str(error)
    steps, full = ledger.checkpoint_steps(job.id), False
    return message, steps, train_stage(job, ledger, TrainingMemory(), never)


def test_a_rank_that_cannot_write_ends_all(made: tuple[Path, Path], tmp_path: Path) -> None:
    message, steps, outcome = launch(2, failing_rank, tmp_path, _job(made, "zero2"))
    assert "no space" in message and str(tmp_path) in message
    assert (steps, outcome) == ([2], "done")


def without_memory(folder: Path, job: StageJob) -> list[bool]:
    from orchestrator.training import distributed
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    in_main = []

    def save(real: Callable[..., None], state: Any, path: str) -> None:
        in_main.append(threading.current_thread() is threading.main_thread())
        real(state, path)

    _save_as(save)
    distributed.available_memory_bytes = lambda: 0
    ledger = make_ledger(folder, job.model)
    assert train_stage(job, ledger, TrainingMemory(), never) == "done"
    return in_main


def test_where_memory_is_short_nothing_is_copied(made: tuple[Path, Path], tmp_path: Path) -> None:
    in_main = launch(1, without_memory, tmp_path, _job(made, "zero2"))
    assert len(in_main) == 6 and all(in_main)  # model and optimizer at steps 2, 4 and 6
