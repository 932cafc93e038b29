"""`per_device_train_batch_size: auto`: sizes that grow where tokens go, and updates that stay the same."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_workers import (
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

from orchestrator.errors import StageRunError, UsageError
from orchestrator.models.build import WEIGHTS_FILE
from orchestrator.plan.jobs import Action, StageJob
from orchestrator.plan.memory import activation_bytes
from orchestrator.spec.model_facts import model_facts
from orchestrator.training.batches import accumulation_steps, deal

FULL = Action(0, 1, "full")
EARLY = ({"kind": "average_pool", "layer": 0, "stride": 16},)
SLOW = pytest.mark.slow


@given(st.integers(1, 300), st.integers(1, 8), st.floats(0, 400))
def test_even_size_has_the_fewest_steps_that_fit(batch: int, workers: int, most: float) -> None:
    from orchestrator.training.batches import even_size

    if batch < workers:
        return
    size = even_size(batch, workers, most)
    chunks = [len(chunk) for rank in range(workers) for chunk in deal(range(batch), size, rank, workers)]
    assert max(chunks) == size and min(chunks) >= 1
    steps = {}
    for other in range(1, batch + 1):
        with suppress(UsageError):  # a worker would have steps without a sample
            steps[other] = accumulation_steps(batch, other, workers)
    fitting = {other: count for other, count in steps.items() if other <= most}
    if fitting:
        assert steps[size] == min(fitting.values()) and size == min(o for o in fitting if steps[o] == steps[size])
    else:
        assert size == min(steps)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    return write_model(folder / "model"), write_uneven_rows(folder)


def run_of(made: tuple[Path, Path], table: tuple[Action, ...], **values: Any) -> StageJob:
    recipe = {"group_by_modality_length": False, "max_grad_norm": 0.5, "learning_rate": 1e-3, "global_batch_size": 12}
    recipe |= {
        "per_device_train_batch_size": "auto",
        "train": ("projector", "language_model"),
        **values.pop("recipe", {}),
    }
    known = {"total_steps": 6, "keep": "full", "data": uneven_data(made[1]), "recipe": recipe_of(**recipe)}
    return stage(model_of(made[0]), table[-1].last_step, table=table, **(known | values))


def two_stages(made: tuple[Path, Path], **recipe: Any) -> list[StageJob]:
    """Two steps under the heavy variant, then four of full tokens."""
    heavy = run_of(made, (Action(0, 2, "heavy", EARLY),), recipe=recipe)
    table = (Action(0, 2, "heavy", EARLY), Action(2, 6, "full"))
    return [heavy, run_of(made, table, first_step=2, parent=heavy.id, recipe=recipe)]


def written_out(jobs: list[StageJob], sizes: dict[str, int]) -> list[StageJob]:
    """The same stage runs with numbers in place of `auto`."""
    return [replace(job, recipe=job.recipe | {"per_device_train_batch_size": sizes[job.id]}) for job in jobs]


def trained(folder: Path, jobs: list[StageJob], in_memory: bool = True) -> dict[str, Any]:
    """Each state's digest and fingerprinted size; activations may take as much as 4.5 samples of full tokens."""
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.micro_batch import longest_of
    from orchestrator.training.stage_run import train_stage

    ledger, memory, found = make_ledger(folder, jobs[0].model), TrainingMemory(), {}
    facts = model_facts(jobs[0].model["model_name_or_path"])
    assert facts is not None
    longest = longest_of(memory.data(jobs[0]))
    allowed = int(4.5 * activation_bytes(facts, FULL, longest, jobs[0].recipe, 4))
    for job in jobs:
        memory.allowed_bytes = allowed
        assert train_stage(job, ledger, memory, never) == "done"
        if not in_memory:
            memory.release()
            memory = TrainingMemory()
        result = json.loads((ledger.state_folder(job.id) / "result.json").read_text())
        found[job.id] = (weights_digest(ledger, job.id), result["fingerprint"]["micro_batch_size"])
    memory.release()
    return found


def chains(folder: Path, auto: list[StageJob], before: list[StageJob], sizes: dict[str, int]) -> dict[str, Any]:
    """A chain in memory, loaded between its stages, with the sizes it chose written by hand, and as it was before."""
    return {
        "memory": trained(folder / "memory", auto),
        "loaded": trained(folder / "loaded", auto, in_memory=False),
        "written": trained(folder / "written", written_out(auto, sizes)),
        "before": trained(folder / "before", before),
    }


