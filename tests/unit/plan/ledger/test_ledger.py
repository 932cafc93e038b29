"""The ledger under damage: what is half-written, cut or flipped is never taken for done; errors say what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from ledger_work import fill

from orchestrator.errors import StorageError, UsageError
from orchestrator.plan.ledger import Ledger, files
from orchestrator.plan.ledger.backends import folder as folder_backend
from orchestrator.plan.ledger.files import damaged_files, dump_note, parse_note, storage_errors, write_json

STATE = "a" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "runs")


def test_nothing_is_written_before_there_is_something(ledger: Ledger) -> None:
    assert not ledger.is_done(STATE)
    assert ledger.result(STATE) is ledger.evaluation(STATE) is ledger.failure(STATE) is None
    assert list(ledger.store.checkpoints(STATE)) == [] and ledger.stored_checkpoints() == {}
    ledger.clear_failure(STATE)
    assert not ledger.storage.exists()


def test_commit(ledger: Ledger) -> None:
    work = fill(ledger, STATE, checkpoint=True)
    (work / "step_000003").mkdir()
    (ledger.writing_folder(STATE) / "step_000005").mkdir()  # killed while it was written
    folder = ledger.commit(STATE)
    assert folder == ledger.state_folder(STATE) and ledger.is_done(STATE) and not work.exists()
    assert damaged_files(folder) == []
    assert ledger.result(STATE) == {"id": STATE} and ledger.has(STATE, "checkpoint") and ledger.has(STATE, "weights")
    assert ledger.metrics_file(STATE).read_text() == '{"step": 0}\n' and ledger.log_file(STATE).read_text() == "said\n"
    assert ledger.stored_checkpoints() == {STATE: 7}
    assert [path.name for path in folder.parent.iterdir()] == [STATE]  # nothing aside is left
    assert ledger.commit(STATE) == folder


def test_a_second_commit_adds_the_parts_that_the_first_one_lacks(ledger: Ledger) -> None:
    fill(ledger, STATE)
    weights = ledger.commit(STATE) / "weights" / "model.safetensors"
    fill(ledger, STATE, model=b"of another worker")
    ledger.commit(STATE)
    assert weights.read_text() == "weights" and not ledger.has(STATE, "checkpoint")
    fill(ledger, STATE, checkpoint=True, model=b"of a third")
    (ledger.state_folder(STATE) / "checkpoint").mkdir()  # moved there by one that was killed before it was listed
    assert not ledger.has(STATE, "checkpoint")
    ledger.commit(STATE)
    assert ledger.has(STATE, "checkpoint") and damaged_files(ledger.state_folder(STATE)) == []
    assert weights.read_text() == "weights" and os.listdir(weights.parents[1] / "checkpoint") == ["rank0"]
    fill(ledger, STATE)
    ledger.commit(STATE)
    assert ledger.has(STATE, "checkpoint")


def test_nothing_to_commit_is_an_error(ledger: Ledger) -> None:
    ledger.writing_folder(STATE)
    with pytest.raises(StorageError, match="nothing to commit"):
        ledger.commit(STATE)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "manifest", "flipped manifest"])
def test_damage_is_found(ledger: Ledger, damage: str) -> None:
    fill(ledger, STATE, checkpoint=True)
    folder = ledger.commit(STATE)
    name = "checkpoint/rank0/optimizer.pt"
    file, manifest = folder / name, folder / "manifest.json"
    if damage == "cut":
        os.truncate(file, 4999)
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[2500] ^= 1
        file.write_bytes(data)
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"size": 5000', '"size": 5001'))
    assert damaged_files(folder) == [name if damage in ("cut", "flip", "gone") else "manifest.json"]
    # A flipped bit is seen only when all bytes are read, which `damaged_files` did.
    assert Ledger(ledger.storage).is_done(STATE) == (damage == "flip")
    fill(ledger, STATE, checkpoint=True)
    if damage == "flip":
        ledger.discard(STATE)
    ledger.commit(STATE)
    assert ledger.is_done(STATE) and damaged_files(folder) == []


def test_a_damaged_checkpoint_falls_back_to_the_one_before(ledger: Ledger) -> None:
    work = ledger.work_folder(STATE)
    for step in (200, 400, 1_000_000):
        folder = work / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "model.pt").write_bytes(bytes(1000))
        files.write_manifest(folder, {})
    (work / "step_000600").mkdir()
    (work / "step_000600" / "model.pt").write_bytes(bytes(1000))  # killed before its manifest
    assert [path.name for path in ledger.store.checkpoints(STATE)] == ["step_1000000", "step_000400", "step_000200"]
    (work / "step_1000000" / "model.pt").write_bytes(b"\1" + bytes(999))
    os.truncate(work / "step_000400" / "model.pt", 10)
    assert [path.name for path in ledger.store.checkpoints(STATE)] == ["step_000200"]


def test_a_crash_in_a_commit_leaves_the_work(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(ledger, STATE, checkpoint=True)
    writing = ledger.writing_folder(STATE)
    monkeypatch.setattr(folder_backend, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ledger.commit(STATE)
    monkeypatch.undo()
    assert not ledger.is_done(STATE) and (writing / "checkpoint" / "rank0" / "optimizer.pt").exists()
    ledger.commit(STATE)
    assert ledger.is_done(STATE)


def test_evaluations_and_failures(ledger: Ledger) -> None:
    ledger.write_evaluation("e1", {"metrics": {"accuracy": 0.5}})
    assert ledger.evaluation("e1") == {"metrics": {"accuracy": 0.5}}
    (ledger.storage / "evaluations" / "e1.json").write_text('{"metr')
    assert ledger.evaluation("e1") is None
    ledger.write_failure("e1", {"error": "diverged"})
    assert ledger.failure("e1") == {"error": "diverged"}
    ledger.clear_failure("e1")
    assert ledger.failure("e1") is None
    with pytest.raises(ValueError, match="Out of range"):
        ledger.write_evaluation("e2", {"accuracy": float("nan")})
    assert sorted(os.listdir(ledger.storage / "evaluations")) == ["e1.json"]


def test_a_note_is_what_was_written_or_nothing() -> None:
    """Whatever the order and the types that JSON leaves of it; changed, or under another's key, it is none."""
    note = {"metrics": {"b": 0.1 + 0.2, "a": 1e-300}, "by_number": {10: 1, 9: (True, None)}, "text": "\u00e9\u2028"}
    read = {**note, "by_number": {"10": 1, "9": [True, None]}}
    for sort_keys in (True, False):
        data = dump_note("evaluations/a.json", note, sort_keys=sort_keys)
        assert parse_note("evaluations/a.json", data) == read
        assert parse_note("evaluations/b.json", data) is None
        assert parse_note("evaluations/a.json", data.replace(b"0.30000000000000004", b"0.30000000000000005")) == read
        assert parse_note("evaluations/a.json", data.replace(b"0.30000000000000004", b"0.80000000000000004")) is None
        assert parse_note("evaluations/a.json", data[:-9]) is None
    assert parse_note("evaluations/a.json", b'{"metrics": {"b": 0.5}}') == {"metrics": {"b": 0.5}}


