"""The conductor alone: order, dependencies, attempts, ranks that differ, stops."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.dispatch.conductor import Conductor
from orchestrator.dispatch.failures import Failure, describe
from orchestrator.errors import DataError, StageRunError

WILL_PASS = Failure("OSError", "the file server went away", True).to_json()
WILL_NOT = Failure("DataError", "row 7 is broken", False).to_json()


def job(name: str, parent: str | None = None) -> dict[str, Any]:
    return {"type": "stage", "id": name, "parent": parent or "done-before"}


def evaluation(name: str, state: str) -> dict[str, Any]:
    return {"type": "evaluation", "id": name, "state": state}


def told(conductor: Conductor) -> list[tuple[str, str]]:
    return [(event["event"], event["id"]) for event in conductor.events(0)]


def test_work_is_handed_out_in_order_and_every_rank_gets_the_same() -> None:
    conductor = Conductor([job("a"), job("b", "a"), evaluation("e", "b")])
    attempt = conductor.begin("lane", world_size=2)
    for k, name in enumerate(("a", "b", "e")):
        assert conductor.item(attempt, k)["id"] == name
        assert conductor.item(attempt, k)["id"] == name
        conductor.finished(attempt, k, 0)
        assert conductor.item(attempt, k + 1) == "wait"  # rank 1 has not said so yet
        conductor.finished(attempt, k, 1)
    assert conductor.item(attempt, 3) == "stop"
    assert conductor.outcome().finished == ("a", "b", "e")
    assert [event["event"] for event in conductor.events(4)] == ["started", "finished"]


def test_what_starts_from_a_failed_job_is_not_run_and_siblings_go_on() -> None:
    conductor = Conductor([job("a"), job("b", "a"), job("c", "b"), evaluation("e", "b"), job("d", "a")])
    attempt = conductor.begin("lane", 1)
    conductor.item(attempt, 0)
    conductor.finished(attempt, 0, 0)
    assert conductor.item(attempt, 1)["id"] == "b"
    conductor.failed(attempt, 1, 0, WILL_NOT)
    assert conductor.item(attempt, 2)["id"] == "d"
    conductor.finished(attempt, 2, 0)
    assert conductor.item(attempt, 3) == "stop"
    outcome = conductor.outcome()
    assert (outcome.finished, outcome.failed) == (("a", "d"), {"b": "row 7 is broken"})
    assert outcome.skipped == ("c", "e")
    assert ("skipped", "c") in told(conductor)


@pytest.mark.parametrize("max_failures", [0, 2])
def test_a_dead_worker_costs_an_attempt_and_there_are_so_many(max_failures: int) -> None:
    conductor = Conductor([job("a"), job("b")], max_failures=max_failures)
    for attempt in range(max_failures + 1):
        assert conductor.item(conductor.begin("lane", 1), 0)["id"] == "a", attempt
    last = conductor.begin("lane", 1)
    assert conductor.item(last, 0)["id"] == "b"
    assert [event for event, name in told(conductor) if name == "a"].count("retried") == max_failures
    assert f"attempt {max_failures + 1} of {max_failures + 1}" in conductor.outcome().failed["a"]


def test_a_failure_that_may_pass_is_tried_again_in_a_fresh_group() -> None:
    conductor = Conductor([job("a"), job("b")])
    first = conductor.begin("lane", 1)
    conductor.item(first, 0)
    conductor.failed(first, 0, 0, WILL_PASS)
    assert conductor.item(first, 1) == "restart"
    second = conductor.begin("lane", 1)
    assert conductor.item(second, 0)["id"] == "a"
    assert conductor.events(0)[-1]["attempt"] == 2


def test_ranks_that_fail_alike_go_on_and_ranks_that_differ_start_anew() -> None:
    conductor = Conductor([job("a"), job("b"), job("c")])
    attempt = conductor.begin("lane", 2)
    conductor.item(attempt, 0)
    for rank in (0, 1):
        conductor.failed(attempt, 0, rank, WILL_NOT)
    assert conductor.item(attempt, 1)["id"] == "b"
    conductor.failed(attempt, 1, 0, WILL_NOT)
    conductor.finished(attempt, 1, 1)
    assert conductor.item(attempt, 2) == "restart"
    assert conductor.item(conductor.begin("lane", 2), 0)["id"] == "c"


def test_a_rank_that_waits_for_a_failed_one_is_given_up_after_a_while() -> None:
    now = [0.0]
    conductor = Conductor([job("a"), job("b")], patience_seconds=2.0, clock=lambda: now[0])
    attempt = conductor.begin("lane", 2)
    conductor.item(attempt, 0)
    conductor.failed(attempt, 0, 1, WILL_NOT)
    assert conductor.item(attempt, 1) == "wait"
    now[0] = 2.5
    assert conductor.item(attempt, 1) == "restart"
    assert conductor.outcome().failed == {"a": "row 7 is broken"}
    conductor.failed(attempt, 0, 0, WILL_PASS)  # the late word of a group that was given up
    assert conductor.item(conductor.begin("lane", 2), 0)["id"] == "b"


def test_the_cause_is_told_and_not_what_followed_from_it() -> None:
    conductor = Conductor([job("a")])
    attempt = conductor.begin("lane", 2)
    conductor.item(attempt, 0)
    conductor.failed(attempt, 0, 0, Failure("RuntimeError", "Connection closed by peer", True).to_json())
    conductor.failed(attempt, 0, 1, WILL_NOT)
    assert conductor.outcome().failed == {"a": "row 7 is broken"}


def test_a_stop_ends_the_lane_and_leaves_the_work() -> None:
    conductor = Conductor([job("a"), job("b")])
    attempt = conductor.begin("lane", 1)
    conductor.item(attempt, 0)
    conductor.interrupt()
    assert conductor.stopping()
    conductor.interrupted(attempt, 0, 0)
    assert conductor.item(attempt, 1) == "stop"
    outcome = conductor.outcome()
    assert (outcome.left, outcome.interrupted, outcome.failed) == (("a", "b"), True, {})
    assert told(conductor) == [("started", "a"), ("interrupted", "a")]


def test_fail_fast_hands_out_nothing_more() -> None:
    conductor = Conductor([job("a"), job("b")], fail_fast=True)
    attempt = conductor.begin("lane", 1)
    conductor.item(attempt, 0)
    conductor.failed(attempt, 0, 0, WILL_NOT)
    assert conductor.item(attempt, 1) == "stop"
    assert conductor.outcome().left == ("b",)


def test_a_lane_that_dies_before_it_works_is_given_up() -> None:
    conductor = Conductor([job("a")])
    for _ in range(4):
        last = conductor.begin("lane", 1)
    assert conductor.item(last, 0) == "stop"
    assert "before they took up any work" in (conductor.fatal() or "")


def test_a_second_lane_waits_for_the_parent_the_first_one_trains() -> None:
    conductor = Conductor([job("a"), job("b", "a")])
    one, two = conductor.begin("one", 1), conductor.begin("two", 1)
    conductor.item(one, 0)
    assert conductor.item(two, 0) == "wait"
    conductor.finished(one, 0, 0)
    assert conductor.item(two, 0)["id"] == "b"


def test_what_the_spec_data_or_code_caused_is_not_tried_again() -> None:
    assert not describe(DataError("row 7 is broken")).retry
    assert not describe(StageRunError("diverged")).retry
    assert not describe(TypeError("no such argument")).retry
    assert describe(ConnectionResetError("gone")).retry
    assert describe(RuntimeError("NCCL error")).retry
    out_of_memory = describe(MemoryError())
    assert not out_of_memory.retry
    assert "per_device_train_batch_size" in out_of_memory.message
