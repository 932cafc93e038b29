"""Checkpoints killed while they are written, cut, flipped or lost: training goes on, bit for bit, or says why."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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

from orchestrator.errors import DamagedStateError, StaleWriterError, StorageError
from orchestrator.plan.jobs import Action, StageJob
from orchestrator.plan.ledger.backends import folder as folder_backend
from orchestrator.plan.ledger.files import damaged_files


def _jobs(made: tuple[Path, Path], zero: str = "zero2") -> tuple[StageJob, StageJob]:
    """Two stage runs of one phase: steps 0 to 6 and 6 to 10, an in-stage checkpoint every second step."""
    model, rows = made
    table = (Action(0, 6, "heavy", HEAVY), Action(6, 10, "full"))
    common: dict[str, Any] = {
        "data": uneven_data(rows),
        "recipe": recipe_of(deepspeed=zero, per_device_train_batch_size=2),
        "checkpoint_every": 2,
        "total_steps": 10,
    }
    parent = stage(model_of(model), 6, table=table[:1], **common)
    return parent, stage(model_of(model), 10, first_step=6, parent=parent.id, table=table, **common)


def train(ledger: Any, *jobs: StageJob, should_stop: Callable[[], bool] = never) -> list[str]:
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    memory = TrainingMemory()
    try:
        return [train_stage(job, ledger, memory, should_stop) for job in jobs]
    finally:
        memory.release()


def state_of(ledger: Any, jobs: tuple[StageJob, ...]) -> dict[str, tuple[str, list[float]]]:
    """Weights and the loss of each step: what must be the same however often training was broken off."""
    found = {}
    for job in jobs:
        lines = [json.loads(line) for line in ledger.metrics_file(job.id).read_text().splitlines()]
        assert steps_told(ledger, job.id) == list(range(job.first_step, job.last_step))
        found[job.id] = (weights_digest(ledger, job.id), [line["loss"] for line in lines])
        assert damaged_files(ledger.state_folder(job.id)) == [] and not ledger.work_folder(job.id).exists()
    return found


def trained(folder: Path, jobs: tuple[StageJob, ...]) -> Any:
    ledger = make_ledger(folder, jobs[0].model)
    assert train(ledger, *jobs) == ["done"] * len(jobs)
    return state_of(ledger, jobs)


@pytest.fixture(scope="module")
def alone(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Any]:
    """What both stage runs end with when nobody disturbs them, by ZeRO stage and workers."""
    return functools.cache(
        lambda zero, world_size: launch(world_size, trained, tmp_path_factory.mktemp("alone"), _jobs(made, zero))
    )


def killed_while_writing(folder: Path, jobs: tuple[StageJob, ...], where: str) -> None:
    """Half of a file of a checkpoint is written, or all but its manifest, or all but its last rename: SIGKILL."""
    import torch

    ledger, save = make_ledger(folder, jobs[0].model), torch.save

    def torn(value: Any, path: Any, *args: Any, **rest: Any) -> None:
        save(value, path, *args, **rest)
        if where in str(path) and "optim" in Path(path).name:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def before(place: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(first: Path, *rest: Any) -> Any:
            if where == f"{place} {first.name}":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(first, *rest)

        return step

    torch.save = torn
    folder_backend.write_manifest = before("manifest", folder_backend.write_manifest)
    folder_backend.take_place = before("rename", folder_backend.take_place)
    train(ledger, *jobs)


# Where it is killed, and which checkpoints of that stage run are whole then.
KILLED = [
    ("zero2", 1, "step_000002", []),
    ("zero2", 1, "step_000004", [2]),
    ("zero2", 1, "manifest step_000004", [2]),
    ("zero2", 1, "rename step_000004", [2]),
    ("zero2", 1, "rename .writing-0", [2, 4]),
    ("zero3", 2, "state10/.writing-0/checkpoint", [8]),
]

MOST_TELLING = ("step_000004", "rename .writing-0")


@pytest.mark.parametrize(
    ("zero", "world_size", "where", "whole"),
    [pytest.param(*one, marks=[] if one[2] in MOST_TELLING else pytest.mark.slow) for one in KILLED],
)
def test_killed_while_a_checkpoint_is_written(
    made: tuple[Path, Path], alone: Any, tmp_path: Path, zero: str, world_size: int, where: str, whole: list[int]
) -> None:
    jobs = _jobs(made, zero)
    launch(world_size, killed_while_writing, tmp_path / "killed", jobs, where, exit_codes=(-signal.SIGKILL,))
    (work,) = (tmp_path / "killed" / "work").iterdir()
    assert list((work / ".writing-0").iterdir()), "it was killed before it wrote"
    assert sorted(path.name for path in work.glob("step_*")) == [f"step_{step:06d}" for step in whole]
    assert launch(world_size, trained, tmp_path / "killed", jobs) == alone(zero, world_size)


def _damage(folder: Path, way: str, pattern: str) -> None:
    file = max((path for path in folder.rglob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)
    if way == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif way == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()


def fallen_back(folder: Path, job: StageJob, ways: tuple[str, ...]) -> list[Any]:
    """Stopped at step 5, its newest checkpoint (or both) damaged, and gone on with: what comes out each time."""
    found = []
    for way in ways:
        ledger = make_ledger(folder / way, job.model)
        assert train(ledger, job, should_stop=StopAt(4)) == ["stopped"]
        damaged = list(ledger.store.checkpoints(job.id))[: 2 if way == "both" else 1]
        assert damaged[0].name == "step_000005"
        for one in damaged:
            _damage(one, "flip" if way == "both" else way, "*_states.pt")
        assert len(list(ledger.store.checkpoints(job.id))) == 2 - len(damaged)
        assert train(ledger, job) == ["done"]
        found.append(state_of(ledger, (job,)))
    return found


@pytest.mark.parametrize("ways", [("cut", "flip"), pytest.param(("gone", "both"), marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_inside_a_stage_run_falls_back(
    made: tuple[Path, Path], alone: Any, tmp_path: Path, ways: tuple[str, ...]
) -> None:
    job = _jobs(made)[0]
    end = {job.id: alone("zero2", 1)[job.id]}
    assert launch(1, fallen_back, tmp_path, job, ways) == [end] * len(ways)


def refused(folder: Path, jobs: tuple[StageJob, ...]) -> list[str]:
    """States that a stage run starts from, damaged: which one each attempt names."""
    parent, child = jobs
    ledger = make_ledger(folder, parent.model)
    kept, root = folder / "kept", ledger.state_folder("root")
    assert train(ledger, parent) == ["done"]
    named = []
    for part, pattern, job, state in (
        ("weights", "model.safetensors", replace(parent, id="another"), root),
        ("weights", "model.safetensors", child, ledger.state_folder(parent.id)),
        ("checkpoint", "*_states.pt", child, ledger.state_folder(parent.id)),
    ):
        for way in ("cut", "flip", "gone"):
            shutil.copytree(state, kept)
            _damage(state / part, way, pattern)
            with pytest.raises(DamagedStateError, match=f"the {part} of the state {state.name}") as told:
                train(ledger, job)
            named.append(told.value.state)
            assert not ledger.is_done(job.id) and not list(ledger.work_folder(job.id).glob("step_*"))
            shutil.rmtree(state)
            kept.rename(state)
    assert train(ledger, child) == ["done"]
    return named


def test_a_damaged_state_to_start_from_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    assert launch(1, refused, tmp_path, _jobs(made)) == ["root"] * 3 + ["state6"] * 6


def refused_by_all(folder: Path, job: StageJob) -> list[str]:
    import torch.distributed as dist

    from orchestrator.training import distributed

    ledger = make_ledger(folder, job.model)
    distributed.decide(lambda: _damage(ledger.state_folder("root"), "flip", "model.safetensors"))
    with pytest.raises(DamagedStateError) as told:
        train(ledger, job)
    named = [""] * distributed.world_size()
    dist.all_gather_object(named, told.value.state)
    return named


def test_every_rank_hears_of_a_damaged_state(made: tuple[Path, Path], tmp_path: Path) -> None:
    assert launch(2, refused_by_all, tmp_path, _jobs(made)[0]) == ["root", "root"]


class TakeOver:
    """`should_stop` in which, at its n-th call, another driver takes the job over."""

    def __init__(self, ledger: Any, job: StageJob, call: int) -> None:
        self.ledger, self.job, self.left = ledger, job, call

    def __call__(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.ledger.store.create(f"leases/{self.job.id}/000002.json", b"{}")
        return False


def taken_over(folder: Path, job: StageJob) -> tuple[list[list[str]], Any]:
    """A stage run loses its lease before a checkpoint, and before its commit; then its new holder does it."""
    found = []
    for call in (2, 5):
        ledger = make_ledger(folder / str(call), job.model)
        ledger.fences[job.id] = 1
        with pytest.raises(StaleWriterError, match="taken over"):
            train(ledger, job, should_stop=TakeOver(ledger, job, call))
        assert not ledger.is_done(job.id)
        found.append([path.name for path in ledger.store.checkpoints(job.id)])
        ledger.fences[job.id] = 2
        assert train(ledger, job) == ["done"]
    return found, state_of(ledger, (job,))


def test_a_writer_that_lost_its_lease_changes_nothing(made: tuple[Path, Path], alone: Any, tmp_path: Path) -> None:
    job = _jobs(made)[0]
    found, end = launch(1, taken_over, tmp_path, job)
    # A checkpoint that was still being written when the lease was lost is not sealed; the one before it is there.
    assert found == [[], ["step_000002"]]
    assert end == {job.id: alone("zero2", 1)[job.id]}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, as small as the test then makes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk can only be mounted by root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def too_full(folder: Path, job: StageJob) -> str:
    with pytest.raises(StorageError) as told:
        train(make_ledger(folder, job.model), job)
    return str(told.value)


# Sizes at which the first checkpoint fails, the second one, the weights of the end, and their checkpoint.
@pytest.mark.parametrize(
    ("size_kib", "what"),
    [
        pytest.param(300, "step_000002", marks=pytest.mark.slow),
        (650, "step_000004"),
        pytest.param(760, "weights", marks=pytest.mark.slow),
        pytest.param(980, "checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_stops_a_stage_run_and_room_lets_it_go_on(
    made: tuple[Path, Path], alone: Any, disk: Path, size_kib: int, what: str
) -> None:
    job = _jobs(made)[0]
    subprocess.run(["mount", "-o", f"remount,size={size_kib}k", disk], check=True)
    said = launch(1, too_full, disk / "runs", job)
    assert "no space left on its disk" in said and "cluster.storage_path" in said
    assert str(disk.joinpath("runs", "work", job.id, ".writing-0", what)) in said
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert launch(1, trained, disk / "runs", (job,)) == {job.id: alone("zero2", 1)[job.id]}
