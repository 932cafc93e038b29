"""Stage runs under way in the ledger: what is unsealed is nobody's, a writer that lost its lease changes nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from orchestrator.dispatch.failures import describe
from orchestrator.errors import DamagedStateError, StaleWriterError, StorageError
from orchestrator.plan.ledger import Ledger, files
from orchestrator.plan.ledger.backends import folder as folder_backend
from orchestrator.plan.ledger.backends.folder import FolderBackend
from orchestrator.plan.ledger.files import damaged_files
from orchestrator.plan.ledger.leases import Leases

JOB = "a" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "runs")


def write_checkpoint(ledger: Ledger, step: int, text: str = "state") -> Path:
    folder = ledger.writing_folder(JOB) / f"step_{step:06d}"
    folder.mkdir()
    (folder / "model.pt").write_text(text)
    return folder


def write_parts(ledger: Ledger, text: str = "weights") -> None:
    folder = ledger.writing_folder(JOB)
    (folder / "weights").mkdir()
    (folder / "weights" / "model.safetensors").write_text(text)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "optimizer.pt").write_text(text)
    (folder / "job.json").write_text('{"last_step": 7}')


def seen(folder: Path) -> dict[str, str]:
    """All that a reader could see below a folder: everything but what is written aside."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_the_newest_two_checkpoints_stay(ledger: Ledger) -> None:
    for step in (2, 4, 6, 1_000_000):
        sealed = ledger.seal_checkpoint(JOB, step, write_checkpoint(ledger, step))
        assert sealed == ledger.work_folder(JOB) / f"step_{step:06d}" and damaged_files(sealed) == []
    assert [path.name for path in ledger.store.checkpoints(JOB)] == ["step_1000000", "step_000006"]
    assert ledger.last_checkpoint(JOB) == ledger.work_folder(JOB) / "step_1000000"
    assert list(ledger.writing_folder(JOB).iterdir()) == []


def test_a_checkpoint_takes_the_place_of_damaged_ones(ledger: Ledger) -> None:
    for step in (2, 4, 6):
        ledger.seal_checkpoint(JOB, step, write_checkpoint(ledger, step))
    for step in (4, 6):
        (ledger.work_folder(JOB) / f"step_{step:06d}" / "model.pt").write_text("STATE")
    assert list(ledger.store.checkpoints(JOB)) == [] and ledger.last_checkpoint(JOB) is None
    ledger.seal_checkpoint(JOB, 4, write_checkpoint(ledger, 4, "again"))
    (last,) = ledger.store.checkpoints(JOB)
    assert (last / "model.pt").read_text() == "again"
    assert not (ledger.work_folder(JOB) / "step_000006").exists(), "a later one was damaged, or it were the last"


def test_a_seal_that_fails_leaves_what_was_there(ledger: Ledger) -> None:
    sealed = ledger.seal_checkpoint(JOB, 2, write_checkpoint(ledger, 2))
    with pytest.raises(StorageError, match="No such file"):
        FolderBackend(ledger.storage).seal_checkpoint(JOB, 2, ledger.storage / "cleared away")
    assert list(ledger.store.checkpoints(JOB)) == [sealed] and sorted(os.listdir(sealed.parent)) == [
        ".writing-0",
        sealed.name,
    ]


