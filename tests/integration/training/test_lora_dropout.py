"""Dropout is a function of (seed, step, sample): micro-batches, workers, padding and recomputation change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_stage_run import _largest_difference, trained
from training_workers import HEAVY, launch, model_of, recipe_of, stage, uneven_data

from orchestrator.plan.jobs import Action


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_and_workers_do_not_change_what_lora_learns(
    made: tuple[Path, Path], tmp_path: Path, checkpointing: bool
) -> None:
    def job(micro: int, dropout: float = 0.3):
        recipe = recipe_of(
            train=("projector", "language_model"), lora={"r": 4, "alpha": 8, "dropout": dropout}, learning_rate=1e-3,
            group_by_modality_length=False, per_device_train_batch_size=micro,
            gradient_checkpointing=checkpointing and micro == 4,
        )  # fmt: skip
        table = (Action(0, 2, "heavy", HEAVY), Action(2, 4, "full"))
        data = uneven_data(made[1])
        return stage(model_of(made[0]), 4, total_steps=4, table=table, data=data, recipe=recipe, keep="weights")

    alone = launch(1, trained, tmp_path / "one", {"1": job(1), "4": job(4), "without": job(4, 0.0)})
    pair = launch(2, trained, tmp_path / "two", {"2": job(2)})
    assert _largest_difference(alone["4"], alone["1"]) < 1e-5
    assert _largest_difference(alone["4"], pair["2"]) < 1e-5
    assert _largest_difference(alone["4"], alone["without"]) > 1e-4
