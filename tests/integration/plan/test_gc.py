"""`ledger gc` on a storage: what is reached stays, what is not goes, and nobody is hurt who works there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import collect, finish, kinds, note, seal

from orchestrator.errors import StorageError, UsageError
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.backends import folder
from orchestrator.plan.ledger.inventory import Collector, damage, recorded_experiments
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.ledger.process import Process

HOLD = """
import sys, time
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.ledger.backends import open_backend
leases = Leases(open_backend(sys.argv[1]), "driver")
leases.acquire(sys.argv[2], "lane0")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["folder", "s3"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    """An empty storage, in a folder and in a bucket."""
    if request.param == "folder":
        return Ledger(tmp_path / "runs")
    bucket: str = request.getfixturevalue("bucket")
    return Ledger(f"{bucket}/gc")


@pytest.fixture
def hold(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Ledger, str], subprocess.Popen[str]]:
    """Starts a process that holds a lease until it is killed."""

    def start(ledger: Ledger, job: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, ledger.url, job], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        request.addfinalizer(lambda: (process.kill(), process.communicate()))
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    return start


def test_what_an_experiment_reaches_stays_and_the_rest_goes(ledger: Ledger) -> None:
    for state in ("a", "b", "c"):
        finish(ledger, state)
    note(ledger, "one", a="weights")
    note(ledger, "two", b="weights")
    steps = Collector(ledger, leftover_seconds=0.0).steps()
    assert kinds(steps) == {("state", "c")} and steps[0].size > 1000
    assert ledger.is_done("c")  # looking takes nothing
    collect(ledger)
    fresh = Ledger(ledger.url)
    assert [state for state in "abc" if fresh.is_done(state)] == ["a", "b"]
    assert collect(ledger) == []


def test_without_a_record_every_state_stays(ledger: Ledger) -> None:
    finish(ledger, "a")
    assert collect(ledger) == [] and Ledger(ledger.url).is_done("a")
    assert not Collector(ledger).has_records


def test_what_is_kept_is_the_most_that_any_experiment_keeps(ledger: Ledger) -> None:
    finish(ledger, "a", "full")
    finish(ledger, "b", "full")
    finish(ledger, "c", "full")
    note(ledger, "one", a="full", b="weights", c="none")
    note(ledger, "two", a="none", b="none", c="none")
    steps = collect(ledger)
    assert [(step.kind, step.name, step.size) for step in steps] == [("part", n, 1000) for n in ("b", "c", "c")]
    fresh = Ledger(ledger.url)
    kept = {state: [part for part in ("weights", "checkpoint") if fresh.has(state, part)] for state in "abc"}
    assert kept == {"a": ["weights", "checkpoint"], "b": ["weights"], "c": []}
    assert all(fresh.is_done(state) for state in "abc") and damage(fresh) == []
    assert fresh.fetch("b", "weights").is_dir()


def test_in_stage_checkpoints_go_with_their_stage_run(ledger: Ledger) -> None:
    for job in ("open", "gone", "done"):
        seal(ledger, job, 5)
    note(ledger, "one", open="weights", done="weights")
    finish(Ledger(ledger.url), "done")
    seal(ledger, "done", 6)  # a stale writer's
    assert kinds(collect(ledger)) >= {("work", "gone"), ("work", "done")}
    left = ledger.store
    assert {job: list(left.steps(job)) for job in left.work()} == {"open": [5]}
    assert ledger.last_checkpoint("open") is not None


def test_a_state_that_is_wanted_again_meanwhile_comes_back(ledger: Ledger) -> None:
    finish(ledger, "a")
    finish(ledger, "b")
    note(ledger, "one", b="weights")
    (step,) = Collector(ledger).steps()
    note(ledger, "late", a="weights")  # a run that recorded itself after the look
    assert not step.remove()
    assert Ledger(ledger.url).is_done("a") and damage(Ledger(ledger.url)) == []


