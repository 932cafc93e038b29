"""Phases whose length is a cost: what another schedule costs, or what may be spent."""

from __future__ import annotations

import pytest
from repository import ROOT

from orchestrator.errors import UsageError
from orchestrator.plan.cells.expand import steps_of_cost
from orchestrator.plan.experiment_plan import prepare

BASE = ROOT / "experiments" / "base" / "tiny_llava.yaml"
TEXT = f"""\
name: lengths
extends: {BASE}
compressors:
  heavy: {{kind: average_pool, layer: 1, stride: 8}}
schedules:
  two: {{kind: stages, stages: [{{share: 1/2, compressor: heavy}}, {{}}]}}
phases:
  finetune: {{PHASE}}
matrix:
  phases.finetune.schedule: [full, heavy, two]
"""


@pytest.fixture
def planned(tmp_path, monkeypatch):
    from orchestrator.plan.documents import plan_document

    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))

    def plan(phase):
        file = tmp_path / "lengths.yaml"
        file.write_text(TEXT.replace("{PHASE}", phase))
        walk = prepare(file)
        document = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger)
        by_name = {cell["axes"]["phases.finetune.schedule"]: cell for cell in document["cells"]}
        steps = {cell.axes["phases.finetune.schedule"]: cell.phases[0].total_steps for cell in walk.cells}
        return steps, {name: cell["cost"]["train_tflops"] for name, cell in by_name.items()}

    return plan


def test_arms_of_equal_training_cost(planned):
    steps, tflops = planned("{max_steps: 400, match_train_tflops: full}")
    assert steps["full"] == 400 and steps["heavy"] > steps["two"] > 400
    for name in ("heavy", "two"):
        a_step = tflops[name] / steps[name]
        assert abs(tflops[name] - tflops["full"]) <= 1.01 * a_step


def test_the_named_schedule_itself_keeps_its_length(planned):
    steps, _ = planned("{max_steps: 401, match_train_tflops: two}")
    assert steps["two"] == 401 and steps["full"] < 401 < steps["heavy"]


def test_without_a_length_beside_it_the_schedule_is_taken_over_one_epoch(planned):
    epoch, _ = planned("{max_steps: null, num_train_epochs: 1}")
    matched, _ = planned("{max_steps: null, match_train_tflops: full}")
    assert matched["full"] == epoch["full"]


def test_what_may_be_spent_is_not_exceeded_and_almost_used(planned):
    steps, tflops = planned("{max_steps: null, max_train_tflops: 1.5}")
    for name, cost in tflops.items():
        assert cost <= 1.5 < cost + 1.5 * cost / steps[name]


def test_too_little_is_told(planned):
    with pytest.raises(UsageError, match=r"max_train_tflops: 0\.001 TFLOPs are too few"):
        planned("{max_steps: null, max_train_tflops: 0.001}")


def test_search_of_steps_with_costs_that_are_not_linear():
    def price(steps):
        return None if steps < 3 else float(steps * 2 + steps // 4)

    assert steps_of_cost(price(17), price, at_most=True) == 17
    assert steps_of_cost(price(17) + 0.5, price, at_most=True) == 17
    assert steps_of_cost(price(17) + 0.5, price, at_most=False) == 17
    assert steps_of_cost(price(18) - 0.5, price, at_most=False) == 18
    with pytest.raises(ValueError, match="too few"):
        steps_of_cost(5.0, price, at_most=True)
