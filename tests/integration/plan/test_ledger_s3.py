"""The ledger in a bucket of a real S3 server, from machines that have nothing in common but the bucket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ledger_work import fill

from orchestrator.errors import DamagedStateError, StaleWriterError, StorageError
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.backends.s3 import S3Backend
from orchestrator.plan.ledger.files import damaged_files
from orchestrator.plan.ledger.leases import Leases

STATE = "a" * 64
MODEL = b"weights" * 1000


@pytest.fixture
def machine(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Ledger]:
    """The ledger as a machine of that name sees it: each has a cache folder of its own."""

    def of(name: str) -> Ledger:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return Ledger(f"{bucket}/runs")

    return of


def seal(ledger: Ledger, step: int, content: bytes) -> Path:
    folder = ledger.writing_folder(STATE) / f"step_{step:06d}"
    folder.mkdir()
    (folder / "model.pt").write_bytes(content)
    return ledger.seal_checkpoint(STATE, step, folder)


def test_what_one_machine_commits_another_finds(machine: Callable[[str], Ledger], bucket: str) -> None:
    one, two = machine("one"), machine("two")
    assert not one.is_done(STATE) and one.result(STATE) is None and not one.storage.exists()
    fill(one, STATE, checkpoint=True, model=MODEL)
    one.commit(STATE)
    for ledger in (two, one, machine("three")):
        assert ledger.url == f"{bucket}/runs" and ledger.is_done(STATE) and not ledger.is_begun(STATE)
        assert ledger.result(STATE) == {"id": STATE} and ledger.stored_checkpoints() == {STATE: 7}
        assert ledger.metrics_file(STATE).read_text() == '{"step": 0}\n'
        assert ledger.log_file(STATE).read_text() == "said\n"
        weights = ledger.fetch(STATE, "weights")
        assert weights == ledger.state_folder(STATE) / "weights"
        assert (weights / "model.safetensors").read_bytes() == MODEL
        assert (ledger.fetch(STATE, "checkpoint") / "rank0" / "optimizer.pt").read_bytes() == b"\1" * 5000
        assert damaged_files(ledger.state_folder(STATE)) == [] or ledger is not one
    assert len({one.storage, two.storage}) == 2 and S3Backend(f"{bucket}/runs").names("work") == []


def test_a_second_commit_adds_the_parts_that_the_first_one_lacks(machine: Callable[[str], Ledger], bucket: str) -> None:
    one, two = machine("one"), machine("two")
    fill(one, STATE, model=MODEL)
    one.commit(STATE)
    fill(two, STATE, model=b"of another machine")
    two.commit(STATE)
    assert (machine("three").fetch(STATE, "weights") / "model.safetensors").read_bytes() == MODEL
    assert not two.has(STATE, "checkpoint")
    fill(two, STATE, checkpoint=True, model=b"of another machine")
    two.commit(STATE)
    assert one.has(STATE, "weights")
    for name in ("one", "two", "three"):
        again = machine(name)
        assert again.has(STATE, "checkpoint")
        assert (again.fetch(STATE, "weights") / "model.safetensors").read_bytes() == MODEL  # evaluations were of it
        assert (again.fetch(STATE, "checkpoint") / "rank0" / "optimizer.pt").read_bytes() == b"\1" * 5000
    assert len(S3Backend(f"{bucket}/runs").sizes("objects")) == 5  # nothing that no manifest names


@pytest.mark.parametrize("damage", ["flip", "gone", "manifest"])
def test_damage_in_the_bucket_is_found_and_mended_by_training_again(
    machine: Callable[[str], Ledger], bucket: str, damage: str
) -> None:
    store, one = S3Backend(f"{bucket}/runs"), machine("one")
    fill(one, STATE, model=MODEL)
    one.commit(STATE)
    key = next(key for key, size in store.sizes("objects").items() if size == len(MODEL))
    if damage == "flip":
        store.write(key, b"W" + MODEL[1:])
    elif damage == "gone":
        store.delete(key)
    else:
        store.write(f"manifests/{STATE}.json", b'{"files": {}, "sha256": "0"}')
    two = machine("two")
    with pytest.raises(DamagedStateError) as caught:
        two.fetch(STATE, "weights")
    assert caught.value.state == STATE
    if damage != "manifest":
        assert two.is_done(STATE) and "weights/model.safetensors" in str(caught.value)
        two.discard(STATE)
    assert not two.is_done(STATE)
    fill(two, STATE, model=MODEL)
    two.commit(STATE)
    assert (machine("three").fetch(STATE, "weights") / "model.safetensors").read_bytes() == MODEL


def test_a_damaged_copy_is_downloaded_again(machine: Callable[[str], Ledger]) -> None:
    one = machine("one")
    fill(one, STATE, model=MODEL)
    copy = one.commit(STATE) / "weights" / "model.safetensors"
    for content in (b"W" + MODEL[1:], MODEL[:-1], b""):
        copy.write_bytes(content)
        assert (one.fetch(STATE, "weights") / "model.safetensors").read_bytes() == MODEL
    (one.state_folder(STATE) / "result.json").write_text("{}")
    assert one.result(STATE) == {"id": STATE}


def test_another_machine_goes_on_from_a_sealed_checkpoint(machine: Callable[[str], Ledger], bucket: str) -> None:
    store, one = S3Backend(f"{bucket}/runs"), machine("one")
    one.begin(STATE)
    for step in (2, 4, 6):
        one.writing_folder(STATE)
        (one.work_folder(STATE) / "metrics.jsonl").write_text("x" * step)
        sealed = seal(one, step, b"%d" % step * 100)
        assert sealed == one.work_folder(STATE) / f"step_{step:06d}"
    assert sorted(store.sizes("objects").values()) == [100, 100]  # two stay, older ones are gone
    two = machine("two")
    assert two.is_begun(STATE) and two.metrics_file(STATE).read_text() == "xxxxxx"
    assert not two.work_folder(STATE).exists()
    newest = two.last_checkpoint(STATE)
    assert newest is not None and newest.name == "step_000006" and (newest / "model.pt").read_bytes() == b"6" * 100
    assert two.download_checkpoint(STATE, newest.name) == newest
    assert (two.work_folder(STATE) / "metrics.jsonl").read_text() == "xxxxxx"
    key = next(key for key in store.sizes("objects") if store.read(key) == b"6" * 100)
    store.write(key, b"7" * 100)
    assert [path.name for path in machine("three").store.checkpoints(STATE)] == ["step_000004"]
    seal(two, 5, b"5" * 100)  # a step after the one it fell back to
    assert [path.name for path in machine("three").store.checkpoints(STATE)] == ["step_000005", "step_000004"]
    fill(two, STATE, model=MODEL)
    two.commit(STATE)
    assert store.names("work") == [] and list(machine("three").store.checkpoints(STATE)) == []


def test_what_a_failed_attempt_told_is_seen_elsewhere(machine: Callable[[str], Ledger]) -> None:
    one = machine("one")
    one.begin(STATE)
    one.writing_folder(STATE)
    (one.work_folder(STATE) / "log.txt").write_text("the loss diverged\n")
    one.share_progress(STATE)
    assert machine("two").log_file(STATE).read_text() == "the loss diverged\n"


def test_two_machines_write_one_state(machine: Callable[[str], Ledger]) -> None:
    one, two = machine("one"), machine("two")

    def write(step: int, content: str) -> None:
        for index, ledger in enumerate((one, two)):
            folder = ledger.writing_folder(STATE) / f"step_{step:06d}"
            folder.mkdir()
            (folder / f"rank{index}.pt").write_text(content)
            ledger.share(folder)

    one.begin(STATE)
    write(2, "given up")  # killed before it was sealed
    one.begin(STATE)
    folder = one.writing_folder(STATE) / "step_000002"
    assert not folder.exists()
    folder.mkdir()
    (folder / "rank0.pt").write_text("alone")
    one.share(folder)
    one.seal_checkpoint(STATE, 2, folder)
    alone = machine("three").last_checkpoint(STATE)
    assert alone is not None and sorted(path.name for path in alone.glob("*.pt")) == ["rank0.pt"]
    write(4, "both")
    one.seal_checkpoint(STATE, 4, one.writing_folder(STATE) / "step_000004")
    both = machine("three").last_checkpoint(STATE)
    assert both is not None and [(both / f"rank{index}.pt").read_text() for index in (0, 1)] == ["both", "both"]
    fill(one, STATE, model=MODEL)
    (two.writing_folder(STATE) / "checkpoint").mkdir()
    (two.writing_folder(STATE) / "checkpoint" / "rank1.pt").write_text("the other's")
    one.share(one.writing_folder(STATE))
    two.share(two.writing_folder(STATE))
    assert list(two.writing_folder(STATE).glob("step_*")) == []  # what lies in the bucket by now
    one.commit(STATE)
    for name in ("one", "two", "three"):
        ledger = machine(name)
        assert (ledger.fetch(STATE, "checkpoint") / "rank1.pt").read_text() == "the other's"
        assert (ledger.fetch(STATE, "weights") / "model.safetensors").read_bytes() == MODEL


def test_a_writer_that_lost_its_lease_changes_nothing(machine: Callable[[str], Ledger]) -> None:
    one, two = machine("one"), machine("two")
    first = Leases(one.store, "one")
    one.fences[STATE] = first.acquire(STATE) or 0
    fill(one, STATE, model=MODEL)
    first.release(STATE)
    second = Leases(two.store, "two")
    assert second.acquire(STATE) == 2
    with pytest.raises(StaleWriterError, match="token 2"):
        one.commit(STATE)
    with pytest.raises(StaleWriterError):
        seal(one, 3, b"late")
    assert not two.is_done(STATE) and list(two.store.checkpoints(STATE)) == []
    first.close()
    second.close()


def test_a_stale_writer_that_goes_on_anywhere_takes_nothing_of_the_new_holder(machine: Callable[[str], Ledger]) -> None:
    """It was suspended after its last look at the lease: nothing but the tokens of what it meets keeps it back."""
    one, two = machine("one"), machine("two")
    one.fences[STATE], two.fences[STATE] = 1, 2
    for step in (2, 4):
        seal(one, step, b"%d" % step)
    two.begin(STATE)
    newest = two.last_checkpoint(STATE)
    assert newest is not None and newest.name == "step_000004"
    for step in (6, 8):
        seal(two, step, b"%d" % step)
    fill(two, STATE, model=MODEL)
    two.share(two.writing_folder(STATE))
    before = two.store.sizes("objects")
    assert len([key for key in before if f"{STATE}/000002/" in key]) == 5
    for act in (
        lambda: one.store.begin(STATE, 1),
        lambda: one.store.prune(STATE, 4, 2, 1),
        lambda: one.store._sweep(STATE, 1),
    ):
        act()
        assert {key for key in before if "/000002/" in key} <= set(two.store.sizes("objects"))
        assert two.checkpoint_steps(STATE) == [8, 6] and two.store.names(f"work/{STATE}/shared") == ["writing-2"]
    two.commit(STATE)
    one.store.end_work(STATE, 1)
    assert (machine("three").fetch(STATE, "weights") / "model.safetensors").read_bytes() == MODEL


def test_a_snapshot_answers_from_one_listing(machine: Callable[[str], Ledger]) -> None:
    one, two = machine("one"), machine("two")
    fill(one, STATE, checkpoint=True, model=MODEL)
    one.commit(STATE)
    one.write_failure("f" * 64, {"error": "no"})
    one.write_evaluation("e" * 64, {"metrics": {"accuracy": 0.5}})
    sent: list[str] = []
    two.store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.url))

    def ask() -> None:
        assert two.is_done(STATE) and two.has(STATE, "checkpoint") and two.stored_checkpoints() == {STATE: 7}
        assert two.failure("f" * 64) == {"error": "no"} and not two.is_begun(STATE)
        assert two.evaluation("e" * 64) == {"metrics": {"accuracy": 0.5}}
        for number in range(1000):
            state = f"{number:064d}"
            assert not two.is_done(state) and not two.is_begun(state)
            assert two.failure(state) is two.evaluation(state) is two.result(state) is None

    with two.snapshot():
        ask()
    assert len(sent) == 4 + 3  # four listings, three values
    two = machine("two")  # a new process
    sent.clear()
    two.store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.url))
    with two.snapshot(), two.snapshot():
        ask()
        assert len(sent) == 4  # values are kept on the machine
        fill(one, STATE, checkpoint=True, model=MODEL)
        one.write_failure("d" * 64, {"error": "later"})
        assert two.failure("d" * 64) is None
        two.clear_failure("f" * 64)
        assert two.failure("f" * 64) is None and two.failure("d" * 64) == {"error": "later"}


def test_a_bucket_that_is_not_there_is_said(bucket: str) -> None:
    ledger = Ledger("s3://no-such-bucket/runs")
    with pytest.raises(StorageError, match="no such bucket"), ledger.snapshot():
        pass
    with pytest.raises(StorageError, match="no such bucket"):
        fill(ledger, STATE, model=MODEL)
        ledger.commit(STATE)
