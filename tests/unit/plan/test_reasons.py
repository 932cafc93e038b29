"""Why a cell has work to do: from the ledger, from who holds what, and against the nearest finished cell."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from ledger_work import finish, spool

from orchestrator import registry
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.documents import plan_document
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.reasons import cell_values, differences
from orchestrator.plan.tree import build_stage_tree
from orchestrator.report.cell_folders import write_cell_folder


def walk_of(lab: Any, *trees: dict[str, Any]) -> ExperimentPlan:
    """A planned experiment of one cell per tree, on the lab's one storage."""
    loaded = lab.loaded(*trees)
    cells, ledger = expand_cells(loaded), Ledger(lab.folder / "runs")
    return ExperimentPlan(loaded, cells, build_stage_tree(cells, ledger), ledger)


def document(walk: ExperimentPlan) -> dict[str, Any]:
    return plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger, 10)


def reasons(walk: ExperimentPlan) -> list[list[str]]:
    return [cell["reasons"] for cell in document(walk)["cells"]]


def finish_all(walk: ExperimentPlan) -> None:
    for job in walk.tree.work(walk.ledger):
        finish(walk.ledger, job)


def stages(*variants: str) -> dict[str, Any]:
    entries = [{"share": f"1/{len(variants)}", "compressor": name} for name in variants]
    return {"kind": "stages", "stages": entries}


@pytest.fixture
def two(lab: Any) -> ExperimentPlan:
    """Two cells that train ten steps under `heavy` before they part."""
    return walk_of(lab, *(lab.tree(phases__finetune__schedule=stages("heavy", last)) for last in ("full", "wide")))


def test_a_dropped_checkpoint_says_how_many_steps_are_trained_again(two: ExperimentPlan) -> None:
    root, pretrain, heavy, *_ = two.tree.work(two.ledger)
    for job in (root, pretrain):
        finish(two.ledger, job)
    finish(two.ledger, heavy, checkpoint=False)
    assert reasons(two) == [["1 of 3 stage runs are done", "checkpoint dropped: 10 steps again"]] * 2


def test_a_cell_that_leaves_finished_work_where_nothing_was_stored(lab: Any) -> None:
    finish_all(walk_of(lab, lab.tree(phases__finetune__schedule="heavy")))
    walk = walk_of(lab, *(lab.tree(phases__finetune__schedule=each) for each in ("heavy", stages("heavy", "full"))))
    done, new = reasons(walk)
    assert done == ["done"]
    assert new == [
        "1 of 3 stage runs are done",
        "leaves finished work at step 10, not stored: 10 steps again",
        "differs from finished cell cell0: finetune.schedule heavy -> heavy 0.5, full 0.5",
    ]


def test_a_cell_that_was_stopped_continues(two: ExperimentPlan) -> None:
    pretrain = two.tree.work(two.ledger)[1]
    spool(two.ledger, pretrain, 7)
    for step in (3, 6):
        (two.ledger.work_folder(pretrain.id) / f"step_{step:06d}").mkdir()
    assert reasons(two) == [["continues at step 6"]] * 2


def test_a_job_that_a_living_driver_holds_runs_elsewhere(two: ExperimentPlan) -> None:
    root, pretrain, heavy, *_ = two.tree.work(two.ledger)
    finish(two.ledger, root)
    finish(two.ledger, pretrain)
    leases = Leases(two.ledger.store, "driver")
    leases.acquire(heavy.id, "lane-0")
    told = f"runs elsewhere: pid {os.getpid()} on {socket.gethostname()}"
    found = document(two)
    assert [cell["state"] for cell in found["cells"]] == ["running"] * 2
    assert [cell["reasons"][0] for cell in found["cells"]] == [told] * 2
    assert [run["state"] for run in found["stage_runs"]] == ["done", "running", "new", "new"]
    leases.close()
    assert {cell["state"] for cell in document(two)["cells"]} == {"new"}


