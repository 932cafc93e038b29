"""What goes wrong in a run is told in one readable block, and the work that is done stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from orchestrator.errors import StorageError
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.ledger.inventory import recorded_experiments
from orchestrator.run import GridSession
from orchestrator.tracking.upload_queue import UploadQueue


def weights_of(folder: Path) -> dict[str, bytes]:
    cells = folder / "runs" / "cells" / "tiny"
    return {path.parts[-3]: path.read_bytes() for path in sorted(cells.glob("*/weights/model.safetensors"))}


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
    assert "nothing was run" not in done.stdout
    table = json.loads(llavolta("table", "mine.yaml", "--json").stdout)
    assert sorted(row["status"] for row in table["rows"]) == ["failed", "finished"]
    again = llavolta("run", "mine.yaml")
    assert again.returncode == 1 and "nothing to do" not in again.stdout
    assert "nothing was run: 1 cell failed before; --retry-failed" in again.stdout


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


def test_a_tracking_server_that_is_down_delays_the_record_and_loses_nothing(tmp_path, tiny_text, llavolta):
    (tmp_path / "mine.yaml").write_text(tiny_text.replace("[full, heavy, two_stage]", "[full]"))
    done = llavolta("run", "mine.yaml", "--local", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "MLflow has not recorded" in done.stderr and "127.0.0.1:9" in done.stderr
    again = llavolta("run", "mine.yaml")
    assert again.returncode == 0 and "nothing to do" in again.stdout and "MLflow has not" not in again.stderr
    assert (tmp_path / "runs" / "mlflow.db").exists()


def begun(tiny_experiment, monkeypatch):
    """A run before its first job."""
    monkeypatch.chdir(tiny_experiment.parent)
    walk = prepare(tiny_experiment)
    work = walk.tree.work(walk.ledger)
    return walk, work, GridSession(walk, Console(quiet=True), lambda walk: walk.tree.work(walk.ledger))


def test_a_record_that_cannot_be_read_stops_no_training(tiny_experiment, monkeypatch):
    walk, work, run = begun(tiny_experiment, monkeypatch)
    for job in work:
        (walk.ledger.storage / "failures" / f"{job.id}.json").mkdir(parents=True)
    with pytest.raises(StorageError):
        walk.record(walk.cells[0])
    with UploadQueue(lambda: pytest.fail("nothing can be sent"), lambda record, _: None) as run._recorder:
        run.on_event({"event": "finished", "id": work[0].id, "type": "root", "attempt": 1})
    assert run.done == {work[0].id} and run._recorder.problem is None


def test_a_plan_made_again_is_recorded_for_gc(tiny_experiment, monkeypatch):
    walk, work, run = begun(tiny_experiment, monkeypatch)
    assert recorded_experiments(walk.ledger.store) == []
    assert run.newer_work() is None
    run.on_event({"event": "damaged", "id": work[0].id, "type": "root", "attempt": 1, "state": work[0].id})
    assert [job.id for job in run.newer_work()] == [job.id for job in work]
    assert {job.id for job in work} <= {
        *recorded_experiments(walk.ledger.store)[0].states,
        *recorded_experiments(walk.ledger.store)[0].evaluations,
    }
