"""A conductor that is started again, that shares the storage with another driver, or that meets a damaged state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conductor_drive import WILL_NOT, WILL_PASS, Group, conductor, error_of, evaluation, job, settled, told, unplanned

from orchestrator.dispatch.driver import Hooks, RunState
from orchestrator.dispatch.failures import Failure
from orchestrator.errors import StaleWriterError, StorageError
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.backends.folder import FolderBackend

JOBS = (job("a"), job("b", "a"), job("c", "b"))


def store(storage: Path, name: str) -> None:
    """A whole state, as a stage run leaves it."""
    ledger = Ledger(storage)
    folder = ledger.writing_folder(name)
    for part, file in (("weights", "model.safetensors"), ("checkpoint", "shard")):
        (folder / part).mkdir()
        (folder / part / file).write_bytes(name.encode() * 100)
    (folder / "job.json").write_text(json.dumps(job(name)))
    (folder / "result.json").write_text("{}")
    ledger.commit(name)


def state_of(made) -> RunState:
    state = RunState([], Hooks())
    state.take(made.poll("", 0)["events"])
    return state


def again(storage: Path, state: RunState, *jobs: dict):
    """The same driver's conductor after its death: nothing but the ledger, the plan and what the driver heard."""
    made = unplanned(storage)
    made.set_work(jobs, True, state.known())
    return made


@pytest.mark.parametrize("first_to_ask", [0, 1])
def test_ranks_go_on_in_step_when_it_dies_while_they_work(tmp_path: Path, first_to_ask: int) -> None:
    before = conductor(tmp_path, *JOBS)
    group = Group(before, world_size=2)
    group.ask(0), group.ask(1)
    state = state_of(before)
    group.made = after = again(tmp_path, state, *JOBS)
    other = 1 - first_to_ask
    assert group.say(rank=first_to_ask) == "wait"
    assert [group.say(rank=other), group.ask(first_to_ask)] == ["b", "b"]
    assert settled(after) == ["a"]


def test_a_rank_that_hangs_since_before_it_died_is_found(tmp_path: Path) -> None:
    now = [0.0]
    before = conductor(tmp_path, *JOBS)
    group = Group(before)
    group.ask()
    state = state_of(before)
    made = unplanned(tmp_path, stall_seconds=60.0, clock=lambda: now[0])
    made.set_work(JOBS, True, state.known())
    for now[0] in (0.0, 30.0, 61.0):
        made.heartbeat(group.who(0), 7, True, (0, None))
        hung = made.poll("", 0)["hung"]
    assert [(one["job"], one["silent"]) for one in hung] == [("a", False)]


def test_a_rank_that_had_not_asked_yet_gets_what_the_other_was_given(tmp_path: Path) -> None:
    before = conductor(tmp_path, *JOBS)
    group = Group(before, world_size=2)
    group.ask(0), group.ask(1)
    group.say(rank=0), group.say(rank=1)
    assert group.last == ["a", "b"]  # rank 1 was told of b, rank 0 still waits for its answer
    group.said[0] = "finished"
    store(tmp_path, "a")
    group.made = after = again(tmp_path, state_of(before), *JOBS)
    assert group.ask(0) == "b"
    group.say(rank=0)
    assert [group.say(rank=1), group.ask(0)] == ["c", "c"]
    assert settled(after) == ["b"]


def test_a_new_group_gets_what_the_old_one_had_in_hand(tmp_path: Path) -> None:
    before = conductor(tmp_path, *JOBS, max_failures=3)
    Group(before).ask()
    after = again(tmp_path, state_of(before), *JOBS)
    assert Group(after).ask() == "a"
    assert told(after) == [("retried", "a"), ("started", "a")]
    assert [event["attempt"] for event in after.poll("", 0)["events"]] == [1, 2]


def test_nobody_is_answered_before_the_plan_is_there_and_failures_are_remembered(tmp_path: Path) -> None:
    before = conductor(tmp_path, *JOBS, job("x"))
    group = Group(before)
    group.ask()
    assert group.say(WILL_NOT) == "x"
    state = state_of(before)
    group.made = after = unplanned(tmp_path)
    assert group.say() == "wait"
    after.set_work([*JOBS, job("x")], True, state.known())
    assert group.ask() == "stop"
    state.take(after.poll(state.epoch, 0)["events"])
    state.jobs = [*JOBS, job("x")]
    outcome = state.outcome(False)
    assert (outcome.finished, outcome.failed, outcome.left) == (("x",), {"a": "row 7 is broken"}, ())
    assert outcome.skipped == ("b", "c")


