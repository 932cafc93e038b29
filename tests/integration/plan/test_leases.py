"""Leases between real processes: one holder at a time, dead owners are followed, tokens tell who lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.errors import StorageError
from orchestrator.plan.ledger.backends import Backend, open_backend
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.ledger.process import Process, machine_id, this_process

ELSEWHERE = Process("another machine", "far", 4711, 1)


class Clock:
    """A clock that tells what it is set to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def store(tmp_path: Path) -> Backend:
    return open_backend(tmp_path / "runs")


@pytest.fixture
def leases(store: Backend) -> Iterator[Callable[..., Leases]]:
    """Makes leases whose beats end with the test."""
    made: list[Leases] = []

    def make(owner: str, **options: Any) -> Leases:
        made.append(Leases(store, owner, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that runs `code` and is waited for until it printed a line."""
    head = "import sys, os, json\nfrom orchestrator.plan.ledger.leases import Leases\n"
    head += "from orchestrator.plan.ledger.backends import open_backend\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "ready"
    return process


HOLD = "leases = Leases(open_backend(sys.argv[1]), sys.argv[2]); leases.acquire('job', 'lane3')\n"
HOLD += (
    "print('ready', flush=True); sys.stdin.readline(); print(leases.holds('job'), leases.acquire('job'), flush=True)"
)


def test_a_lease_is_held_once_and_given_on(store: Backend, leases: Callable[..., Leases]) -> None:
    one, two = leases("one"), leases("two")
    assert store.token_of("job") == 0 and one.holder("job") is None and one.holders() == {}
    assert one.acquire("job", "lane0") == 1 and two.acquire("job") is None
    assert one.acquire("job", "lane1") == 1 and one.held() == {"job": "lane1"} and two.held() == {}
    seen = two.holder("job")
    assert seen is not None and (seen.owner, seen.lane, seen.pid) == ("one", "lane1", os.getpid())
    assert two.holders() == {"job": seen}
    two.release("job")  # not its own: nothing happens
    assert one.holds("job")
    one.release("job")
    assert not one.holds("job") and one.held() == {} and two.holder("job") is None
    assert two.acquire("job") == 2 and one.acquire("job") is None and store.token_of("job") == 2


def test_old_files_go_and_tokens_never_go_down(store: Backend, leases: Callable[..., Leases]) -> None:
    one, two = leases("one"), leases("two")
    for token in range(1, 12, 2):
        assert one.acquire("job") == token
        one.release("job")
        assert two.acquire("job") == token + 1
        two.release("job")
    assert store.names("leases/job") == ["000012.json"]
    two.forget("job")  # it holds it no longer
    assert store.token_of("job") == 12
    assert two.acquire("job") == 13
    two.forget("job")
    assert store.token_of("job") == 0 and two.held() == {}


def test_close_releases_all_and_takes_the_owner_away(store: Backend, leases: Callable[..., Leases]) -> None:
    one, two = leases("one"), leases("two")
    assert [one.acquire(name) for name in "abc"] == [1, 1, 1]
    one.close()
    assert store.names("owners") == [] and [two.acquire(name) for name in "abc"] == [2, 2, 2]


def test_a_killed_holder_of_this_machine_is_followed_at_once(store: Backend, leases: Callable[..., Leases]) -> None:
    holder = start(HOLD, store.url, "one")
    two = leases("two", patience_seconds=1e9)
    assert two.acquire("job") is None
    seen = two.holder("job")
    assert seen is not None and seen.pid == holder.pid
    holder.kill()
    holder.wait()
    assert two.holder("job") is None and two.holders() == {}
    assert two.acquire("job") == 2
    two.release("job")
    assert two.acquire("job") == 3


def test_a_killed_holder_not_yet_waited_for_is_dead_too(store: Backend, leases: Callable[..., Leases]) -> None:
    holder = start(HOLD, store.url, "one")
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE
    assert leases("two", patience_seconds=1e9).acquire("job") == 2
    holder.wait()


def test_another_process_with_the_number_of_the_dead_one_is_not_it(leases: Callable[..., Leases]) -> None:
    me = this_process()
    dead = Process(me.machine, me.host, me.pid, me.started - 100)
    assert leases("one", process=dead).acquire("job") == 1
    assert leases("two", patience_seconds=1e9).acquire("job") == 2


def test_a_step_of_the_clock_makes_nobody_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's start times move with the boot time, which the kernel derives from the wall clock."""
    me = this_process()
    assert me.started > 0 and me.is_gone() is False
    monkeypatch.setattr(psutil, "boot_time", lambda: 1.0)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: me.began - 3600.0)
    machine_id.cache_clear()
    after = this_process()
    assert after.began == me.began - 3600.0 and (after.machine, after.started) == (me.machine, me.started)
    assert me.is_gone() is False


def test_numbers_of_other_machines_and_namespaces_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    me = this_process()
    dead = replace(me, started=me.started - 1)
    assert dead.is_gone() is True
    for machine in (me.machine.replace("pid:[", "pid:[1"), f"0{me.machine}"):  # a container; one more of this host name
        assert machine != me.machine and replace(dead, machine=machine).is_gone() is None
    assert replace(me, pid=1, started=5).is_gone() is True and replace(me, pid=2**22 + 1).is_gone() is True
    # A container's view of its host's /proc: other processes have these numbers there.
    real = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: "1" if path == "/proc/self" else real(path))
    assert dead.is_gone() is None and this_process().started == -1