def test_a_file_server_that_answers_a_rename_twice(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer was lost, the system asks again, and by then the old name is gone."""
    for name in ("rename", "replace"):
        real = getattr(Path, name)

        def twice(path: Path, target: Path, real: Any = real) -> None:
            real(path, target)
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

        monkeypatch.setattr(Path, name, twice)
    sealed = ledger.seal_checkpoint(JOB, 2, write_checkpoint(ledger, 2))
    assert list(ledger.store.checkpoints(JOB)) == [sealed]
    write_parts(ledger)
    ledger.commit(JOB)
    ledger.write_evaluation("e", {"accuracy": 0.5})
    assert ledger.is_done(JOB) and ledger.evaluation("e") == {"accuracy": 0.5}
    assert damaged_files(ledger.state_folder(JOB)) == []


def test_what_a_file_server_leaves_of_deleted_files_is_no_file_of_a_state(ledger: Ledger) -> None:
    """NFS renames a file that is deleted while somebody has it open."""
    write_parts(ledger)
    (ledger.writing_folder(JOB) / "weights" / ".nfs0000000000000123").write_text("deleted")
    (ledger.writing_folder(JOB) / ".nfs0000000000000124").write_text("deleted")
    folder = ledger.commit(JOB)
    (folder / "weights" / ".nfs0000000000000123").unlink()
    assert ledger.is_done(JOB) and damaged_files(folder) == []


def test_what_is_unsealed_is_no_checkpoint_and_goes_with_the_next_attempt(ledger: Ledger) -> None:
    half = write_checkpoint(ledger, 2)
    files.write_manifest(half, {})  # killed between the manifest and the rename
    assert list(ledger.store.checkpoints(JOB)) == []
    write_parts(ledger)
    assert not ledger.is_done(JOB)
    ledger.begin(JOB)
    assert not half.exists() and not list(ledger.work_folder(JOB).iterdir())


def test_a_commit_takes_no_rubbish(ledger: Ledger) -> None:
    write_parts(ledger)
    write_checkpoint(ledger, 6)
    (ledger.writing_folder(JOB) / "universal_0").mkdir()
    (ledger.writing_folder(JOB) / "other.txt").write_text("")
    folder = ledger.commit(JOB)
    assert sorted(os.listdir(folder)) == ["checkpoint", "job.json", "manifest.json", "weights"]
    assert not ledger.work_folder(JOB).exists()


def test_only_the_newest_token_writes(ledger: Ledger) -> None:
    stale, holder = Ledger(ledger.url), ledger
    stale.fences[JOB] = 1
    ledger.store.create(f"leases/{JOB}/000001.json", b"{}")
    stale.check_fence(JOB)
    stale.seal_checkpoint(JOB, 2, write_checkpoint(stale, 2))
    late, parts = write_checkpoint(stale, 4, "late"), stale.writing_folder(JOB)
    write_parts(stale, "late")
    ledger.store.create(f"leases/{JOB}/000002.json", b"{}")
    holder.fences[JOB] = 2
    assert holder.writing_folder(JOB) != parts
    holder.seal_checkpoint(JOB, 4, write_checkpoint(holder, 4, "holder"))
    before = seen(ledger.storage)
    for attempt in (
        lambda: stale.seal_checkpoint(JOB, 4, late),
        lambda: stale.commit(JOB),
        lambda: stale.begin(JOB),
        lambda: stale.check_fence(JOB),
    ):
        with pytest.raises(StaleWriterError, match="token 2, this one has 1"):
            attempt()
        assert seen(ledger.storage) == before
    holder.begin(JOB)
    assert not parts.exists(), "the holder clears away what others left"
    write_parts(holder, "holder")
    folder = holder.commit(JOB)
    assert (folder / "weights" / "model.safetensors").read_text() == "holder"
    with pytest.raises(StaleWriterError):
        stale.commit(JOB)


def test_a_lease_taken_over_while_a_manifest_is_made(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.fences[JOB] = 1
    real = folder_backend.write_manifest

    def slow(folder: Path, known: files.Files) -> None:
        real(folder, known)
        ledger.store.create(f"leases/{JOB}/000002.json", b"{}")

    monkeypatch.setattr(folder_backend, "write_manifest", slow)
    folder = write_checkpoint(ledger, 2)
    with pytest.raises(StaleWriterError):
        ledger.seal_checkpoint(JOB, 2, folder)
    ledger.store.delete(f"leases/{JOB}/000002.json")
    write_parts(ledger)
    with pytest.raises(StaleWriterError):
        ledger.commit(JOB)
    assert list(ledger.store.checkpoints(JOB)) == [] and not ledger.is_done(JOB)


def test_tokens_are_those_of_leases(ledger: Ledger) -> None:
    owners = [Leases(ledger.store, name) for name in ("one", "two")]
    try:
        ledger.fences[JOB] = owners[0].acquire(JOB) or 0
        ledger.check_fence(JOB)
        owners[0].release(JOB)
        assert owners[1].acquire(JOB) == 2
        with pytest.raises(StaleWriterError):
            ledger.check_fence(JOB)
    finally:
        for owner in owners:
            owner.close()


@pytest.mark.parametrize("part", ["weights", "checkpoint"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "manifest"])
def test_a_damaged_part_names_its_state(ledger: Ledger, part: str, damage: str) -> None:
    write_parts(ledger)
    folder = ledger.commit(JOB)
    names = {"weights": "model.safetensors", "checkpoint": "optimizer.pt"}
    assert {name: ledger.fetch(JOB, name) for name in names} == {name: folder / name for name in names}
    file = folder / part / names[part]
    if damage == "cut":
        os.truncate(file, 3)
    elif damage == "flip":
        file.write_bytes(b"W" + file.read_bytes()[1:])
    else:
        (folder / "manifest.json" if damage == "manifest" else file).unlink()
    with pytest.raises(DamagedStateError, match=f"the {part} of the state {JOB}") as raised:
        ledger.fetch(JOB, part)
    assert raised.value.state == pickle.loads(pickle.dumps(raised.value)).state == JOB
    told = describe(raised.value)
    assert told.damaged == JOB and not told.retry and describe(StorageError("full")).damaged is None
    if damage != "manifest":  # the other part can still be used
        other = next(name for name in names if name != part)
        assert ledger.fetch(JOB, other) == folder / other


def test_a_part_that_was_never_kept(ledger: Ledger) -> None:
    for part in ("weights", "checkpoint"):
        with pytest.raises(DamagedStateError, match="must be trained again"):
            ledger.fetch(JOB, part)


def test_a_state_discarded_by_another_process_is_seen(ledger: Ledger) -> None:
    write_parts(ledger)
    ledger.commit(JOB)
    other = Ledger(ledger.url)
    assert ledger.is_done(JOB) and other.is_done(JOB)
    other.discard(JOB)
    assert not ledger.is_done(JOB)
