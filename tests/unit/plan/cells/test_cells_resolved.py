"""What a cell is resolved to: evaluations, layers, amounts and lengths."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import UsageError

F = "phases__finetune__"
HEAVY = {"kind": "average_pool", "layer": 2, "stride": 8}


def test_evaluations_have_an_identity_of_their_own(lab: Any) -> None:
    def ids(**change: Any) -> dict[str, str]:
        return {job.under: job.id for job in lab.cell(**change).evaluations}

    before = ids()
    assert ids(evaluate__score__max_new_tokens=9) != before
    assert ids(data__test__max_samples=5)["heavy"] != before["heavy"]
    assert ids(seed=1)["heavy"] != before["heavy"]
    changed = ids(compressors__heavy__positions="first")
    assert changed["heavy"] != before["heavy"]


def test_final_is_the_last_stages_variant_and_shares_with_its_name(lab: Any) -> None:
    jobs = {job.under: job for job in lab.cell().evaluations}
    assert jobs["final"].points == ()
    assert jobs["final"].id == jobs["full"].id != jobs["heavy"].id
    jobs = {job.under: job for job in lab.schedules("heavy")[0].evaluations}
    assert jobs["final"].id == jobs["heavy"].id != jobs["full"].id


def test_no_phase_tests_the_model_as_it_comes(lab: Any) -> None:
    cell = lab.cell(phases={})
    assert cell.phases == () and cell.state == cell.root.id
    assert {job.state for job in cell.evaluations} == {cell.root.id}
    assert cell.id == lab.cell(phases={}, evaluate={}).id


def test_layers_are_resolved_integers(lab: Any) -> None:
    (action,) = lab.schedules("light")[0].phases[1].table
    assert action.points[0]["layer"] == 3  # 75 % of 4


def test_layer_average_tokens_is_solved_for_keep_tokens(lab: Any) -> None:
    variant = {"kind": "average_pool", "layer": 2, "layer_average_tokens": 40}
    (action,) = lab.schedules("heavy", compressors__heavy=variant)[0].phases[1].table
    assert action.points[0]["keep_tokens"] == 16  # (2 * 64 + 2 * 16) / 4 = 40
    assert action.points[0]["layer_average_tokens"] is None
    same = lab.schedules("heavy", compressors__heavy={"kind": "average_pool", "layer": 2, "keep_tokens": 16})[0]
    assert same.id == lab.schedules("heavy", compressors__heavy=variant)[0].id


def test_steps_of_epochs(lab: Any) -> None:
    cell = lab.cell(phases__finetune__max_steps=..., phases__finetune__num_train_epochs=1)
    assert cell.phases[1].total_steps == -(-(100 + 30) // 8)
    few = {"phases__finetune__max_steps": ..., "phases__finetune__num_train_epochs": 0.01}
    assert lab.cell(**few, phases__finetune__schedule="full").phases[1].total_steps == 1


def test_data_that_is_not_here(lab: Any) -> None:
    gone = {"data__train__file": "/not/here.json", "phases__finetune__max_steps": ...}
    gone["phases__finetune__num_train_epochs"] = 1
    with pytest.raises(UsageError, match="num_samples"):
        lab.cell(**gone)
    cell = lab.cell(**gone, data__train__num_samples=1000)
    assert cell.phases[1].total_steps == -(-1030 // 8)
    assert "/not/here.json" in cell.notices[0]


@pytest.mark.parametrize("key", ["max_train_tflops", "match_train_tflops"])
def test_lengths_by_cost_need_the_cost_of_a_step(lab: Any, key: str) -> None:
    length = {
        f"phases__finetune__{key}": 3.0 if key.startswith("max") else "two",
        "data__train__file": "/not/here.json",
    }
    with pytest.raises(UsageError, match=f"phases.finetune.{key}: the cost of a step is not known here"):
        lab.cell(**length)


def test_a_phase_without_a_length_is_refused(lab: Any) -> None:
    with pytest.raises(UsageError, match="max_steps or num_train_epochs"):
        lab.cell(phases__finetune__max_steps=...)
