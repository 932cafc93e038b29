"""A folder as a store: values are whole or not there, and of many that create one key, one succeeds."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from orchestrator.errors import StorageError, UsageError
from orchestrator.plan.ledger.backends import open_backend
from orchestrator.plan.ledger.backends.folder import FolderBackend


@pytest.fixture
def store(tmp_path: Path) -> FolderBackend:
    return FolderBackend(tmp_path / "runs")


def test_values_come_back_and_go(store: FolderBackend, tmp_path: Path) -> None:
    assert store.read("notes/a.json") is None and store.names("notes") == []
    store.delete("notes/a.json")
    assert not (tmp_path / "runs").exists(), "looking makes nothing"
    store.write("notes/b.json", b"1")
    store.write("notes/b.json", b"22")
    store.write("notes/deep/c.json", b"")
    assert store.read("notes/b.json") == b"22" and store.read("notes/deep/c.json") == b""
    assert store.names("notes") == store.names("notes/") == ["b.json", "deep"]
    assert store.names("notes/b.json") == [] and store.read("notes/b.json/below") is None
    store.delete("notes/b.json")
    store.delete("notes/b.json")
    assert store.names("notes") == ["deep"]
    assert open_backend(tmp_path / "runs").read("notes/deep/c.json") == b""


def test_the_first_to_create_a_key_has_it(store: FolderBackend) -> None:
    assert store.create("leases/a/000001.json", b"mine")
    assert not store.create("leases/a/000001.json", b"theirs")
    assert store.read("leases/a/000001.json") == b"mine"
    assert os.listdir(Path(store.url) / "leases" / "a") == ["000001.json"], "nothing aside is left"


@pytest.mark.parametrize("late", [False, True])
def test_a_file_system_that_answers_oddly(store: FolderBackend, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """No hard links at all; or an NFS server whose answer was lost, so that the system asks it a second time."""
    real = os.link

    def link(source: Path, target: Path) -> None:
        if not late:
            raise OSError(errno.EPERM, "Operation not permitted")
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    assert store.create("leases/1.json", b"mine") and not store.create("leases/1.json", b"theirs")
    assert store.read("leases/1.json") == b"mine"


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/../b", ".hidden", "a/.b", "", "a\\b"])
def test_a_key_cannot_leave_the_store(store: FolderBackend, key: str) -> None:
    for use in (store.read, store.names, store.delete, lambda k: store.write(k, b""), lambda k: store.create(k, b"")):
        with pytest.raises(StorageError, match="no key"):
            use(key)


def test_what_is_no_storage_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="s3://bucket/prefix"):
        open_backend("gs://bucket/runs")
    (tmp_path / "file").write_text("")
    for write in (FolderBackend(tmp_path / "file").write, FolderBackend(tmp_path / "file").create):
        with pytest.raises(StorageError, match="storage_path"):
            write("notes/a.json", b"")
