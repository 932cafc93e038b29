"""SIGTERM, SIGUSR1 and --max-hours: a checkpoint, exit code 75, and the same command ends with the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from program import PROGRAM, environment

RUN = [*PROGRAM, "run", "mine.yaml"]
STEPS = 60


@pytest.fixture(scope="module")
def text(tiny_text: str) -> str:
    """One cell of 60 steps in two stages; nothing but a stop writes a checkpoint inside a stage."""
    one = tiny_text.replace("max_steps: 6", f"max_steps: {STEPS}").replace("[full, heavy, two_stage]", "[two_stage]")
    return one + "cluster: {checkpoint_every: 1000}\n"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert call(folder, text, "--local").returncode == 0
    return folder


def call(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.yaml").write_text(text)
    return subprocess.run(
        [*RUN, *options], cwd=folder, env=environment(LLAVOLTA_TEST=str(folder)), capture_output=True, text=True,
        timeout=300, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def stop_when(
    folder: Path, text: str, number: int, due: Callable[[], bool], *options: str
) -> subprocess.CompletedProcess[str]:
    """Starts a run and sends it a signal as soon as something is so."""
    (folder / "mine.yaml").write_text(text)
    process = subprocess.Popen(
        [*RUN, *options], cwd=folder, env=environment(LLAVOLTA_TEST=str(folder)), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    limit = time.monotonic() + 120
    while not due():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def steps_done(folder: Path) -> int:
    """Lines of the spools of stage runs under way."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "runs" / "work").glob("*/metrics.jsonl"))


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "runs" / "work").glob("*/step_*/manifest.json"))


def family_of(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("LLAVOLTA_TEST") == str(folder)
            found += [process.pid] if ours and process.status() != psutil.STATUS_ZOMBIE else []
        except psutil.Error:
            continue
    return found


def what_was_learned(folder: Path) -> dict[str, object]:
    """Weights, losses by step and scores of the only cell."""
    losses = {}
    for path in (folder / "runs" / "stage_runs").glob("*/metrics.jsonl"):
        losses |= {line["step"]: line["loss"] for line in map(json.loads, path.read_text().splitlines())}
    scores = sorted(
        (note["under"], note["metrics"]["accuracy"])
        for note in (json.loads(path.read_text()) for path in (folder / "runs" / "evaluations").glob("*.json"))
    )
    (weights,) = (folder / "runs" / "cells" / "tiny").glob("*/weights/model.safetensors")
    return {"weights": weights.read_bytes(), "losses": losses, "scores": scores}


def goes_on_as_if_nothing_was(folder: Path, text: str, undisturbed: Path, *options: str) -> None:
    again = call(folder, text, *options)
    assert again.returncode == 0, again.stdout + again.stderr
    learned = what_was_learned(folder)
    assert len(learned["losses"]) == STEPS and learned == what_was_learned(undisturbed)


@pytest.mark.parametrize(("name", "options"), [("SIGTERM", ()), ("SIGUSR1", ("--local",))])
def test_a_signal_in_the_middle_of_steps_leaves_a_checkpoint_and_75(tmp_path, text, undisturbed, name, options):
    stopped = stop_when(tmp_path, text, getattr(signal, name), lambda: steps_done(tmp_path) > 2, *options)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert f"stopped by {name}" in stopped.stderr and "Traceback" not in stopped.stderr
    assert len(checkpoints(tmp_path)) == 1 and family_of(tmp_path) == []
    goes_on_as_if_nothing_was(tmp_path, text, undisturbed, *options)


def test_a_signal_while_ray_starts_ends_in_order_and_nothing_is_lost(tmp_path, text, undisturbed):
    stopped = stop_when(tmp_path, text, signal.SIGTERM, lambda: len(family_of(tmp_path)) > 2)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert "stopped by SIGTERM" in stopped.stderr and "Traceback" not in stopped.stderr
    assert family_of(tmp_path) == [] and not list((tmp_path / "runs").glob("stage_runs/*/metrics.jsonl"))
    goes_on_as_if_nothing_was(tmp_path, text, undisturbed, "--local")


def test_a_signal_in_an_evaluation_leaves_it_to_the_next_run(tmp_path, text, undisturbed):
    # One row a batch and rows enough that the signal meets the evaluation; the state is in the ledger by then.
    slow = text.replace("kind: exact_match,", "kind: exact_match, batch_size: 1,").replace(
        "max_samples: 40", "max_samples: 4000"
    )

    def under_way() -> bool:
        return len(list((tmp_path / "runs" / "stage_runs").glob("*/metrics.jsonl"))) == 2

    stopped = stop_when(tmp_path, slow, signal.SIGTERM, under_way, "--local")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert not list((tmp_path / "runs" / "evaluations").glob("*.json"))
    goes_on_as_if_nothing_was(tmp_path, text, undisturbed, "--local")


def test_max_hours_stops_like_a_signal_and_the_same_command_goes_on(tmp_path, text, undisturbed):
    hours = 0.0
    while (stopped := call(tmp_path, text, "--local", "--max-hours", str(hours))).returncode == 75:
        assert "stopped by --max-hours" in stopped.stderr
        hours = 2 * hours or 0.002
    assert stopped.returncode == 0 and hours > 0, stopped.stdout + stopped.stderr
    assert what_was_learned(tmp_path) == what_was_learned(undisturbed)


def test_a_signal_before_there_is_work_ends_with_75_too(tmp_path, text):
    # The plug-in is imported while the file is read, long before anything is dispatched.
    (tmp_path / "early.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n")
    ended = call(tmp_path, text + "plugins: [early.py]\n")
    assert ended.returncode == 75 and "stopped by SIGUSR1" in ended.stderr, ended.stderr
