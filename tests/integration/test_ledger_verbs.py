"""`llavolta ledger ls|verify|gc` as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.inventory import Collector

Llavolta = Callable[..., CompletedProcess[str]]
WEIGHTS = "weights/model.safetensors"


@pytest.fixture
def storage(tmp_path: Path) -> Ledger:
    """Two states; the recorded experiment reaches the first."""
    ledger = Ledger(tmp_path / "runs")
    for state in ("reached", "stray"):
        writing = ledger.writing_folder(state)
        (writing / "weights").mkdir()
        (writing / WEIGHTS).write_bytes(b"x" * 5000)
        (writing / "job.json").write_text(json.dumps({"type": "stage", "phase": "finetune", "last_step": 7}))
        ledger.commit(state)
    fields = {"name": "mine", "file": "mine.yaml", "when": 1.0, "evaluations": []}
    record = {**fields, "states": {"reached": "weights"}, "cells": {"heavy": ["reached"]}}
    ledger.store.write("experiments/mine.json", json.dumps(record).encode())
    return ledger


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_ls_tells_what_is_there_and_who_reaches_it(storage: Ledger, llavolta: Llavolta) -> None:
    done = llavolta("ledger", "ls")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "mine: heavy" in lines["reached"] and "finetune" in lines["reached"]
    assert "no recorded experiment" in lines["stray"]
    document = json.loads(llavolta("ledger", "ls", "--json", "--storage", storage.url).stdout)
    assert [state["id"] for state in document["states"]] == ["reached", "stray"]


def test_verify_reads_every_byte_and_takes_out_what_is_damaged(storage: Ledger, llavolta: Llavolta) -> None:
    assert llavolta("ledger", "verify").returncode == 0
    flip(storage.state_folder("stray") / WEIGHTS)
    told = llavolta("ledger", "verify")
    assert (told.returncode, told.stdout.splitlines()[0]) == (1, f"damaged state stray: {WEIGHTS}")
    found = llavolta("ledger", "verify", "--json", "--discard")
    assert json.loads(found.stdout)["damaged"] == [{"kind": "state", "id": "stray", "files": [WEIGHTS]}]
    assert llavolta("ledger", "verify").returncode == 0 and not Ledger(storage.url).is_done("stray")


def test_gc_is_dry_until_it_is_told_to_delete(storage: Ledger, llavolta: Llavolta) -> None:
    dry = llavolta("ledger", "gc")
    assert dry.returncode == 0 and "--delete does it" in dry.stdout and "stray" in dry.stdout, dry.stderr
    assert Ledger(storage.url).is_done("stray")
    document = json.loads(llavolta("ledger", "gc", "--delete", "--json").stdout)
    assert [(step["name"], step["removed"]) for step in document["steps"]] == [("stray", True)]
    assert document["bytes"] > 5000
    assert Ledger(storage.url).is_done("reached") and not Ledger(storage.url).is_done("stray")
    assert "nothing can be deleted" in llavolta("ledger", "gc").stdout


def test_a_wrong_call_is_told(tmp_path: Path, llavolta: Llavolta) -> None:
    for arguments, told in (
        (("ls",), "there is no storage at"),
        (("gc", "--storage", "nowhere"), "there is no storage at"),
        (("gc", "--forget", "x", "--storage", str(tmp_path)), "no such experiment is recorded"),
        (("verify", "a.yaml", "--storage", "b"), "give SPEC or --storage, not both"),
    ):
        done = llavolta("ledger", *arguments)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_was_damaged_or_collected_is_trained_again_to_the_same_bits(
    tiny_experiment: Path, llavolta: Llavolta
) -> None:
    def run() -> None:
        done = llavolta("run", tiny_experiment, "--local")
        assert done.returncode == 0, done.stdout + done.stderr

    def ls() -> dict[str, dict[str, object]]:
        document = json.loads(llavolta("ledger", "ls", tiny_experiment, "--json").stdout)
        assert [each["name"] for each in document["experiments"]] == ["tiny"]
        return {state["id"]: state for state in document["states"]}

    text = tiny_experiment.read_text()
    run()
    states = ls()
    assert all(state["cells"] for state in states.values())
    ledger = Ledger(tiny_experiment.parent / "runs")
    known = {state: (ledger.state_folder(state) / WEIGHTS).read_bytes() for state in states}
    (one,) = (state for state, about in states.items() if about["type"] == "stage" and "full" in str(about["cells"]))
    flip(ledger.state_folder(one) / WEIGHTS)
    assert llavolta("ledger", "verify", "--discard").returncode == 1
    # The file changes: what only its old version reached goes.
    tiny_experiment.write_text(text.replace("[full, heavy, two_stage]", "[full]"))
    run()
    gone = json.loads(llavolta("ledger", "gc", "--delete", "--json").stdout)["steps"]
    assert {step["name"] for step in gone if step["kind"] == "state"} == set(states) - set(ls()) != set()
    tiny_experiment.write_text(text)
    run()
    assert set(ls()) == set(states)
    for state, content in known.items():
        assert (ledger.state_folder(state) / WEIGHTS).read_bytes() == content


@pytest.mark.slow
def test_gc_beside_a_run_takes_nothing_that_it_needs(tiny_experiment: Path, llavolta: Llavolta) -> None:
    """Collected over and over while it runs on Ray; an old experiment's states go meanwhile."""
    ledger = Ledger(tiny_experiment.parent / "runs")
    writing = ledger.writing_folder("old")
    (writing / "weights").mkdir()
    (writing / WEIGHTS).write_bytes(b"x")
    ledger.commit("old")
    gone: set[str] = set()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(llavolta, "run", tiny_experiment)
        while not running.done():
            gone |= {f"{step.kind} {step.name}" for step in Collector(ledger).steps() if step.remove()}
    done = running.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name in gone if not name.startswith(("lease", "owner"))} == {"state old"}
    assert "nothing to do" in llavolta("run", tiny_experiment).stdout
    assert llavolta("ledger", "verify").returncode == 0
