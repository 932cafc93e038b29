"""A model that no worker can hold: two ranks hold a share each, and answer as one with all of it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluated_state import HEAVY, MODEL, job, ledger_of
from training_workers import launch, never

from orchestrator.errors import StageRunError
from orchestrator.plan.jobs import EvaluationJob

ROWS = {"kind": "easy_vqa", "split": "test", "max_samples": 21}
FASTV = ({"kind": "fastv", "layer": 1, "keep_ratio": "1/2"},)
RANDOM = ({"kind": "random_drop", "layer": "projector", "keep_ratio": "1/2"},)


def _tests(digit: str, dtype: str) -> list[EvaluationJob]:
    """The same evaluations under identities that differ."""
    answers = {"kind": "exact_match", "data": "test", "batch_size": 4, "max_new_tokens": 3}
    tests: list[tuple[Any, dict[str, Any]]] = [
        ((), answers),
        (HEAVY, answers),
        (FASTV, answers),
        (RANDOM, answers),
        (HEAVY, {"kind": "loss", "data": "test", "batch_size": 4}),
    ]
    model = MODEL | {"dtype": dtype}
    return [
        replace(job(points, id=digit * 15 + str(i)), spec=spec, data=ROWS, model=model)
        for i, (points, spec) in enumerate(tests)
    ]


def whole(folder: Path, dtype: str) -> int:
    """Evaluate on one worker; return the model's parameters."""
    from orchestrator.dispatch.run_job import execute

    ledger, memory = ledger_of(folder), {}
    for test in _tests("a", dtype):
        execute(test, ledger, memory, never)
    return sum(parameter.numel() for parameter in memory["tested"][1].parameters())


def in_shares(folder: Path, dtype: str) -> dict[str, Any]:
    from orchestrator.dispatch.run_job import execute
    from orchestrator.plan.ledger import Ledger
    from orchestrator.training import distributed, engine

    given_config = engine.given_config

    def gathers_all(*args: Any) -> dict[str, Any]:
        config = given_config(*args)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # by default small ones stay whole
        return config

    engine.given_config = gathers_all
    distributed.device_memory_bytes = lambda: 0  # no device is so small: a limit is set in its place
    ledger, memory = Ledger(folder), {}
    for test in _tests("b", dtype):
        execute(test, ledger, memory, never)
    share = sum(parameter.ds_tensor.numel() for parameter in memory["tested"][1].parameters())
    held = sum(parameter.numel() for parameter in memory["tested"][1].parameters())
    stops = execute(job(HEAVY, id="c" * 16), ledger, memory, lambda: distributed.rank() == 1)
    timed = replace(job(id="d" * 16), spec={"kind": "latency", "data": "test", "repeats": 1})
    refusal = _message(lambda: execute(timed, ledger, memory, never))
    # Afterwards a whole one in the same workers: nothing of the divided model is left in its way.
    distributed.device_memory_bytes = lambda: 2**40
    execute(_tests("e", dtype)[0], ledger, {}, never)
    return {"share": share, "held": held, "stops": stops, "refusal": refusal}


def _message(action: Callable[[], object]) -> str:
    with pytest.raises(StageRunError) as told:
        action()
    return str(told.value)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_two_ranks_with_a_share_each_find_what_whole_models_find(tmp_path: Path, dtype: str) -> None:
    num_parameters = launch(1, whole, tmp_path, dtype)
    found = launch(2, in_shares, tmp_path, dtype)
    assert num_parameters / 2 <= found["share"] < 0.51 * num_parameters
    assert found["held"] == 0  # between forwards no parameter is whole
    assert found["stops"] == "interrupted"
    assert "latency" in found["refusal"] and "holds a share" in found["refusal"]
    from orchestrator.plan.ledger import Ledger

    ledger = Ledger(tmp_path)
    for alone, divided in zip(_tests("a", dtype), _tests("b", dtype), strict=True):
        one, other = ledger.evaluation(alone.id), ledger.evaluation(divided.id)
        assert one["metrics"] == other["metrics"], alone.points
        assert ledger.predictions(alone.id) == ledger.predictions(divided.id)
        assert one["num_samples"] == other["num_samples"] == 21
    assert ledger.evaluation("c" * 16) is None
    assert ledger.predictions("e" * 15 + "0") == ledger.predictions("a" * 15 + "0")