def test_two_drivers_do_each_job_once(tmp_path: Path) -> None:
    now = [0.0]
    one = conductor(tmp_path, job("a"), job("b"), clock=lambda: now[0])
    two = conductor(tmp_path, job("a"), job("b"), driver="you", clock=lambda: now[0])
    first, second = Group(one), Group(two)
    assert [first.ask(), second.ask()] == ["a", "b"]
    store(tmp_path, "a"), store(tmp_path, "b")
    assert [first.say(), second.say()] == ["wait", "wait"]
    now[0] += 3
    assert settled(one) == ["a", "b"] and settled(two) == ["b", "a"]
    assert [e.get("elsewhere", False) for e in two.poll("", 0)["events"] if e["event"] == "finished"] == [False, True]
    assert [first.ask(), second.ask()] == ["stop", "stop"]


def test_what_another_driver_has_in_hand_is_waited_for(tmp_path: Path) -> None:
    now = [0.0]
    one = conductor(tmp_path, *JOBS)
    two = conductor(tmp_path, *JOBS, driver="you", clock=lambda: now[0])
    first, second = Group(one), Group(two)
    assert [first.ask(), second.ask()] == ["a", "wait"]
    store(tmp_path, "a")
    first.say()
    now[0] += 3
    assert settled(two) == ["a"]
    assert second.ask() == "wait"  # b is the first driver's by now
    one.leave()
    now[0] += 3
    two.poll("", 0)
    assert second.ask() == "b"


def test_what_failed_at_another_driver_has_failed(tmp_path: Path) -> None:
    now = [0.0]
    one = conductor(tmp_path, *JOBS)
    two = conductor(tmp_path, *JOBS, driver="you", clock=lambda: now[0])
    first, second = Group(one), Group(two)
    assert [first.ask(), second.ask()] == ["a", "wait"]
    first.say(WILL_NOT)
    now[0] += 3
    assert settled(two, "failed") == ["a"] and error_of(two, "a") == "row 7 is broken"
    assert settled(two, "skipped") == ["b", "c"] and second.ask() == "stop"


