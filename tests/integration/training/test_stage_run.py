"""A stage run learns the same whatever the micro-batch and the workers, and refuses what it should not go on from."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_workers import (
    HEAVY,
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

from orchestrator.errors import LlavoltaError, StageRunError
from orchestrator.models.build import WEIGHTS_FILE
from orchestrator.plan.jobs import Action, StageJob


def _ten_steps(made: tuple[Path, Path], **recipe: Any) -> StageJob:
    model, rows = made
    return stage(
        model_of(model),
        10,
        total_steps=10,
        table=(Action(0, 5, "heavy", HEAVY), Action(5, 10, "full")),
        data=uneven_data(rows),
        # The modality grouping would make every batch even; here long, short and text-only rows meet.
        recipe=recipe_of(group_by_modality_length=False, max_grad_norm=0.5, **recipe),
        keep="weights",
    )


def trained(folder: Path, jobs: dict[str, StageJob]) -> dict[str, str]:
    """Trains each job in a ledger of its own; returns the weight files."""
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    files = {}
    for name, job in jobs.items():
        ledger, memory = make_ledger(folder / name, job.model), TrainingMemory()
        assert train_stage(job, ledger, memory, never) == "done"
        memory.release()
        files[name] = str(ledger.state_folder(job.id) / "weights/model.safetensors")
    assert "torch._inductor.lowering" not in sys.modules, "torch's compiler takes seconds to load in every worker"
    return files


def _largest_difference(one: str, other: str) -> float:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_update_is_the_same_for_micro_batches_and_workers(made: tuple[Path, Path], tmp_path: Path) -> None:
    # Adam divides by the gradient's size: where a gradient is all rounding, its sign would show. 1e-3 is the rate.
    jobs = {str(micro): _ten_steps(made, per_device_train_batch_size=micro, learning_rate=1e-3) for micro in (2, 4, 8)}
    alone = launch(1, trained, tmp_path / "one", jobs)
    pair = launch(2, trained, tmp_path / "two", {"2": jobs["2"], "4": jobs["4"]})
    start = str(tmp_path / "one" / "8" / "stage_runs" / "root" / WEIGHTS_FILE)
    assert _largest_difference(alone["8"], start) > 1e-3
    for other in (alone["2"], alone["4"], pair["2"], pair["4"]):
        assert _largest_difference(alone["8"], other) < 1e-5


def refused(folder: Path, jobs: tuple[StageJob, ...]) -> tuple[list[str], list[str]]:
    """A checkpoint written, its cursor or its files changed, and what a second attempt says; then the fallback."""
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    job, steps = jobs[0], []
    ledger = make_ledger(folder, job.model)
    assert train_stage(job, ledger, TrainingMemory(), StopAt(3)) == "stopped"
    newest, before = ledger.store.checkpoints(job.id)
    said = []
    for other in jobs[1:]:
        with pytest.raises(StageRunError) as told:
            train_stage(other, ledger, TrainingMemory(), never)
        said.append(str(told.value))
    steps.append(f"{newest.name} {before.name}")
    damaged = next(newest.rglob("*model_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    assert train_stage(job, ledger, TrainingMemory(), never) == "done"
    steps.append(" ".join(map(str, steps_told(ledger, job.id))))
    return said, [*steps, weights_digest(ledger, job.id)]


@pytest.mark.slow
def test_checkpoints_of_another_run_are_refused_and_damaged_ones_passed_over(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    job = stage(model_of(made[0]), 6, table=(Action(0, 6, "heavy", HEAVY),), checkpoint_every=2)
    renamed = replace(job, table=(Action(0, 2, "a", HEAVY), Action(2, 6, "b", HEAVY)))
    other_table = replace(job, table=(Action(0, 2, "heavy", HEAVY), Action(2, 6, "full")))
    said, told = launch(1, refused, tmp_path / "a", (job, other_table, replace(job, seed=4)))
    assert "table is" in said[0] and "average_pool" in said[0]
    assert "seed is 3 there and 4 here" in said[1]
    assert told[0] == "step_000004 step_000002"
    assert told[1] == "0 1 2 3 4 5"
    # Names of variants and how a table is cut are not part of what it says.
    files = launch(1, trained, tmp_path / "b", {"same": job, "renamed": renamed})
    assert {hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files.values()} == {told[2]}


def memory_and_loaded(folder: Path, jobs: tuple[StageJob, ...]) -> list[str]:
    """The child's weights with the parent in memory, from its checkpoint, and after an evaluation pass in between."""
    import torch

    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    parent, child = jobs
    digests = []
    for way in ("memory", "loaded", "evaluated"):
        ledger, memory = make_ledger(folder / way, parent.model), TrainingMemory()
        train_stage(parent, ledger, memory, never)
        if way == "loaded":
            memory.release()
            memory = TrainingMemory()
        if way == "evaluated":
            model = memory.session.engine.module
            assert model is not None
            model.eval()
            memory.session.attachment.switch([])
            with torch.no_grad():
                model.generate(input_ids=torch.tensor([[1, 10, 11]]), max_new_tokens=2, do_sample=True)
        train_stage(child, ledger, memory, never)
        digests.append(weights_digest(ledger, child.id))
    return digests


