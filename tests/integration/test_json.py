"""`--json`: one JSON document on standard output, for every verb, for failures, and while frameworks print."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from program import run_anew, run_forked

from orchestrator.cli import app

# Prints as DeepSpeed, NCCL and friends do: from Python, to the descriptor, from a child process, and at exit.
NOISY = '''
import atexit, os, subprocess, sys
from typing import ClassVar, Literal
from orchestrator_plugins.data.easy_vqa import EasyVqaSpec

class LoudSpec(EasyVqaSpec):
    """easy_vqa, loud."""
    kind: Literal["loud"] = "loud"

def noise(where):
    print("python", where)
    os.write(1, b"descriptor\\n")
    subprocess.run([sys.executable, "-c", "print('child')"], check=False)

noise("import")
atexit.register(noise, "exit")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    """A folder with the tiny experiment in bfloat16 under ZeRO 1, one cell, a loud plug-in beside it."""
    folder = tmp_path_factory.mktemp("json")
    text = tiny_text.replace("dtype: float32", "dtype: bfloat16").replace("deepspeed: zero0", "deepspeed: zero1")
    text = text.replace("[full, heavy, two_stage]", "[two_stage]").replace("max_steps: 6", "max_steps: 2")
    text = text.replace("train: {kind: easy_vqa", "train: {kind: loud")
    (folder / "tiny.yaml").write_text(text + "plugins: [loud.py]\n")
    (folder / "loud.py").write_text(NOISY)
    return folder


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked(arguments, folder)


def document(done: subprocess.CompletedProcess[str]) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(done.stdout, parse_constant=refuse)
    except ValueError as error:
        raise AssertionError(f"{error}\n--- stdout\n{done.stdout[:3000]}\n--- stderr\n{done.stderr[-3000:]}") from error


@pytest.fixture(scope="module")
def finished(folder: Path) -> dict:
    done = run_anew(["run", "tiny.yaml", "--local", "--json"], folder)
    found = document(done)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "python import" in done.stderr and "descriptor" in done.stderr and "child" in done.stderr
    assert "python exit" in done.stderr
    return found


CALLS = [
    ("validate", "tiny.yaml"),
    ("fetch", "tiny.yaml"),
    ("plan", "tiny.yaml"),
    ("run", "tiny.yaml", "--local"),
    ("evaluate", "tiny.yaml", "--local"),
    ("status", "tiny.yaml"),
    ("table", "tiny.yaml"),
    ("table", "tiny.yaml", "--format", "json"),
    ("report", "tiny.yaml"),
    ("logs", "tiny.yaml", "--cell", "schedule=two_stage"),
    ("path", "tiny.yaml", "--cell", "schedule=two_stage"),
    ("show", "tiny.yaml"),
    ("show", "tiny.yaml", "--resolved"),
    ("compressors",),
    ("schema",),
    ("deploy", "slurm", "tiny.yaml", "-o", "deployed", "--set", "cluster.storage_path=/nfs/llavolta"),
    ("ledger", "ls", "tiny.yaml"),
    ("ledger", "verify", "tiny.yaml"),
    ("ledger", "gc", "tiny.yaml"),
    ("predictions", "tiny.yaml", "--cell", "schedule=two_stage"),
    ("export", "tiny.yaml", "exported", "--cell", "schedule=two_stage"),
    ("components",),
    ("check", "loud.py"),
    ("data", "check", "tiny.yaml"),
    ("data", "show", "tiny.yaml"),
    ("bench", "tiny.yaml", "--rows", "1", "--text-tokens", "4"),
]


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_a_document_and_nothing_else(folder: Path, finished: dict, call: tuple[str, ...]) -> None:
    done = start(folder, *call, "--json")
    assert document(done)
    assert done.returncode == 0, done.stderr


def test_every_verb_is_tried() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    on_a_cluster = {"submit", "cancel"}  # test_submit.py
    assert names - {call[0] for call in CALLS} == {"search", "init", "import-llavolta", "record"} | on_a_cluster, (
        "a new verb belongs into CALLS"
    )


def test_a_run_says_what_it_did(finished: dict) -> None:
    assert [row["status"] for row in finished["rows"]] == ["finished"]
    assert finished["executed"] > 0
    assert finished["failed"] == {}


FAILURES = [
    (("validate", "nowhere.yaml"), 2, "no such file"),
    (("plan", "tiny.yaml", "--set", "phases.finetune.bf16=true"), 2, "bf16"),
    (("search", "tiny.yaml"), 2, "search"),
    (("logs", "tiny.yaml", "--cell", "two_stag"), 2, "two_stag"),
    (("path", "tiny.yaml", "--cell", "nobody"), 2, "cell"),
    (("status", "tiny.yaml", "--no-such-option"), 2, "no-such-option"),
    (("plann", "tiny.yaml"), 2, "plann"),
    (("ledger", "ls", "--storage", "nowhere"), 2, "nowhere"),
    (("validate", "nowhere.yaml", "--debug"), 2, "no such file"),
]


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: " ".join(case[0]))
def test_a_failure_is_a_document_too(folder: Path, case: tuple) -> None:
    call, code, told = case
    done = start(folder, *call, "--json")
    found = document(done)
    assert done.returncode == code
    assert told in found["error"]
    assert ("Traceback" in done.stderr) == ("--debug" in call)
