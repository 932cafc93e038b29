"""The store in a bucket, against a real S3 server on loopback; the same checks hold for a folder."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from orchestrator.errors import StorageError
from orchestrator.plan.ledger.backends import Backend, open_backend
from orchestrator.plan.ledger.backends.s3 import S3Backend
from orchestrator.plan.ledger.leases import Leases


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return open_backend(tmp_path / "runs" if request.param == "folder" else request.getfixturevalue("bucket") + "/runs")


def test_values(store: Backend) -> None:
    assert store.read("notes/a.json") is None and store.names("notes") == [] and store.names("notes/") == []
    store.write("notes/b.json", b"1")
    store.write("notes/a.json", b"2")
    store.write("notes/a.json", b"3")
    store.write("notes/deep/er/c", b"")
    store.write("notesandmore", b"")
    assert store.read("notes/a.json") == b"3" and store.read("notes/deep/er/c") == b""
    assert store.names("notes") == store.names("notes/") == ["a.json", "b.json", "deep"]
    assert store.names("notes/deep") == ["er"]
    store.delete("notes/a.json")
    store.delete("notes/a.json")
    assert store.read("notes/a.json") is None and store.names("notes") == ["b.json", "deep"]


def test_create_decides(store: Backend) -> None:
    assert store.create("leases/a", b"1") and not store.create("leases/a", b"2")
    assert store.read("leases/a") == b"1"
    store.delete("leases/a")
    assert store.create("leases/a", b"3") and store.names("leases") == ["a"]


def test_more_names_than_a_page_holds(bucket: str) -> None:
    store = S3Backend(bucket)
    events = store._client.meta.events
    events.register("before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=3))
    for number in range(10):
        store.write(f"many/{number}", b"x")
    assert store.names("many") == [str(number) for number in range(10)]
    assert store.sizes("many") == {f"many/{number}": 1 for number in range(10)}
    store.delete_all("many")
    assert store.names("many") == [] and store.sizes("") == {}


def create(url: str, gate: Any, results: Any) -> None:
    store = S3Backend(url)
    gate.wait()
    results.put([number for number in range(40) if store.create(f"race/{number}", os.urandom(8))])


def test_processes_racing_to_create_win_each_once(bucket: str) -> None:
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(3), context.Queue()
    racers = [context.Process(target=create, args=(bucket, gate, results)) for _ in range(3)]
    for racer in racers:
        racer.start()
    won = [number for _ in racers for number in results.get()]
    for racer in racers:
        racer.join()
    assert sorted(won) == list(range(40))


def test_leases_in_a_bucket(bucket: str) -> None:
    store = open_backend(bucket)
    one, two = Leases(store, "one"), Leases(S3Backend(bucket), "two")
    assert one.acquire("job", "lane0") == 1 and two.acquire("job") is None and two.holders()["job"].owner == "one"
    one.release("job")
    assert two.acquire("job") == 2 and not one.holds("job") and store.token_of("job") == 2
    two.forget("job")
    one.close()
    two.close()
    assert store.names("leases") == store.names("owners") == []


def test_files_go_up_and_come_down(bucket: str, tmp_path: Path) -> None:
    store = S3Backend(bucket)
    large = os.urandom(20_000_000)  # sent in parts
    (tmp_path / "large").write_bytes(large)
    (tmp_path / "empty").write_bytes(b"")
    store.upload({"state/weights/large": tmp_path / "large", "state/empty": tmp_path / "empty"})
    assert store.sizes("state") == {"state/weights/large": 20_000_000, "state/empty": 0}
    store.download({tmp_path / f"{name[-5:]}.back": name for name in store.sizes("state")} | {tmp_path / "no": "gone"})
    assert (tmp_path / "large.back").read_bytes() == large and (tmp_path / "empty.back").read_bytes() == b""
    assert not (tmp_path / "no").exists()
    with pytest.raises(StorageError, match="No such file"):
        store.upload({"state/gone": tmp_path / "gone"})


def test_a_repeated_create_knows_its_own_first_attempt(bucket: str) -> None:
    store = S3Backend(bucket)
    assert store.create("ready", b"")
    attempts = []

    def lose_the_answer(response: Any, **_: Any) -> int | None:
        attempts.append(response)
        return 0 if len(attempts) == 1 else None  # as after a broken connection: boto3 asks again at once

    store._client.meta.events.register_first("needs-retry.s3.PutObject", lose_the_answer)
    assert store.create("lease", b"mine") and len(attempts) == 2
    assert not store.create("lease", b"mine")


def test_a_server_that_comes_back_is_waited_for(s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    first.start()
    host, port = first.get_host_and_port()
    first.stop()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    store = S3Backend("s3://late/runs")
    second = ThreadedMotoServer(host, port, verbose=False)
    sent: list[str] = []

    def on_send(request: Any, **_: Any) -> None:
        sent.append(request.url)
        if len(sent) == 3:
            second.start()

    store._client.meta.events.register("before-send.s3", on_send)
    store._client.create_bucket(Bucket="late")
    store.write("a", b"1")
    assert len(sent) > 3 and store.read("a") == b"1"
    second.stop()


def test_a_server_that_ignores_conditions_is_refused(bucket: str) -> None:
    store = S3Backend(bucket)

    def ignore(params: dict[str, Any], **_: Any) -> None:
        params["headers"].pop("If-None-Match", None)

    store._client.meta.events.register("before-call.s3.PutObject", ignore)
    with pytest.raises(StorageError, match="ignores conditional puts"):
        store.create("lease", b"")
    assert store.names("leases") == [] and store.sizes("") == {}


def test_what_is_wrong_is_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = S3Backend("s3://no-such-bucket/runs")
    for act in (lambda: nowhere.read("a"), lambda: nowhere.names("a"), lambda: nowhere.create("a", b"")):
        with pytest.raises(StorageError, match=r"s3://no-such-bucket/runs.*no such bucket"):
            act()
    for url in ("s3://", "s3:///runs"):
        with pytest.raises(StorageError, match="bucket"):
            open_backend(url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"Could not connect.*see that the server can be reached"):
        S3Backend(bucket).read("a")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match="credentials") as caught:
        S3Backend(bucket).read("a")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(StorageError, match="no-such-profile"):
        S3Backend(bucket)


def test_without_boto3_the_extra_is_named() -> None:
    code = "import sys; sys.modules['boto3'] = None\nfrom orchestrator.errors import UsageError\n"
    code += "from orchestrator.plan.ledger.backends import open_backend\n"
    code += "try:\n    open_backend('s3://bucket/runs')\nexcept UsageError as error:\n    print(error)\n"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'llavolta-orchestrator[s3]'" in said