def test_without_proc_only_a_free_number_is_a_dead_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""

    def absent(path: Any, *_: Any) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", absent)
    monkeypatch.setattr(Path, "read_text", absent)
    machine_id.cache_clear()
    me = this_process()
    assert me.started == -1 and me.is_gone() is None
    assert replace(me, pid=2**22 + 1).is_gone() is True
    monkeypatch.undo()
    machine_id.cache_clear()


def watched(store: Backend, moves: bool) -> tuple[Leases, Clock]:
    """An onlooker whose pauses take no time, while the owner elsewhere beats or not."""
    clock = Clock()

    def pause(seconds: float) -> None:
        clock.seconds += seconds
        if moves and clock.seconds > 5.0:
            about = json.loads(store.read("owners/far.json") or b"")
            store.write("owners/far.json", json.dumps({**about, "beat": f"at {clock.seconds}"}).encode())

    return Leases(store, "onlooker", clock=clock, pause=pause), clock


@pytest.mark.parametrize("lives", [True, False])
@pytest.mark.parametrize("skew", [0.0, 300.0, -300.0, 3600.0, -3600.0, 1e8])
def test_who_takes_things_away_watches_for_a_beat(
    store: Backend, leases: Callable[..., Leases], skew: float, lives: bool
) -> None:
    assert leases("far", beat_seconds=1e9, process=ELSEWHERE).acquire("job") == 1
    about = json.loads(store.read("owners/far.json") or b"")
    store.write("owners/far.json", json.dumps({**about, "wall_seconds": about["wall_seconds"] + skew}).encode())
    onlooker, clock = watched(store, lives)
    assert ("job" in onlooker.holders(sure=True)) == lives
    assert (5.0 < clock.seconds < 6.0) if lives else (30.0 <= clock.seconds < 31.0)
    before = clock.seconds
    assert ("job" in onlooker.holders(sure=True)) == lives and clock.seconds == before, "it is known by now"


@pytest.mark.parametrize(("age", "waits"), [(10.0, 0.0), (-200.0, 0.0), (3600.0, 12.0), (-3600.0, 12.0), (1e5, 0.0)])
def test_who_only_looks_waits_where_the_clock_tells_nothing(
    store: Backend, leases: Callable[..., Leases], age: float, waits: float
) -> None:
    assert leases("far", beat_seconds=1e9, process=ELSEWHERE).acquire("job") == 1
    about = json.loads(store.read("owners/far.json") or b"")
    store.write("owners/far.json", json.dumps({**about, "wall_seconds": about["wall_seconds"] - age}).encode())
    onlooker, clock = watched(store, False)
    assert ("job" in onlooker.holders()) == (abs(age) < 300.0) and waits <= clock.seconds <= waits + 0.5


def test_an_owner_elsewhere_gets_patience_by_the_own_clock(store: Backend, leases: Callable[..., Leases]) -> None:
    clock = Clock()
    far = leases("far", beat_seconds=1e9, process=ELSEWHERE)
    near = leases("near", clock=clock, patience_seconds=30.0)
    assert far.acquire("job") == 1 and near.acquire("job") is None
    clock.seconds = 29.9
    assert near.acquire("job") is None
    about = json.loads(store.read("owners/far.json") or b"")
    store.write("owners/far.json", json.dumps({**about, "beat": "another"}).encode())
    clock.seconds = 59.8
    assert near.acquire("job") is None  # seen with a new beat: the patience begins again
    clock.seconds = 89.7
    assert near.acquire("job") is None
    clock.seconds = 89.9
    assert near.holder("job") is None and near.acquire("job") == 2
    assert not far.holds("job") and far.held() == {} and far.acquire("job") is None


def test_a_beat_that_goes_on_is_seen(store: Backend, leases: Callable[..., Leases]) -> None:
    clock = Clock()
    far = leases("far", beat_seconds=0.01, process=ELSEWHERE)
    near = leases("near", clock=clock)
    assert far.acquire("job") == 1
    for _ in range(5):
        before = store.read("owners/far.json")
        while store.read("owners/far.json") == before:
            pass
        clock.seconds += 1000.0
        assert near.acquire("job") is None


