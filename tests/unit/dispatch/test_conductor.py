"""The conductor alone: order, dependencies, attempts, ranks that differ, stops, groups that hang."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from conductor_drive import WILL_NOT, WILL_PASS, Group, conductor, error_of, evaluation, job, settled, told, unplanned

from orchestrator.dispatch.failures import Failure, describe
from orchestrator.errors import DamagedStateError, DataError, StageRunError


def test_work_is_handed_out_in_order_and_every_rank_gets_the_same(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), job("b", "a"), evaluation("e", "b"))
    group = Group(made, world_size=2)
    assert [group.ask(0), group.ask(1)] == ["a", "a"]
    for name in ("b", "e"):
        assert group.say(rank=0) == "wait"  # rank 1 has not said so yet
        assert [group.say(rank=1), group.ask(0)] == [name, name]
    group.say(rank=0)
    assert [group.say(rank=1), group.ask(0)] == ["stop", "stop"]
    assert settled(made) == ["a", "b", "e"]
    assert [e["event"] for e in made.poll("", 0)["events"][4:]] == ["started", "finished"]
    assert {e["lane"] for e in made.poll("", 0)["events"]} == {"lane"}


def test_that_no_further_plan_comes_is_no_new_plan(tmp_path: Path) -> None:
    """What is finished is not looked up again: of this job nothing is stored, so it would be done twice."""
    made = conductor(tmp_path, job("a"), closed=False)
    group = Group(made)
    assert [group.ask(), group.say()] == ["a", "wait"]
    made.set_work(None, True)
    assert group.ask() == "stop" and settled(made) == ["a"]
    again = unplanned(tmp_path, "another")  # one that has just been started has no plan yet
    again.set_work(None, True)
    assert Group(again).ask() == "wait"


def test_a_driver_that_waits_for_news_hears_of_an_event_at_once_and_of_none_later(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), job("b"))
    epoch, group = made.poll("", 0)["epoch"], Group(made)

    def seconds(epoch: str, seen: int) -> float:
        begun = time.monotonic()
        made.wait_for_news(epoch, seen)
        return time.monotonic() - begun

    assert seconds("an earlier life's", 0) < 1
    assert seconds(epoch, 0) >= 2  # nothing has happened
    threading.Timer(0.1, group.ask).start()
    assert 0.1 <= seconds(epoch, 0) < 1.5
    assert told(made) == [("started", "a")]


def test_what_starts_from_a_failed_job_is_not_run_and_siblings_go_on(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), job("b", "a"), job("c", "b"), evaluation("e", "b"), job("d", "a"))
    group = Group(made)
    group.ask()
    assert group.say() == "b"
    assert group.say(WILL_NOT) == "d"
    assert group.say() == "stop"
    assert settled(made) == ["a", "d"]
    assert settled(made, "failed") == ["b"] and error_of(made, "b") == "row 7 is broken"
    assert settled(made, "skipped") == ["c", "e"]


@pytest.mark.parametrize("max_failures", [0, 2])
def test_a_dead_worker_costs_an_attempt_and_there_are_so_many(tmp_path: Path, max_failures: int) -> None:
    made = conductor(tmp_path, job("a"), job("b"), max_failures=max_failures)
    tokens = []
    for attempt in range(max_failures + 1):
        group = Group(made)
        assert group.ask() == "a", attempt
        tokens.append(group.tokens["a"])
    assert Group(made).ask() == "b"
    assert told(made).count(("retried", "a")) == max_failures
    assert f"attempt {max_failures + 1} of {max_failures + 1}" in error_of(made, "a")
    assert tokens == sorted(set(tokens))  # what a dead group still writes is too late


def test_a_failure_that_may_pass_is_tried_again_in_a_fresh_group(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), job("b"))
    first = Group(made)
    first.ask()
    assert first.say(WILL_PASS) == "restart"
    assert Group(made).ask() == "a"
    assert made.poll("", 0)["events"][-1]["attempt"] == 2


def test_ranks_that_fail_alike_go_on_and_ranks_that_differ_start_anew(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), job("b"), job("c"))
    group = Group(made, world_size=2)
    group.ask(0), group.ask(1)
    group.say(WILL_NOT, 0)
    assert [group.say(WILL_NOT, 1), group.ask(0)] == ["b", "b"]
    group.say(WILL_NOT, 0)
    assert [group.say("finished", 1), group.ask(0)] == ["restart", "restart"]
    assert Group(made, world_size=2).ask() == "c"


def test_a_rank_that_waits_for_a_failed_one_is_given_up_after_a_while(tmp_path: Path) -> None:
    now = [0.0]
    made = conductor(tmp_path, job("a"), job("b"), patience_seconds=2.0, clock=lambda: now[0])
    group = Group(made, world_size=2)
    group.ask(0), group.ask(1)
    assert group.say(WILL_NOT, 1) == "wait"
    now[0] = 2.5
    assert group.ask(1) == "restart"
    assert error_of(made, "a") == "row 7 is broken"
    assert group.say(WILL_PASS, 0) == "restart"  # the late word of a group that was given up
    assert settled(made, "failed") == ["a"] and Group(made).ask() == "b"


def test_the_cause_is_told_and_not_what_followed_from_it(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"))
    group = Group(made, world_size=2)
    group.ask(0), group.ask(1)
    group.say(Failure("RuntimeError", "Connection closed by peer", True).to_json(), 0)
    group.say(WILL_NOT, 1)
    assert error_of(made, "a") == "row 7 is broken"


def test_a_stop_ends_the_lane_and_leaves_the_work(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), job("b"))
    group = Group(made)
    group.ask()
    assert not made.heartbeat(group.who(0), 1, False)["stop"]
    made.interrupt()
    assert made.heartbeat(group.who(0), 2, False)["stop"]
    assert group.say("interrupted") == "stop"
    assert told(made) == [("started", "a"), ("interrupted", "a")]


def test_a_lane_leaves_a_node_that_is_to_be_taken_away(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), job("b"), max_failures=1)
    group, other = Group(made, world_size=2), Group(made, "other", nodes="gamma")
    assert [group.ask(0), group.ask(1), other.ask()] == ["a", "a", "b"]
    made.nodes_leave(["beta"])
    assert all(made.heartbeat(group.who(rank), 1, False)["stop"] for rank in (0, 1))
    assert not made.heartbeat(other.who(0), 1, False)["stop"]
    assert [group.say("interrupted", rank) for rank in (0, 1, 0)] == ["wait", "restart", "restart"]
    again = Group(made, world_size=2, nodes="alpha gamma")
    assert [again.ask(0), again.ask(1)] == ["a", "a"] and not made.heartbeat(again.who(1), 1, False)["stop"]
    # That it moved is no failed attempt: it has both of its own still.
    assert [again.say(WILL_PASS, 0), again.say(WILL_PASS, 1)] == ["wait", "restart"]
    last = Group(made, nodes="alpha")
    assert [last.ask(), last.say(), other.say(), last.ask()] == ["a", "wait", "stop", "stop"]
    assert settled(made) == ["a", "b"]


def test_a_lane_takes_up_nothing_on_a_node_that_is_to_be_taken_away(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), job("b"))
    group = Group(made)
    group.ask()
    made.nodes_leave(["alpha"])
    assert group.say() == "restart" and settled(made) == ["a"]  # what it had just done counts
    made.nodes_leave([])
    assert Group(made).ask() == "b"


def test_fail_fast_hands_out_nothing_more(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), job("b"), fail_fast=True)
    group = Group(made)
    group.ask()
    assert group.say(WILL_NOT) == "stop"
    assert settled(made, "started") == ["a"]


def test_a_lane_waits_for_what_may_still_be_planned_although_all_so_far_failed(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), closed=False, max_failures=0)
    group = Group(made)
    group.ask()
    assert group.say(WILL_PASS) == "restart" and settled(made, "failed") == ["a"]
    later = Group(made)
    assert later.ask() == "wait"
    made.set_work([job("x")], True)
    assert [later.ask(), later.say()] == ["x", "stop"]


def test_a_lane_that_dies_before_it_works_is_given_up_and_another_goes_on(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"))
    for _ in range(4):
        last = Group(made, "bad")
    assert last.ask() == "stop"
    assert "before they took up any work" in made.poll("", 0)["given_up"]["bad"]
    assert Group(made, "good").ask() == "a"


def test_a_group_that_makes_no_progress_is_told_of_once_its_stacks_are_written(tmp_path: Path) -> None:
    now = [0.0]
    made = conductor(tmp_path, job("a"), stall_seconds=60.0, clock=lambda: now[0])
    group = Group(made, world_size=2)
    group.ask(0), group.ask(1)
    for now[0] in (30.0, 60.0, 90.0, 120.0):
        assert not made.heartbeat(group.who(0), int(now[0]), False)["dump"]
        made.heartbeat(group.who(1), 1, False)
        assert made.poll("", 0)["hung"] == []
    for now[0] in (150.0, 181.0):
        for rank in (0, 1):
            made.heartbeat(group.who(rank), (120, 1)[rank], False)
    assert made.poll("", 0)["hung"] == []
    assert [made.heartbeat(group.who(rank), 120, False)["dump"] for rank in (0, 1)] == [True, True]
    for rank in (0, 1):
        made.heartbeat(group.who(rank), 120, True)
    hung = made.poll("", 0)["hung"]
    assert [(one["rank"], one["job"], one["silent"]) for one in hung] == [(0, "a", False), (1, "a", False)]
    assert "no rank made progress for 1 minutes" in hung[0]["why"]
    assert made.poll("", 0)["hung"] == []
    assert Group(made, world_size=2).ask() == "a"
    assert "no rank made progress" in error_of(made, "a") and told(made)[1] == ("retried", "a")


def test_a_silent_rank_is_found_although_the_others_speak(tmp_path: Path) -> None:
    now = [0.0]
    made = conductor(tmp_path, job("a"), stall_seconds=60.0, clock=lambda: now[0])
    group = Group(made, world_size=2)
    group.ask(0), group.ask(1)
    now[0] = 61.0
    made.heartbeat(group.who(0), 5, False)
    made.poll("", 0)
    made.heartbeat(group.who(0), 5, True)
    hung = made.poll("", 0)["hung"]
    assert [one["silent"] for one in hung] == [False, True] and "rank 1 sent no heartbeat" in hung[0]["why"]


def test_a_rank_that_froze_after_the_last_progress_is_the_reason(tmp_path: Path) -> None:
    """The group is found hung before the rank has been silent for long enough."""
    now = [0.0]
    made = conductor(tmp_path, job("a"), stall_seconds=60.0, clock=lambda: now[0])
    group = Group(made, world_size=2)
    group.ask(0), group.ask(1)
    for now[0], ranks in ((0.0, (0, 1)), (0.9, (1,)), (60.5, (0,))):
        for rank in ranks:
            made.heartbeat(group.who(rank), 1, False)
    assert made.poll("", 0)["hung"] == []  # the frozen rank could still write its stack
    now[0] = 61.5
    made.heartbeat(group.who(0), 1, True)
    hung = made.poll("", 0)["hung"]
    assert [one["silent"] for one in hung] == [False, True] and "rank 1 sent no heartbeat" in hung[0]["why"]


def test_a_lane_with_a_worker_where_something_is_lacking_is_given_up_with_the_reason(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"))
    who = {"lane": "lane", "attempt": "late", "world_size": 2, "rank": 0, "unfit": "node b: /data: no such folder"}
    made.begin(who)
    assert [made.next_item({**who, "rank": rank}, 0, None, None) for rank in (0, 1)] == ["stop", "stop"]
    assert made.poll("", 0)["given_up"] == {"lane": "node b: /data: no such folder"}
    assert Group(made, lane="other").ask() == "a"


def test_what_the_spec_data_code_or_a_plugin_caused_is_not_tried_again() -> None:
    wrapped = StageRunError("ConnectionResetError: gone")
    wrapped.__cause__ = ConnectionResetError("gone")
    for stays in (
        DataError("row 7 is broken"),
        StageRunError("diverged"),
        TypeError("no such argument"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
        FileNotFoundError("no such file"),
        OSError(28, "No space left on device"),
        DamagedStateError("cut short", "p"),
    ):
        assert not describe(stays).retry, stays
    for passes in (
        ConnectionResetError("gone"),
        TimeoutError("late"),
        wrapped,
        RuntimeError("NCCL error: unhandled system error"),
        RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
    ):
        assert describe(passes).retry, passes
    assert describe(DamagedStateError("cut short", "p")).damaged == "p"
    out_of_memory = describe(MemoryError())
    assert not out_of_memory.retry and "per_device_train_batch_size" in out_of_memory.message