@pytest.mark.parametrize("zero", ["zero0", pytest.param("zero3", marks=pytest.mark.slow)])
def test_child_from_memory_is_child_from_checkpoint(made: tuple[Path, Path], tmp_path: Path, zero: str) -> None:
    recipe = recipe_of(deepspeed=zero, lora={"r": 4, "alpha": 8, "dropout": 0.1})
    parent = stage(model_of(made[0]), 2, table=(Action(0, 2, "heavy", HEAVY),), recipe=recipe)
    child = stage(
        model_of(made[0]), 4, first_step=2, parent=parent.id, table=(Action(0, 4, "heavy", HEAVY),), recipe=recipe
    )
    digests = launch(1, memory_and_loaded, tmp_path, (parent, child))
    assert len(set(digests)) == 1


def failed(folder: Path, job: StageJob) -> tuple[str, bool, bool]:
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    ledger, memory = make_ledger(folder, job.model), TrainingMemory()
    with pytest.raises(LlavoltaError) as told:
        train_stage(job, ledger, memory, never)
    return str(told.value), ledger.is_done(job.id), memory.session is None


def test_a_diverged_loss_stops_and_nothing_is_stored(made: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_of(learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=0.0)
    said, done, released = launch(1, failed, tmp_path, stage(model_of(made[0]), 6, recipe=recipe))
    assert "diverged" in said
    assert not done and released


def without_metrics(folder: Path, job: StageJob) -> tuple[list[str], bool, str]:
    """The file of metrics is deleted while it trains; a second attempt finds a checkpoint without its steps."""
    from orchestrator.errors import StorageError
    from orchestrator.training import distributed
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    ledger, said = make_ledger(folder, job.model), []
    file = ledger.work_folder(job.id) / "metrics.jsonl"

    def deletes_it() -> bool:
        file.unlink(missing_ok=True)
        return False

    for _ in range(2):
        with pytest.raises(StorageError) as told:
            train_stage(job, ledger, TrainingMemory(), deletes_it)
        said.append(str(told.value))
    done = ledger.is_done(job.id)
    distributed.decide(lambda: shutil.rmtree(file.parent))
    train_stage(job, ledger, TrainingMemory(), never)
    return said, done, " ".join(map(str, steps_told(ledger, job.id)))


def test_nothing_is_stored_without_its_curve(made: tuple[Path, Path], tmp_path: Path) -> None:
    said, done, steps = launch(2, without_metrics, tmp_path, stage(model_of(made[0]), 3, checkpoint_every=2))
    assert "steps 0 to 2" in said[0] and "steps 0 to 1" in said[1]
    assert all("metrics.jsonl" in one and "it has 0 lines" in one for one in said)
    assert not done and steps == "0 1 2"


def test_result_and_metrics_of_a_finished_stage_run(made: tuple[Path, Path], tmp_path: Path) -> None:
    job = replace(_ten_steps(made), keep="full")
    launch(1, trained, tmp_path, {"x": job})
    folder = tmp_path / "x/stage_runs" / job.id
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10))
    assert [line["variant"] for line in lines] == ["heavy"] * 5 + ["full"] * 5
    # 64 visual tokens; the heavy variant leaves 8 of them in the second of two layers. One row in six has none.
    assert 0 < lines[0]["visual_tokens"] <= 36 and 36 < lines[9]["visual_tokens"] <= 64
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 10
    assert result["train_seconds"] == pytest.approx(sum(line["step_seconds"] for line in lines))
    assert result["fingerprint"]["world_size"] == 1 and result["fingerprint"]["zero_stage"] == 2
    assert 0.1 < result["peak_memory_gib"] < 8
    assert not list(folder.rglob("zero_to_fp32.py"))