def test_an_identity_cannot_leave_the_storage(ledger: Ledger) -> None:
    for name in ("../x", "", "a/b", ".hidden"):
        with pytest.raises(StorageError, match="identity"):
            ledger.state_folder(name)


def test_cell_folders_are_names_and_stay_apart(ledger: Ledger) -> None:
    base = ledger.storage / "cells" / "exp"
    assert ledger.cell_folder("exp", "full,seed=0") == base / "full,seed=0"
    odd = [ledger.cell_folder("exp", name) for name in ("a/b", "a-b", "..", "a b", "x" * 400)]
    assert len(set(odd)) == 5 and all(path.parent == base and len(path.name) < 200 for path in odd)


def test_a_full_disk_names_the_folder_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as raised, storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    text = str(raised.value)
    assert str(tmp_path) in text and "no space left" in text and "storage_path" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the kernel offers no full device")
def test_a_write_that_meets_a_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/dev/full` answers every write with ENOSPC."""
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda path, mode="r", **rest: real("/dev/full" if "w" in mode else path, mode)
    )
    with pytest.raises(StorageError, match="no space left"):
        write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.undo()
    assert not (tmp_path / "a.json").exists()


def test_a_storage_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        Ledger(tmp_path / "file")
    with pytest.raises(StorageError, match="storage_path"):
        Ledger(tmp_path / "file" / "below").write_evaluation("e1", {})
    with pytest.raises(UsageError, match="name a folder"):
        Ledger("gs://bucket/runs")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write")
def test_a_storage_that_cannot_be_written() -> None:
    with pytest.raises(StorageError, match="storage_path"):
        Ledger("/proc/self/runs").write_failure("e1", {})
