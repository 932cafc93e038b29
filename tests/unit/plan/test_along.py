"""Evaluations along the way: states that the tree is cut at, jobs like others, and no other identity of anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_tree import finish

from orchestrator.errors import UsageError
from orchestrator.plan.jobs import EvaluationJob, StageJob
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.tree import build_stage_tree

EVERY = {"every_steps": 8}


def test_a_tree_is_cut_where_a_state_is_tested_and_every_id_stays(lab: Any) -> None:
    plain, tested = lab.cell(), lab.cell(evaluate__score__at=EVERY)
    assert (plain.id, plain.state) == (tested.id, tested.state)
    assert [test.id for test in plain.evaluations] == [test.id for test in tested.evaluations]
    # pretrain has 10 steps, finetune 20; each evaluation has three variants, of which final and full are one.
    assert [(each.step, each.last_step) for each in tested.along[::3]] == [(8, 7), (8, 17), (16, 25)]
    before, after = build_stage_tree([plain]), build_stage_tree([tested])
    assert before.stage_runs.keys() < after.stage_runs.keys()
    cuts = [(job.phase, job.first_step, job.last_step) for job in after.stage_runs.values()]
    assert cuts == [
        ("pretrain", 0, 8), ("pretrain", 8, 10), ("finetune", 0, 8), ("finetune", 8, 10), ("finetune", 10, 16),
        ("finetune", 16, 20),
    ]  # fmt: skip
    assert len(after.evaluations) == 4 * 2 and all(job.state in after.stage_runs for job in after.evaluations.values())


def test_stage_ends_cut_nothing_and_are_shared_by_cells_that_begin_alike(lab: Any) -> None:
    cells = lab.schedules("two", ["heavy", "wide"], evaluate__score__at="stage_ends", evaluate__score__under="full")
    plain = build_stage_tree(lab.schedules("two", ["heavy", "wide"]))
    tree = build_stage_tree(cells)
    assert list(tree.stage_runs) == list(plain.stage_runs)
    assert [[each.last_step for each in cell.along] for cell in cells] == [[9, 19], [9, 19]]
    assert len(tree.evaluations) == 2 + 2, "the first two states are both cells'"


def test_a_test_comes_right_after_its_state_and_one_added_later_trains_up_to_it(lab: Any, tmp_path: Any) -> None:
    ledger = Ledger(tmp_path / "ledger")
    plain = build_stage_tree([lab.cell(phases__pretrain=...)])
    for job in plain.work(ledger):
        finish(ledger, job)
    tested = build_stage_tree(
        [lab.cell(phases__pretrain=..., evaluate__score__at=EVERY, evaluate__score__under="full")]
    )
    work = tested.work(ledger)
    steps = [(job.first_step, job.last_step) if isinstance(job, StageJob) else "test" for job in work]
    assert steps == [(0, 8), "test", (10, 16), "test"], "step 10, a stage's end, is stored"
    assert [job.state for job in work if isinstance(job, EvaluationJob)] == [job.id for job in work[::2]]
    for job in work:
        finish(ledger, job)
    assert tested.work(ledger) == []


def test_when_and_which_cells_are_no_part_of_a_job(lab: Any) -> None:
    (plain,), (tested,) = lab.schedules("two"), lab.schedules("two", evaluate__score__at="stage_ends")
    assert tested.evaluations == plain.evaluations
    assert not {"at", "cells"} & tested.along[0].job.spec.keys()
    assert "at" not in json.dumps(plain.spec.model_dump(mode="json")["evaluate"]["score"]).split('"')


LEARNED = {"kind": "q_former", "layer": 1, "keep_tokens": 4}


def test_a_learned_compressor_is_not_tested_before_a_stage_used_it(lab: Any) -> None:
    changes = {"compressors__learned": LEARNED, "phases__pretrain": ..., "evaluate__score__at": "stage_ends"}
    with pytest.raises(UsageError, match=r"after step 10 of phases\.finetune no stage has used the learned compressor"):
        lab.schedules(["heavy", "learned"], **changes)
    (early,) = lab.schedules(["learned", "heavy"], **changes)
    assert {each.step for each in early.along} == {10}
