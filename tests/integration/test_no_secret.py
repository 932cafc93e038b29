"""Secrets planted in the environment and in a file: after every verb, no byte anywhere holds one of them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mlflow_servers import Gate, free_port, mlflow_server
from program import environment

PASSWORD = "Pl4nted-p4ssw0rd"
PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted0123456789abc",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED77",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret+0123456789abcdef",
    "AWS_SESSION_TOKEN": "planted-session-token-0123456789",
    "WANDB_API_KEY": "plantedwandb0123456789abcdef01234567890",
}
# As they are, and as they travel.
NEEDLES = [
    *(value.encode() for value in (*PLANTED.values(), PASSWORD)),
    base64.b64encode(f"me:{PASSWORD}".encode()),
]
VERBS = [
    ["validate", "tiny.yaml"], ["validate", "tiny.yaml", "--json"], ["plan", "tiny.yaml"],
    ["plan", "tiny.yaml", "--json"], ["show", "tiny.yaml", "--resolved"], ["show", "tiny.yaml", "--json"],
    ["run", "tiny.yaml", "--local"], ["run", "tiny.yaml", "--local", "--json"], ["status", "tiny.yaml"],
    ["status", "tiny.yaml", "--json"], ["table", "tiny.yaml"], ["table", "tiny.yaml", "--format", "csv", "--all"],
    ["logs", "tiny.yaml", "--cell", "schedule=heavy"], ["path", "tiny.yaml", "--cell", "schedule=heavy"],
    ["ledger", "ls", "tiny.yaml"],
    ["ledger", "verify", "tiny.yaml"], ["ledger", "gc", "tiny.yaml"], ["compressors"], ["schema"],
]  # fmt: skip
# Several verbs in one process: starting Python fourteen times is most of what they cost.
CALLS = """
import json, sys
from orchestrator.cli import main
for arguments in json.loads(sys.argv[1]):
    print("$", arguments[0])
    sys.argv = ["llavolta", *arguments]
    try:
        main()
    except SystemExit as end:
        print("code", end.code)
"""


class Lab:
    """A user's home and folder, a tracking server behind a password, and all that was ever printed."""

    def __init__(self, folder: Path, gate: Gate, text: str) -> None:
        self.folder, self.gate = folder, gate
        self.printed = b""
        self.work, self.home = folder / "work", folder / "home"
        self.work.mkdir()
        self.home.mkdir()
        (self.work / "tiny.yaml").write_text(text.replace("[full, heavy, two_stage]", "[heavy]"))
        kept = environment(HOME=str(self.home))
        kept.pop("XDG_CACHE_HOME", None)
        address = {"MLFLOW_TRACKING_URI": f"http://me:{PASSWORD}@{gate.place}"}
        self.environment = {**kept, **PLANTED, **address}

    def call(self, *calls: Sequence[str], **environment: str) -> tuple[list[str], str]:
        """Exit codes and all that was printed by some calls, one after the other in one process."""
        done = subprocess.run(
            [sys.executable, "-c", CALLS, json.dumps(calls)],
            cwd=self.work, env={**self.environment, **environment}, capture_output=True, timeout=500, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.printed += done.stdout + done.stderr
        text = (done.stdout + done.stderr).decode()
        # After `--json` a process prints everything else to standard error.
        return [line.split()[1] for line in text.splitlines() if line.startswith("code ")], text

    def found(self, *more: Path) -> list[str]:
        """Where a secret is: a file's name, or the output."""
        files = [path for top in (self.folder, *more) for path in top.rglob("*") if path.is_file()]
        assert len(files) > 20
        places = [str(path) for path in files if any(needle in path.read_bytes() for needle in NEEDLES)]
        return places + ["output"] * any(needle in self.printed for needle in NEEDLES)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "server").mkdir()
    with mlflow_server(folder / "server", free_port()) as address:
        gate = Gate(address)
        gate.wants = ("me", PASSWORD)
        yield Lab(folder, gate, tiny_text)
        gate.close()


def test_after_every_verb_no_secret_is_anywhere(lab: Lab) -> None:
    codes, text = lab.call(*VERBS)
    assert codes == ["0"] * len(VERBS), text
    assert "has not recorded" not in text and "POST runs/create" in lab.gate.asked, "the password opened the server"
    assert f"MLflow: http://***@{lab.gate.place}" in text
    assert lab.found() == []


@pytest.mark.slow
def test_a_server_that_refuses_the_password_is_told_without_it(lab: Lab) -> None:
    lab.gate.wants = ("me", "another")
    try:
        codes, text = lab.call(["run", "tiny.yaml", "--local"], ["--debug", "run", "tiny.yaml", "--local"])
    finally:
        lab.gate.wants = ("me", PASSWORD)
    assert codes == ["0", "0"] and "MLflow has not recorded" in text and "***@" in text, text
    assert lab.found() == []


def test_a_secret_in_the_file_or_in_set_ends_before_anything_is_written(lab: Lab, tmp_path: Path) -> None:
    tiny = (lab.work / "tiny.yaml").read_text()
    uri = f"http://me:{PASSWORD}@{lab.gate.place}"
    (tmp_path / "bad.yaml").write_text(
        tiny + f"tracking: {{tracking_uri: '{uri}'}}\ncluster: {{storage_path: other}}\n"
    )
    bad, settings = str(tmp_path / "bad.yaml"), [f"tracking.tracking_uri={uri}", f"description={PLANTED['HF_TOKEN']}"]
    verbs = (
        ["validate"],
        ["plan"],
        ["show", "--resolved"],
        ["run", "--local"],
        ["status"],
        ["table"],
        ["ledger", "ls"],
    )
    calls = [[*verb, bad, *more] for verb in verbs for more in ([], ["--json"], ["--debug"])]
    calls += [[*verb, "tiny.yaml", "--set", text] for verb in verbs for text in settings]
    codes, text = lab.call(*calls)
    assert set(codes) == {"2"}, text
    assert "MLFLOW_TRACKING_PASSWORD" in text and "Traceback" in text
    assert lab.found() == [] and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_neither_ray_nor_a_search_nor_a_bench_writes_one(lab: Lab) -> None:
    shutil.rmtree(lab.work / "runs", ignore_errors=True)
    search = "extends: tiny.yaml\nname: found\nmatrix: null\n"
    search += "search:\n  objectives: {eval/vqa/accuracy: max}\n  algorithm: {kind: random}\n  num_trials: 1\n"
    search += "  space: {phases.finetune.learning_rate: {kind: choice, values: [1.0e-3, 2.0e-3]}}\n"
    (lab.work / "search.yaml").write_text(search)
    with tempfile.TemporaryDirectory(prefix="llv") as sessions:  # a short name: sockets lie in it
        calls = [["run", "tiny.yaml"]], [["search", "search.yaml"]], [["bench", "tiny.yaml"]]
        for one in calls:
            codes, text = lab.call(*one, RAY_TMPDIR=sessions)
            assert codes == ["0"], text
        assert list(Path(sessions).rglob("raylet.out")) and lab.found(Path(sessions)) == []
    assert (lab.home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