def test_work_that_was_taken_up_since_the_look_stays(
    ledger: Ledger, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    finish(ledger, "again")
    for job in ("again", "held", "wanted"):
        seal(ledger, job, 5)
    leases = Leases(ledger.store, "before")
    leases.acquire("again")
    leases.close()
    note(ledger, "one", again="weights")
    steps = Collector(ledger).steps()
    assert {("work", "again"), ("work", "held"), ("work", "wanted"), ("lease", "leases/again/000001.json")} <= kinds(
        steps
    )
    hold(ledger, "again"), hold(ledger, "held")
    note(ledger, "late", wanted="weights")
    assert not any(step.remove() for step in steps)
    assert set(ledger.store.work()) == {"again", "held", "wanted"}
    assert Leases(ledger.store, "onlooker").holder("again") is not None


def test_nothing_of_a_living_driver_goes(ledger: Ledger, hold: Callable[..., subprocess.Popen[str]]) -> None:
    driver = hold(ledger, "held")
    seal(ledger, "held", 5)
    (ledger.writing_folder("held") / "half").write_text("")
    finish(ledger, "made_since")
    note(ledger, "one", other="weights")
    assert collect(ledger) == []
    driver.kill()
    driver.wait()
    found = kinds(collect(ledger))
    assert {("work", "held"), ("state", "made_since"), ("owner", "driver")} <= found
    assert not ledger.store.work()


@pytest.mark.parametrize("lives", [True, False])
def test_a_driver_elsewhere_whose_clock_is_off_is_watched(ledger: Ledger, lives: bool) -> None:
    driver = Leases(ledger.store, "far", beat_seconds=1e9, process=Process("another machine", "far", 1, 1))
    driver.acquire("held")
    seal(ledger, "held", 5)
    note(ledger, "one", other="weights")
    about = json.loads(ledger.store.read("owners/far.json") or b"")
    passed = [0.0]

    def pause(seconds: float) -> None:
        passed[0] += seconds
        beat = f"at {passed[0]}" if lives else about["beat"]
        late = {**about, "wall_seconds": about["wall_seconds"] - 301.0, "beat": beat}
        ledger.store.write("owners/far.json", json.dumps(late).encode())

    pause(0.0)
    steps = Collector(ledger, leftover_seconds=0.0, clock=lambda: passed[0], pause=pause).steps()
    assert kinds(steps) == set() if lives else kinds(steps) >= {("work", "held")}
    assert all(step.remove() for step in steps)
    assert bool(ledger.store.work()) == lives


def test_a_leftover_that_changes_while_it_is_watched_stays(tmp_path: Path) -> None:
    """As where the clock was set forward by an hour since it was begun."""
    ledger = Ledger(tmp_path / "runs")
    note(ledger, "one", b="weights")
    half = ledger.writing_folder("b") / "half"
    half.write_text("")
    for grows, left in ((True, set()), (False, {("leftover", "work/b/.writing-0")})):
        pause = lambda _, grows=grows: half.write_text("more" * grows) if grows else None  # noqa: E731
        assert kinds(Collector(ledger, leftover_seconds=-7200.0, pause=pause).steps()) == left


def test_a_file_that_is_renamed_to_its_place_meanwhile_is_no_leftover(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer was between the listing and the look at it."""
    note(ledger, "one", b="weights")
    names_in = folder.names_in
    monkeypatch.setattr(folder, "names_in", lambda place: [*names_in(place), ".written-meanwhile"])
    assert kinds(Collector(ledger, leftover_seconds=0.0, pause=lambda _: None).steps()) == set()


def test_what_a_killed_gc_took_aside_is_back(ledger: Ledger) -> None:
    """It was killed between taking a state away and asking who wants it; somebody does by then, or no longer."""
    for state in ("wanted", "unwanted"):
        finish(ledger, state)
    note(ledger, "one", other="weights")

    class Killed(BaseException):
        pass

    def die() -> bool:
        raise Killed

    for state in ("wanted", "unwanted"):
        with pytest.raises(Killed):
            ledger.store.take_out(state, die)
    assert not any(Ledger(ledger.url).is_done(state) for state in ("wanted", "unwanted"))
    note(ledger, "late", wanted="weights")
    collect(ledger, leftover_seconds=-7200.0)
    fresh = Ledger(ledger.url)
    assert fresh.is_done("wanted") and fresh.fetch("wanted", "weights") and not fresh.is_done("unwanted")
    assert fresh.store.aside() == [] and damage(fresh) == []
    assert collect(fresh, leftover_seconds=-7200.0) == []


def test_copies_of_a_bucket_go_once_they_are_of_no_use(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ledger, other = Ledger(f"{bucket}/one"), Ledger(f"{bucket}/other")
    for state in ("a", "b", "c"):
        finish(ledger, state)
    finish(other, "d")
    note(ledger, "one", a="weights", b="weights")

    def age(state_ledger: Ledger, state: str, days: float) -> str:
        folder, then = state_ledger.state_folder(state), time.time() - days * 86400
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (then, then))
        return folder.relative_to(tmp_path / "cache" / "llavolta" / "ledger").as_posix()

    assert kinds(Collector(ledger).steps()) == {("state", "c")}, "what was used today stays on this machine"
    names = [age(ledger, "a", 31), age(ledger, "b", 29), age(ledger, "c", 2), age(other, "d", 31)]
    ledger.fetch("a", "weights")
    assert kinds(Collector(ledger).steps()) == {("state", "c"), ("copy", names[2]), ("copy", names[3])}
    age(ledger, "a", 31)
    steps = collect(ledger)
    assert {step.name for step in steps if step.kind == "copy"} == {names[0], names[2], names[3]}
    assert not ledger.state_folder("a").exists() and ledger.state_folder("b").exists()
    assert Ledger(ledger.url).fetch("a", "weights").is_dir() and Ledger(other.url).fetch("d", "weights").is_dir()


def test_leases_of_finished_jobs_go_and_others_stay(ledger: Ledger) -> None:
    finish(ledger, "a")
    note(ledger, "one", a="weights", b="weights")
    leases = Leases(ledger.store, "driver")
    for job in ("a", "b"):
        leases.acquire(job)
    leases.close()
    assert ("lease", "leases/a/000001.json") in kinds(collect(ledger))
    assert ledger.store.names("leases/b") == ["000001.json"]  # a token must never be given out twice


def test_failures_that_nobody_reaches_go_and_evaluations_stay(ledger: Ledger) -> None:
    note(ledger, "one", a="weights")
    for job in ("a", "b"):
        ledger.write_failure(job, {"error": "diverged"})
        ledger.write_evaluation(f"test_of_{job}", {"metrics": {"accuracy": 0.5}})
    assert kinds(collect(ledger)) == {("failure", "b")}
    assert ledger.failure("a") is not None and ledger.evaluation("test_of_b") is not None


def test_an_experiment_can_be_forgotten(ledger: Ledger) -> None:
    finish(ledger, "a")
    finish(ledger, "b")
    note(ledger, "one", a="weights")
    note(ledger, "two", b="weights")
    with pytest.raises(UsageError, match="there are: one, two"):
        Collector(ledger, forget=["three"])
    assert kinds(collect(ledger, forget=["one"])) == {("record", "one"), ("state", "a")}
    assert [each.name for each in recorded_experiments(ledger.store)] == ["two"]


def test_two_at_once(ledger: Ledger) -> None:
    for state in ("a", "b"):
        finish(ledger, state)
    note(ledger, "one", a="weights")
    first, second = Collector(ledger).steps(), Collector(Ledger(ledger.url)).steps()
    for one, other in zip(first, second, strict=True):
        one.remove()
        other.remove()
    assert Ledger(ledger.url).is_done("a") and not Ledger(ledger.url).is_done("b")


def test_a_damaged_record_stops_everything(ledger: Ledger) -> None:
    ledger.store.write("experiments/one.json", b'{"name": "one"')
    with pytest.raises(StorageError, match=r"experiments/one.json is damaged"):
        Collector(ledger)


def test_rubbish_of_dead_writers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs")
    finish(ledger, "a")
    note(ledger, "one", a="weights", b="weights")
    seal(ledger, "b", 5)
    (ledger.writing_folder("b") / "half").write_bytes(b"z" * 300)
    aside = ledger.storage / "stage_runs" / ".a.123456.old"
    aside.mkdir()
    (aside / "half").write_bytes(b"z" * 200)
    assert Collector(ledger).steps() == []  # they are too young to be sure
    found = {(step.name, step.size) for step in collect(ledger)}
    assert found == {("stage_runs/.a.123456.old", 200), ("work/b/.writing-0", 300)}
    assert ledger.is_done("a") and ledger.last_checkpoint("b") is not None
