"""JobGraph: what is ready, what a lane should take next, and a newer plan over an older one."""

from __future__ import annotations

from conductor_drive import evaluation, job

from orchestrator.dispatch.job_queue import JobGraph, parallel_width

# Two subtrees of two levels, depth first, each state tested.
TREE = [
    job("r"),
    *(job("a", "r"), evaluation("ea", "a"), job("a1", "a"), job("a2", "a")),
    *(job("b", "r"), job("b1", "b"), job("b2", "b")),
]


def job_graph(*jobs: dict, finished: tuple[str, ...] = ()) -> JobGraph:
    work = JobGraph()
    work.replace(jobs, lambda job: True)
    for name in finished:
        work.set(name, "finished")
    return work


def test_only_what_has_its_parent_is_ready_in_the_plans_order() -> None:
    work = job_graph(*TREE)
    assert work.candidates(None, ()) == ["r"]
    work.set("r", "running")
    assert work.candidates(None, ()) == []
    work.set("r", "finished")
    assert work.candidates(None, ()) == ["a", "b"]
    work.set("a", "finished")
    assert work.candidates(None, ()) == ["ea", "a1", "a2", "b"]


def test_a_lane_goes_on_from_what_it_has_in_memory() -> None:
    work = job_graph(*TREE, finished=("r", "a", "b"))
    assert work.candidates("b", ())[:2] == ["b1", "b2"]
    assert work.candidates("a", ())[:3] == ["ea", "a1", "a2"]


def test_a_lane_with_nothing_in_memory_stays_away_from_where_others_are() -> None:
    work = job_graph(*TREE, finished=("r", "a", "b"))
    work.set("a1", "running")
    assert work.candidates(None, {"a1"})[:2] == ["b1", "b2"]
    assert work.candidates(None, {"b"})[:2] == ["ea", "a2"]
    assert work.candidates("a", {"b1"})[:2] == ["ea", "a2"]


def test_what_is_put_together_from_two_states_waits_for_both() -> None:
    start = {"type": "start", "id": "s", "base": "a", "source": "b"}
    work = job_graph(job("a"), job("b"), start, job("c", "s"))
    work.set("b", "finished")
    assert work.candidates(None, ()) == ["a"]
    work.set("a", "finished")
    assert work.candidates(None, ()) == ["s"]
    assert work.fail("s") == ["c"] and work.is_done


def test_a_newer_plan_replaces_what_has_not_begun() -> None:
    work = job_graph(job("a"), job("b"), job("c"), job("d"), finished=("c",))
    work.set("b", "running")
    skipped = work.replace([job("e"), job("b", first_step=3), job("c")], lambda job: True)
    assert skipped == [] and work.candidates(None, ()) == ["e"]
    assert work.status == {"b": "running", "c": "finished", "e": "pending"}
    assert "first_step" not in work.jobs["b"]  # its ranks all get the same
    work.replace([job("c")], lambda job: False)
    assert work.candidates(None, ()) == ["c"]  # the ledger lost it


def test_what_stands_on_a_failed_job_is_skipped_in_every_plan() -> None:
    work = job_graph(*TREE, finished=("r",))
    assert work.fail("a") == ["ea", "a1", "a2"]
    assert work.replace(TREE, lambda job: True) == []
    assert work.replace([*TREE, job("a3", "a")], lambda job: True) == ["a3"]
    for name in ("b", "b1", "b2"):
        assert not work.is_done
        work.set(name, "finished")
    assert work.is_done


def test_ten_thousand_jobs_are_chosen_from_quickly_enough_to_ask_often() -> None:
    jobs = [job("r"), *(job(f"s{n}", "r") for n in range(10_000))]
    work = job_graph(*jobs, finished=("r",))
    assert work.candidates(None, {"s0"})[0] == "s1" and len(work.candidates("r", {"s5"})) == 10_000


def test_width() -> None:
    assert parallel_width(TREE) == 5
    assert parallel_width([job("a"), job("b", "a")]) == 1
    assert parallel_width([]) == 0