def test_a_failure_says_its_first_line_to_every_cell_that_stands_on_it(two: ExperimentPlan) -> None:
    heavy = two.tree.work(two.ledger)[2]
    two.ledger.write_failure(heavy.id, {"error": "diverged at step 3\nlong story"})
    assert [told[0] for told in reasons(two)] == ["failed: diverged at step 3 (--retry-failed takes it up again)"] * 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1, "phases__pretrain__seed": ...}, ["pretrain.seed 5 -> 1", "seed 0 -> 1"]),
        ({"phases__finetune__seed": 3}, ["finetune.seed 0 -> 3"]),
        ({"compressors__heavy__stride": 4}, ["compressors.heavy.stride 8 -> 4"]),
        ({"phases__finetune__learning_rate": 1e-4}, ["finetune.learning_rate none -> 0.0001",
          "finetune.learning_rate.language_model 2e-05 -> none", "finetune.learning_rate.projector 0.001 -> none"]),
        ({"data__train__max_samples": 50}, ["data.train.max_samples none -> 50"]),
        ({"phases__finetune__schedule": "wide"}, ["finetune.schedule heavy 0.5, full 0.5 -> wide"]),
        ({"phases__finetune__max_steps": 30}, ["finetune.steps 20 -> 30"]),
        ({"phases__finetune__lora": {"r": 16}}, ["finetune.lora.r 128 -> 16"]),
    ],
)  # fmt: skip
def test_differences_are_those_of_the_resolved_values(lab: Any, changes: dict[str, Any], told: list[str]) -> None:
    known = differences(cell_values(lab.cell()), cell_values(lab.cell(**changes)))
    assert sorted(known) == sorted(told)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"compressors__unused__stride": 5},
        {"phases__finetune__per_device_train_batch_size": 2},
        {"phases__finetune__deepspeed": "zero3"},
        {"evaluate": {}},
        {"phases__finetune__max_steps": 20, "phases__finetune__num_train_epochs": ...},
    ],
)
def test_what_is_no_part_of_a_cell_is_no_difference(lab: Any, changes: dict[str, Any]) -> None:
    changes = {key: value for key, value in changes.items() if value is not ...}
    assert lab.cell(**changes).id == lab.cell().id
    assert differences(cell_values(lab.cell()), cell_values(lab.cell(**changes))) == []


def test_a_new_cell_is_held_against_the_nearest_finished_one_and_shows_three_differences(lab: Any) -> None:
    near, far = lab.tree(), lab.tree(phases__finetune__max_grad_norm=2.0, phases__finetune__weight_decay=0.1)
    finish_all(walk_of(lab, far, near))
    new = lab.tree(seed=1, phases__finetune__warmup_ratio=0.1)
    many = lab.tree(
        phases__finetune__warmup_ratio=0.1, phases__finetune__max_steps=40, phases__finetune__global_batch_size=4,
        phases__finetune__model_max_length=512,
    )  # fmt: skip
    told = reasons(walk_of(lab, far, near, new, many))[2:]
    assert told[0][-1] == "differs from finished cell cell1: seed 0 -> 1, finetune.warmup_ratio 0.03 -> 0.1"
    assert told[1][-1].startswith("differs from finished cell cell1: ") and told[1][-1].endswith(" and 1 more")
    assert told[1][-1].count(" -> ") == 3


def test_a_cell_recorded_in_the_storage_is_compared_with_after_it_left_the_file(lab: Any) -> None:
    before = walk_of(lab, lab.tree())
    finish_all(before)
    write_cell_folder(before, before.cells[0], before.record(before.cells[0]))
    seed = {"seed": 1, "phases__finetune__seed": 7}
    assert reasons(walk_of(lab, lab.tree(**seed)))[0][-1] == "differs from finished cell cell0: finetune.seed 0 -> 7"


