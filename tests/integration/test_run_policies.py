"""Policies as a user runs them: each one stage run, a teacher's loss in the metrics, resumed like left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from program import PROGRAM, environment, run_forked

POLICIES = """
  light: {kind: average_pool, layer: 2, stride: 2}
  lighter: {kind: average_pool, layer: 2, stride: 4}
schedules:
  mixed: {kind: interleaved, compressor: heavy, full_share: 1/3, distill: {weight: 0.5, temperature: 2.0}}
  rising: {kind: ramp, compressor: heavy, key: keep_ratio, start: 1/2, end: 1/8, moves: 3, distill: {}}
  elastic: {kind: random_scale, compressors: [heavy, light, full], distill: {weight: 0.3}}
  layered: {kind: sandwich, heaviest: heavy, compressors: [light, lighter]}
  annealed: {kind: stages, stages: [{compressor: light, anneal: {key: keep_ratio, start: 1, end: 1/4, moves: 3}}]}
"""


def weights_of(folder: Path) -> dict[str, bytes]:
    found = (folder / "runs" / "cells" / "tiny").glob("*/weights/model.safetensors")
    return {path.relative_to(folder).parts[3]: path.read_bytes() for path in found}


def has_trained(work: Path) -> bool:
    """Whether a stage run under way has told a step; its folder moves once it is finished."""
    try:
        return any(path.stat().st_size for path in work.glob("*/metrics.jsonl"))
    except OSError:
        return False


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> tuple[Path, Any]:
    """Five policies of nine steps, run in this process without Ray."""
    head, rest = tiny_text.split("schedules:")
    text = head.rstrip() + POLICIES + rest[rest.index("phases:") :]
    text = text.replace("[full, heavy, two_stage]", "[mixed, rising, elastic, layered, annealed]")
    text = text.replace("max_steps: 6", "max_steps: 9")
    folder = tmp_path_factory.mktemp("policies")
    (folder / "tiny.yaml").write_text(text)
    return folder, run_forked(["run", "tiny.yaml", "--local"], folder)


@pytest.mark.slow
def test_each_policy_is_one_stage_run_whose_teacher_is_told(finished: tuple[Path, Any]) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for file in (folder / "runs" / "stage_runs").glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(9))
        kinds = {line["variant"].split()[0] for line in lines}
        if any(" + " in line["variant"] for line in lines):
            found["layered"] = lines
            continue
        name = "rising" if kinds == {"heavy"} else "mixed" if kinds == {"heavy", "full"} else "elastic"
        found["annealed" if kinds == {"light"} else name] = lines
    assert found.keys() == {"mixed", "rising", "elastic", "layered", "annealed"}
    amounts = [line["visual_tokens"] for line in found.pop("annealed")]
    assert amounts == sorted(amounts, reverse=True) and len(set(amounts)) == 3
    mixed = [line["variant"] for line in found["mixed"]]
    assert [step for step, name in enumerate(mixed) if name == "full"] == [1, 4, 7]
    for lines in found.values():
        for line in lines:
            assert ("distill_loss" in line) == (line["variant"] != "full")
            assert line.get("distill_loss", 1.0) > 0
    rising = [line["visual_tokens"] for line in found["rising"]]
    assert rising == sorted(rising, reverse=True) and len(set(rising)) == 3
    names = {line["variant"] for line in found["layered"]}
    assert names == {"full + heavy + light", "full + heavy + lighter"}
    assert len(weights_of(folder)) == 5


@pytest.mark.slow
def test_nothing_is_left_to_do(finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    again = run_forked(["run", "tiny.yaml", "--local"], folder)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    plan = run_forked(["plan", "tiny.yaml", "--json"], folder)
    runs = json.loads(plan.stdout)["stage_runs"]
    assert sorted(run["variant"] for run in runs) == ["interleaved", "ramp", "random_scale", "sandwich", "stages"]
    assert {run["state"] for run in runs} == {"done"}
    assert all(run["actions"][0][0] == 0 and run["actions"][-1][1] == 9 for run in runs)


@pytest.mark.slow
@pytest.mark.slow
def test_interrupted_and_resumed_is_left_alone(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = finished
    (tmp_path / "tiny.yaml").write_text((folder / "tiny.yaml").read_text())
    command = [*PROGRAM, "run", "tiny.yaml", "--local"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 120
    while not has_trained(tmp_path / "runs" / "work"):
        assert process.poll() is None and time.monotonic() < limit
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, output + errors
    again = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert weights_of(tmp_path) == weights_of(folder) and len(weights_of(folder)) == 5