def test_a_job_that_was_taken_over_is_left_to_the_other_driver_without_a_charge(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"), max_failures=0)
    group = Group(made)
    group.ask()
    stale = Failure(StaleWriterError.__name__, "taken over", False).to_json()
    assert group.say(stale) == "wait"
    assert settled(made, "failed") == [] and ("retried", "a") in told(made)


def damaged(state: str) -> dict:
    return Failure("DamagedStateError", f"{state} is cut short", False, damaged=state).to_json()


def test_a_damaged_parent_leaves_the_ledger_and_is_done_again_before_its_child(tmp_path: Path) -> None:
    store(tmp_path, "a")
    made = conductor(tmp_path, job("b", "a"), job("x"), plans_again=True, max_failures=0)
    group = Group(made)
    assert group.ask() == "b"
    (tmp_path / "stage_runs" / "a" / "checkpoint" / "shard").write_bytes(b"b" * 100)
    assert group.say(damaged("a")) == "x"
    assert group.say() == "wait"  # b waits for a new plan
    assert not Ledger(tmp_path).is_done("a")
    events = made.poll("", 0)["events"]
    assert [(e["id"], e["state"]) for e in events if e["event"] == "damaged"] == [("b", "a")]
    made.set_work([job("a"), job("b", "a")], True)
    assert group.ask() == "a"
    store(tmp_path, "a")
    assert group.say() == "b"
    assert made.poll("", 0)["events"][-1]["attempt"] == 1  # the damage was not its fault


def test_a_state_that_is_whole_stays_and_the_job_is_charged(tmp_path: Path) -> None:
    store(tmp_path, "a")
    made = conductor(tmp_path, evaluation("e", "a"), plans_again=True, max_failures=1)
    group = Group(made)
    assert [group.ask(), group.say(damaged("a")), group.say(damaged("a"))] == ["e", "e", "stop"]
    assert Ledger(tmp_path).is_done("a") and settled(made, "failed") == ["e"]


def test_a_failure_is_in_the_ledger_and_a_success_takes_it_out(tmp_path: Path) -> None:
    made = conductor(tmp_path, job("a"))
    group = Group(made)
    group.ask(), group.say(WILL_NOT)
    note = Ledger(tmp_path).failure("a")
    assert note is not None and note["error"] == "row 7 is broken" and note["log"].endswith("a/log.txt")
    made.leave()
    later = Group(conductor(tmp_path, job("a"), driver="later"))
    later.ask(), later.say()
    assert Ledger(tmp_path).failure("a") is None


def test_what_was_begun_and_never_told_of_can_still_fail(tmp_path: Path) -> None:
    group = Group(conductor(tmp_path, job("a")))
    group.ask()
    group.made = after = again(tmp_path, RunState([], Hooks()), job("a"))
    assert group.say(WILL_PASS) == "restart"
    assert Group(after).ask() == "a" and after.poll("", 0)["events"][-1]["attempt"] == 2


def test_others_see_it_live_while_its_lanes_are_busy_for_long(tmp_path: Path) -> None:
    before = conductor(tmp_path, job("a"))
    Group(before).ask()
    beat = tmp_path / "owners" / "me.json"
    last = beat.read_bytes()
    after = again(tmp_path, state_of(before), job("a"))
    assert beat.read_bytes() != last, "nobody asks it for work now, and yet it lives"
    before.leave(), after.leave()


def test_a_run_that_ends_with_its_first_failure_still_does(tmp_path: Path) -> None:
    before = conductor(tmp_path, job("a"), job("x"), fail_fast=True)
    group = Group(before)
    group.ask(), group.say(WILL_NOT)
    after = unplanned(tmp_path, fail_fast=True)
    after.set_work([job("a"), job("x")], True, state_of(before).known())
    assert Group(after).ask() == "stop" and after.is_stopping()


def test_a_storage_that_is_away_at_a_takeover_loses_no_job(tmp_path: Path) -> None:
    now = [0.0]
    made = conductor(tmp_path, job("a"), clock=lambda: now[0])
    group = Group(made)
    group.ask()
    notes = tmp_path / "failures" / "a.json"
    notes.mkdir(parents=True)  # a note that cannot be read
    assert group.say(Failure(StaleWriterError.__name__, "taken over", False).to_json()) == "wait"
    notes.rmdir()
    now[0] += 3
    made.poll("", 0)
    assert group.ask() == "a"


def test_a_lease_that_could_not_be_let_go_is_not_given_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = conductor(tmp_path, job("a"))
    group = Group(made)
    group.ask()

    def away(store: FolderBackend, key: str, data: bytes) -> None:
        raise StorageError("the file server is away")

    with monkeypatch.context() as patch:
        patch.setattr(FolderBackend, "write", away)
        assert group.say(WILL_PASS) == "restart"
    later = Group(made)
    assert later.ask() == "a" and later.tokens["a"] > group.tokens["a"]


def test_damage_that_comes_again_and_again_is_a_failure(tmp_path: Path) -> None:
    plan = [job("a"), job("b", "a")]
    made = conductor(tmp_path, job("b", "a"), plans_again=True, max_failures=1)
    group = Group(made)
    assert group.ask() == "b"
    for _ in range(2):
        group.say(damaged("a"))
        made.set_work(plan, True, state_of(made).known())
        assert group.ask() == "a" and group.say() == "b"
        assert made.poll("", 0)["events"][-1]["attempt"] == 1
    assert group.say(damaged("a")) == "stop"
    assert settled(made, "failed") == ["b"]


def test_a_file_that_went_after_the_state_was_seen_whole_is_damage(tmp_path: Path) -> None:
    store(tmp_path, "a")
    made = conductor(tmp_path, job("a"), job("b", "a"), plans_again=True, max_failures=0)
    group = Group(made)
    assert [group.ask(), group.ask()] == ["wait", "b"] and settled(made) == ["a"]
    (tmp_path / "stage_runs" / "a" / "weights" / "model.safetensors").unlink()
    group.say(damaged("a"))
    assert ("damaged", "b") in told(made)