def largest_difference(one: Path, other: Path, state: str) -> float:
    a, b = (load_file(folder / f"stage_runs/{state}/weights/model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("zero", ["zero2", *(pytest.param(z, marks=SLOW) for z in ("zero0", "zero2_offload", "zero3"))])
def test_compressed_stage_runs_bigger_micro_batches_and_learns_the_same(
    made: tuple[Path, Path], tmp_path: Path, zero: str
) -> None:
    auto = two_stages(made, deepspeed=zero)
    before = two_stages(made, deepspeed=zero, per_device_train_batch_size=4)
    # 12 samples: twice 6, then thrice 4. One engine: its 4 micro-steps of the first stage are no multiple of 3.
    sizes = {"state2": 6, "state6": 4}
    found = launch(1, chains, tmp_path, auto, before, sizes)
    assert {state: size for state, (_, size) in found["memory"].items()} == sizes
    assert found["memory"] == found["loaded"] == found["written"]
    assert largest_difference(tmp_path / "memory", tmp_path / "before", "state6") < 1e-5
    assert moved(tmp_path / "memory") > 1e-3
    log = (tmp_path / "memory/stage_runs/state2/log.txt").read_text()
    assert "under heavy: micro-batches of 6 samples, 2 accumulation steps" in log


def moved(folder: Path) -> float:
    start = load_file(folder / "stage_runs" / "root" / WEIGHTS_FILE)
    end = load_file(folder / "stage_runs/state6/weights/model.safetensors")
    return max(float((start[name] - end[name]).abs().max()) for name in start)


@pytest.mark.slow
def test_two_workers_under_zero3_take_fewer_accumulation_steps(made: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = {"deepspeed": "zero3", "global_batch_size": 24}
    auto, before = two_stages(made, **recipe), two_stages(made, **recipe, per_device_train_batch_size=2)
    sizes = {"state2": 6, "state6": 4}
    found = launch(2, chains, tmp_path, auto, before, sizes)
    assert {state: size for state, (_, size) in found["memory"].items()} == sizes
    assert found["memory"] == found["loaded"] == found["written"]
    assert largest_difference(tmp_path / "memory", tmp_path / "before", "state6") < 1e-5
    steps = {name: accumulation_steps(24, size, 2) for name, size in (("before", 2), ("heavy", 6), ("full", 4))}
    assert steps == {"before": 6, "heavy": 2, "full": 3}
    log = (tmp_path / "memory/stage_runs/state2/log.txt").read_text()
    assert "under heavy: micro-batches of 6 samples, 2 accumulation steps" in log


def policy(folder: Path, auto: StageJob, before: StageJob) -> Any:
    trained(folder / "before", [before])
    return trained(folder / "auto", [auto])["state6"][1]


@pytest.mark.slow
def test_a_policy_has_a_size_for_each_of_its_variants(made: tuple[Path, Path], tmp_path: Path) -> None:
    table = tuple(Action(i, i + 1, *(("heavy", EARLY) if i % 2 else ("full",))) for i in range(6))
    before = run_of(made, table, recipe={"per_device_train_batch_size": 3})
    assert launch(1, policy, tmp_path, run_of(made, table), before) == "4, 6"
    assert largest_difference(tmp_path / "auto", tmp_path / "before", "state6") < 1e-5


def with_limits(folder: Path, jobs: list[StageJob], limits: dict[str, int], in_steps: bool) -> dict[str, Any]:
    """Trains where memory runs out above a number of samples by variant: in trials, or in steps."""
    from orchestrator.training import micro_batch, stage_run, step
    from orchestrator.training.engine import TrainingMemory

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    tried: list[tuple[str, int]] = []
    forward = step.forward_losses

    def scarce(session: Any, action: Action, batch: Any, *rest: Any, **more: Any) -> Any:
        if len(batch.indices) > limits[action.variant]:
            raise torch.OutOfMemoryError(f"CUDA out of memory with {len(batch.indices)} samples")
        return forward(session, action, batch, *rest, **more)

    def tells_share(session: Any, job: StageJob, data: Any, action: Action, size: int) -> float:
        tried.append((action.variant, size))
        micro_batch.measure_trial(session, job, data, action, size)
        return 0.9 * size / limits[action.variant]

    (step if in_steps else micro_batch).forward_losses = scarce
    choose = micro_batch.choose
    if not in_steps:  # as on a GPU
        micro_batch.choose = lambda job, session, data, work, allowed, _: choose(
            job, session, data, work, allowed, lambda action, size: tells_share(session, job, data, action, size)
        )
    ledger, memory, found, errors = make_ledger(folder, jobs[0].model), TrainingMemory(), {}, []
    for job in jobs:
        for _ in range(8):
            memory.allowed_bytes = 2**40 if limits[job.table[-1].variant] < 12 else 1
            try:
                assert stage_run.train_stage(job, ledger, memory, never) == "done"
                break
            except micro_batch.MicroBatchTooLarge as error:
                errors.append(str(error))
        result = json.loads((ledger.state_folder(job.id) / "result.json").read_text())
        found[job.id] = (weights_digest(ledger, job.id), result["fingerprint"]["micro_batch_size"])
    memory.release()
    return {"found": found, "tried": tried, "errors": errors}


def limited_and_written(folder: Path, jobs: list[StageJob], limits: dict[str, int], sizes: dict[str, int]) -> Any:
    found = with_limits(folder / "limited", jobs, limits, in_steps=False)
    return {**found, "written": trained(folder / "written", written_out(jobs, sizes))}


def at_the_most(folder: Path, job: StageJob) -> list[tuple[int, ...]]:
    """Visual tokens by layer in a trial of a micro-batch, in a rehearsal's step, and in a real one."""
    from orchestrator.dispatch.run_job import _Rehearsal
    from orchestrator.plan.jobs import RehearsalJob
    from orchestrator.training import micro_batch
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.step import run_step

    ledger, memory, action = make_ledger(folder, job.model), TrainingMemory(), job.table[0]
    rehearsal = _Rehearsal(RehearsalJob("try", job.parent, job, ("key",), (), (), False), ledger, memory)
    rehearsal.act(action)
    assert memory.session is not None
    data, attachment = memory.data(job), memory.session.attachment
    found = [attachment.visual_tokens_per_layer]
    micro_batch.measure_trial(memory.session, job, data, action, 4)
    found.append(attachment.visual_tokens_per_layer)
    indices = micro_batch.longest_samples(data, 4)
    batch = micro_batch.MicroBatch(indices, data.collate(indices))
    run_step(memory.session, job, 0, [batch], should_stop=False)
    return [*found, attachment.visual_tokens_per_layer]


@pytest.mark.slow
def test_memory_of_numbers_that_depend_on_the_image_is_tried_at_the_most(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    points = ({"kind": "divt", "layer": "projector", "keep_tokens": 60, "heads": 2},)
    recipe = {"per_device_train_batch_size": 4, "global_batch_size": 4, "train": ("projector", "compressor")}
    job = run_of(made, (Action(0, 1, "clusters", points),), recipe=recipe, total_steps=1)
    rehearsed, tried, ran = launch(1, at_the_most, tmp_path, job)
    assert rehearsed == tried and len(set(tried)) == 1 and tried[0] % 60 == 0 and tried[0] > 0
    assert 0 < ran[0] < tried[0]


@pytest.mark.parametrize("zero", ["zero2", *(pytest.param(zero, marks=SLOW) for zero in ("zero0", "zero3"))])
def test_trials_find_the_size_and_leave_no_trace(made: tuple[Path, Path], tmp_path: Path, zero: str) -> None:
    jobs, sizes = two_stages(made, deepspeed=zero), {"state2": 12, "state6": 4}
    found = launch(1, limited_and_written, tmp_path, jobs, {"heavy": 12, "full": 5}, sizes)
    # The heavy stage starts from the least size and grows; the full one starts from all 12, halves twice, grows once.
    assert found["tried"] == [("heavy", 1), ("heavy", 12), ("full", 12), ("full", 6), ("full", 3), ("full", 4)]
    assert {state: size for state, (_, size) in found["found"].items()} == sizes
    assert found["written"] == found["found"]


@pytest.mark.slow
def test_memory_that_runs_out_in_a_step_halves_the_size_for_the_next_attempt(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    jobs = two_stages(made, deepspeed="zero2")
    found = launch(1, with_limits, tmp_path / "a", jobs, {"heavy": 7, "full": 5}, True)
    assert [size for _, size in found["found"].values()] == [6, 3]
    assert found["errors"][0] == ("heavy: out of memory in micro-batches of 12 samples; the next attempt takes 6")
    from orchestrator.dispatch.failures import describe
    from orchestrator.training.micro_batch import MicroBatchTooLarge

    assert describe(MicroBatchTooLarge(found["errors"][0])).retry


def refusals(folder: Path, job: StageJob) -> list[str]:
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.micro_batch import choose
    from orchestrator.training.stage_run import train_stage

    ledger, memory = make_ledger(folder, job.model), TrainingMemory(allowed_bytes=1)
    assert train_stage(job, ledger, memory, never) == "done"

    def never_fits(action: Action, size: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(StageRunError) as least:
        choose(job, memory.session, _data(job, memory), folder, 1, never_fits)
    unknown = replace(job, model=job.model | {"model_name_or_path": "nobody/nothing"})
    with pytest.raises(UsageError) as not_known:
        choose(unknown, memory.session, _data(job, memory), folder / "other", 1)
    return [str(least.value), str(not_known.value)]


def _data(job: StageJob, memory: Any) -> Any:

    return memory.data(job)


@pytest.mark.slow
def test_what_cannot_be_chosen_is_told(made: tuple[Path, Path], tmp_path: Path) -> None:
    least, unknown = launch(1, refusals, tmp_path, run_of(made, (Action(0, 1, "full"),)))
    assert "micro-batches of 1, the minimum" in least and "zero3" in least
    assert "nobody/nothing are not known" in unknown and "give a number" in unknown