def test_other_content_of_the_same_values_is_told(lab: Any) -> None:
    finish_all(before := walk_of(lab, lab.tree()))
    write_cell_folder(before, before.cells[0], before.record(before.cells[0]))
    (lab.folder / "rows.json").write_text('[["What color?", "blue"]]')
    told = reasons(walk_of(lab, lab.tree(phases__finetune__max_steps=20)))[0][-1]
    assert told.startswith("differs from finished cell cell0: the content of its model, data or plug-ins")


def test_cells_of_other_experiments_are_not_compared_with(lab: Any) -> None:
    """A new experiment is new, however near a cell of another one may be."""
    other = walk_of(lab, lab.tree(name="other"))
    finish_all(other)
    write_cell_folder(other, other.cells[0], other.record(other.cells[0]))
    (told,) = reasons(walk_of(lab, lab.tree(name="mine", phases__finetune__warmup_ratio=0.1)))
    assert not any("differs" in reason for reason in told)


POOL = """
from typing import ClassVar, Literal
from orchestrator import plugin

class Pool(plugin.CompressorSpec):
    kind: Literal["edited_pool"] = "edited_pool"
    points: ClassVar = frozenset({"decoder"})
"""


def test_an_edited_plug_in_is_named(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_from_plugins", dict(registry._from_plugins))
    file = lab.folder / "pool.py"
    file.write_text(POOL)
    registry.load_plugin(str(file), lab.folder)
    tree = lab.tree(compressors__heavy={"kind": "edited_pool", "layer": 2, "stride": 8})
    finish_all(before := walk_of(lab, tree))
    write_cell_folder(before, before.cells[0], before.record(before.cells[0]))
    file.write_text(POOL + "# another source\n")
    (told,) = reasons(walk_of(lab, tree))
    assert told[-1] == "differs from finished cell cell0: plug-in pool.py was edited"


def test_long_values_are_told_by_their_beginning() -> None:
    found = differences(
        {"a": "x" * 500, "b": "/long/way/one", "c": "/long/one"}, {"a": "y", "b": "/other/way/two", "c": "/other/one"}
    )
    assert found == [f"a {'x' * 37}... -> y", "b one -> two", "c /long/one -> /other/one"]


def test_only_the_first_new_cells_are_compared(lab: Any) -> None:
    """So that a plan of very many cells does not compare each with each."""
    finish_all(walk_of(lab, lab.tree()))
    walk = walk_of(lab, lab.tree(), *(lab.tree(phases__finetune__seed=seed) for seed in range(1, 121)))
    told = [any(reason.startswith("differs") for reason in each) for each in reasons(walk)]
    assert told == [False] + [True] * 100 + [False] * 20


def test_totals_count_what_is_shared_and_hours_once_measured(two: ExperimentPlan, tmp_path: Path) -> None:
    totals = document(two)["totals"]
    assert (totals["stage_runs"], totals["stage_runs_alone"], totals["stage_runs_done"]) == (4, 6, 0)
    # full, heavy and wide of one cell each; `final` of one is `full`, of the other `wide`.
    assert (totals["evaluations"], totals["evaluations_alone"], totals["evaluations_done"]) == (5, 5, 0)
    assert totals["train_ratio"] == pytest.approx(totals["train_tflops_shared"] / totals["train_tflops_alone"])
    assert not any("hours" in name or "seconds" in name for name in totals)
    work = two.tree.work(two.ledger)
    for job in work[:3]:
        finish(two.ledger, job, train_seconds=1800.0, fingerprint={"world_size": 4, "device": "NVIDIA H100 80GB HBM3"})
    totals = document(two)["totals"]
    assert totals["gpu_hours_done"] == pytest.approx(2 * 0.5 * 4)
    costs = [run["cost"]["train_tflops"] for run in document(two)["stage_runs"]]
    left = 1800 * (costs[2] + costs[3]) / costs[1]  # at the speed of the phase's measured stage run
    assert totals["seconds_left"] == pytest.approx(left) and totals["gpu_hours_left"] == pytest.approx(left * 4 / 3600)
    for job in two.tree.work(two.ledger):
        finish(two.ledger, job)
    assert document(two)["totals"]["seconds_left"] == 0
