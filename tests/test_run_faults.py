"""What goes wrong in a run is told in one readable block, and the work that is done stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image

RUN = [sys.executable, "-m", "orchestrator", "run", "mine.yaml"]


def weights_of(folder: Path) -> dict[str, bytes]:
    cells = folder / "runs" / "cells" / "tiny"
    return {path.parts[-3]: path.read_bytes() for path in sorted(cells.glob("*/weights/model.safetensors"))}


def test_a_killed_worker_is_started_again_from_its_checkpoint_and_ends_the_same(tmp_path, tiny_text):
    text = tiny_text.replace("max_steps: 6", "max_steps: 40").replace("[full, heavy, two_stage]", "[two_stage]")
    text += "cluster: {checkpoint_every: 5}\n"
    env = {**os.environ, "LLAVOLTA_TEST": str(tmp_path)}
    disturbed, alone = tmp_path / "disturbed", tmp_path / "alone"
    for folder in (disturbed, alone):
        folder.mkdir()
        (folder / "mine.yaml").write_text(text)
    process = subprocess.Popen(
        RUN, cwd=disturbed, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    killed = False
    while not killed and process.poll() is None:
        if list((disturbed / "runs").glob("work/*/step_*/manifest.json")):
            for worker in psutil.Process(process.pid).children(recursive=True):
                if worker.name().startswith("ray::RayTrain"):
                    worker.send_signal(signal.SIGKILL)
                    killed = True
        psutil.wait_procs([psutil.Process(process.pid)], timeout=0.05)
    output, errors = process.communicate(timeout=240)
    assert killed and process.returncode == 0, output + errors
    assert "retried" in output and "Traceback" not in output + errors
    done = subprocess.run(
        [*RUN, "--local"], cwd=alone, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert weights_of(disturbed) == weights_of(alone) and weights_of(alone)
    for folder in (disturbed, alone):
        for path in (folder / "runs" / "stage_runs").glob("*/metrics.jsonl"):
            steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
            assert steps == list(range(steps[0], steps[0] + 20))


def test_two_drivers_started_together_do_each_job_once_and_both_end_with_the_table(tmp_path, tiny_text):
    (tmp_path / "mine.yaml").write_text(tiny_text)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    drivers = [
        subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in ([*RUN, "--local"], RUN)
    ]
    ended = [driver.communicate(timeout=300) for driver in drivers]
    for driver, (output, errors) in zip(drivers, ended, strict=True):
        assert driver.returncode == 0 and "Traceback" not in errors, output + errors
    tables = [[line.split() for line in output.splitlines() if "finished" in line] for output, _ in ended]
    assert tables[0] == tables[1] and len(tables[0]) == 3
    done = [
        sum("  done  " in line and "by another run" not in line for line in output.splitlines()) for output, _ in ended
    ]
    assert sum(done) == 8  # stage runs and evaluations
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED"] * 3


def test_a_damaged_parent_is_trained_again_and_the_run_ends_the_same(tmp_path, tiny_text, llavolta):
    whole = tmp_path / "whole"
    whole.mkdir()
    (tmp_path / "mine.yaml").write_text(tiny_text.replace("[full, heavy, two_stage]", "[heavy]"))
    assert llavolta("run", "mine.yaml", "--local").returncode == 0
    (tmp_path / "mine.yaml").write_text(tiny_text)
    (root,) = (
        json.loads(p.read_text())["parent"]
        for p in (tmp_path / "runs" / "stage_runs").glob("*/job.json")
        if json.loads(p.read_text())["type"] == "stage"
    )
    file = tmp_path / "runs" / "stage_runs" / root / "weights" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = llavolta("run", "mine.yaml", "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a state it needs is damaged and is made again" in done.stdout
    alone = llavolta("run", "mine.yaml", "--local", "--set", "name=tiny", LLAVOLTA_STORAGE=str(whole / "runs"))
    assert alone.returncode == 0 and weights_of(whole) == weights_of(tmp_path) and len(weights_of(whole)) == 3


def test_a_failing_cell_is_told_and_its_siblings_go_on(tmp_path, tiny_text, llavolta):
    text = tiny_text.replace(
        "phases.finetune.schedule: [full, heavy, two_stage]", "phases.finetune.max_grad_norm: [1.0]"
    )
    text = text.replace(
        "matrix:", "include: [{phases.finetune.learning_rate: 1.0e+30, phases.finetune.max_grad_norm: 0.0}]\nmatrix:"
    )
    (tmp_path / "mine.yaml").write_text(text)
    done = llavolta("run", "mine.yaml", "--local")
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "diverged at step" in done.stdout and "--retry-failed" in done.stdout
    table = json.loads(llavolta("table", "mine.yaml", "--json").stdout)
    assert sorted(row["status"] for row in table["rows"]) == ["failed", "finished"]
    again = llavolta("run", "mine.yaml")
    assert again.returncode == 1 and "nothing to do" in again.stdout


@pytest.mark.parametrize("broken", ["missing", "truncated"])
def test_a_bad_image_is_told_with_its_row_before_anything_starts(tmp_path, tiny_text, llavolta, broken):
    rows = []
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    if broken == "missing":
        (tmp_path / "5.png").unlink()
    else:
        (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:30])
    text = tiny_text.replace(
        "{kind: easy_vqa, split: train, max_samples: 200}",
        "{kind: llava_json, data_path: rows.json, image_folder: ., conversation_template: plain}",
    )
    (tmp_path / "mine.yaml").write_text(text)
    done = llavolta("run", "mine.yaml")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "row 5" in done.stderr and "5.png" in done.stderr
    assert not (tmp_path / "runs" / "stage_runs").exists()


def test_a_full_disk_keeps_what_is_done_and_the_same_command_goes_on(tmp_path, tiny_text, llavolta):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk can only be mounted by root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        (tmp_path / "mine.yaml").write_text(tiny_text + f"cluster: {{storage_path: {disk}/runs}}\n")
        done = llavolta("run", "mine.yaml", "--local")
        assert done.returncode == 1 and "No space left on device" in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        finished = set((disk / "runs" / "stage_runs").iterdir())
        assert finished
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = llavolta("run", "mine.yaml", "--local")
        assert again.returncode == 0, again.stdout + again.stderr
        assert finished <= set((disk / "runs" / "stage_runs").iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_tracking_server_that_is_down_delays_the_record_and_loses_nothing(tmp_path, tiny_text, llavolta):
    (tmp_path / "mine.yaml").write_text(tiny_text.replace("[full, heavy, two_stage]", "[full]"))
    done = llavolta("run", "mine.yaml", "--local", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "MLflow has not recorded" in done.stderr and "127.0.0.1:9" in done.stderr
    again = llavolta("run", "mine.yaml")
    assert again.returncode == 0 and "nothing to do" in again.stdout and "MLflow has not" not in again.stderr
    assert (tmp_path / "runs" / "mlflow.db").exists()