def test_a_suspended_owner_finds_out_that_it_lost(store: Backend, leases: Callable[..., Leases]) -> None:
    holder = start(HOLD, store.url, "one")
    clock = Clock()
    two = leases("two", clock=clock)
    holder.send_signal(signal.SIGSTOP)
    while psutil.Process(holder.pid).status() != psutil.STATUS_STOPPED:
        pass
    assert two.acquire("job") is None
    clock.seconds = 31.0
    assert two.acquire("job") == 2
    holder.send_signal(signal.SIGCONT)
    assert holder.communicate("\n")[0].strip() == "False None"
    assert two.holds("job")


def test_a_new_process_of_an_owner_finds_its_leases(store: Backend, leases: Callable[..., Leases]) -> None:
    process = start(HOLD, store.url, "one")
    process.kill()
    process.wait()
    other = leases("two")
    assert other.acquire("else") == 1
    again = leases("one")
    assert again.held() == {"job": "lane3"} and again.acquire("job", "lane3") == 1
    assert other.acquire("job") is None


def race(url: str, owner: str, gate: Any, results: Any) -> None:
    leases = Leases(open_backend(url), owner)
    gate.wait()
    names = [f"job{number}" for number in range(200)]
    results.put((owner, {name: token for name in names if (token := leases.acquire(name)) is not None}))
    gate.wait()  # an owner that ended would be followed at once


@pytest.mark.parametrize("before", [0, 6])
def test_processes_racing_for_leases_hold_each_exactly_once(store: Backend, before: int) -> None:
    for number in range(200 if before else 0):
        released = {"owner": "gone", "lane": "", "tries": 0, "released": True}
        store.write(f"leases/job{number}/{before:06d}.json", json.dumps(released).encode())
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(3), context.Queue()
    racers = [context.Process(target=race, args=(store.url, f"o{index}", gate, results)) for index in range(3)]
    for racer in racers:
        racer.start()
    won = dict(results.get() for _ in racers)
    for racer in racers:
        racer.join()
    assert sorted(name for tokens in won.values() for name in tokens) == sorted(f"job{n}" for n in range(200))
    assert {token for tokens in won.values() for token in tokens.values()} == {before + 1}
    assert all(store.names(f"leases/job{number}") == [f"{before + 1:06d}.json"] for number in range(200))


class Late:
    """A store whose `create` is late, and its `read`: others act between a look and it."""

    def __init__(self, store: Backend, meanwhile: Callable[[], Any], before_read: Any = None) -> None:
        self._store, self._meanwhile, self._before_read = store, meanwhile, before_read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def create(self, key: str, data: bytes) -> bool:
        self._meanwhile()
        return self._store.create(key, data)

    def read(self, key: str) -> bytes | None:
        if self._before_read is not None and key.startswith("leases/"):
            self._before_read()
        return self._store.read(key)


def test_a_number_used_and_cleaned_up_since_the_look_is_not_taken(
    store: Backend, leases: Callable[..., Leases]
) -> None:
    one, two = leases("one"), leases("two")

    def meanwhile() -> None:
        if store.token_of("job") < 3:
            for _ in range(3):
                two.release("job")
                two.acquire("job")

    slow = Leases(Late(store, meanwhile), "slow")
    assert slow.acquire("job") is None and store.token_of("job") == 3 and two.holds("job")
    assert store.names("leases/job") == ["000003.json"] and one.acquire("job") is None
    slow.close()


def test_numbers_that_begin_anew_are_not_gone_past(store: Backend, leases: Callable[..., Leases]) -> None:
    one, two = leases("one"), leases("two")
    one.acquire("job")
    slow = Leases(Late(store, lambda: two.acquire("job"), lambda: one.forget("job")), "slow")
    assert slow.acquire("job") is None and two.holds("job")
    slow.close()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"owner": 1, "what": 2}'])
def test_a_damaged_lease_is_followed_under_a_higher_token(
    store: Backend, leases: Callable[..., Leases], damage: bytes
) -> None:
    store.write("leases/job/000041.json", damage)
    assert leases("one").acquire("job") == 42


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Leases(open_backend(tmp_path / "file" / "runs"), "one").acquire("job")
    with pytest.raises(StorageError, match="can name no lease"):
        Leases(open_backend(tmp_path / "runs"), "../one")


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8)); print('ready', flush=True)\n"
    code += "from orchestrator.errors import StorageError\n"
    code += "try:\n    Leases(open_backend(sys.argv[1]), 'one').acquire('job')\n"
    code += "except StorageError as error:\n    print(error)\n"
    process = start(code, str(tmp_path / "runs"))
    assert process.stdout is not None and "no space left" in process.stdout.read()
    process.wait()
