"""What a machine lacks of what a run needs: each thing by its path, in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.dispatch.node_needs import Needs, lacks, needs_for
from orchestrator.plan.ledger import Ledger


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """A stage run that reads a file of rows, a folder of images, a model's folder and a plug-in."""
    for name in ("images/inner", "model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "images" / "one.png").write_bytes(b"png")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "mine.py").write_text("a = 1\n")
    spec = {"kind": "llava_json", "data_path": f"{tmp_path}/rows.json", "image_folder": f"{tmp_path}/images"}
    return {
        "type": "stage",
        "model": {"model_name_or_path": f"{tmp_path}/model", "weights": {"vision_tower": "openai/clip"}},
        "data": [{"name": "rows", "spec": spec}, {"name": "drawn", "spec": {"kind": "easy_vqa"}}],
        "plugins": [f"{tmp_path}/mine.py", "json"],
    }


@pytest.fixture
def needs(job: dict[str, Any], tmp_path: Path) -> Needs:
    """What machines need for it."""
    evaluation = {"model": job["model"], "data": job["data"][0]["spec"], "plugins": ["json.decoder"]}
    rehearsal = {"stage": {**job, "plugins": []}, "evaluations": [evaluation], "plugins": []}
    return needs_for([job, evaluation, rehearsal], Ledger(tmp_path / "runs"))


def test_the_machine_that_was_asked_lacks_nothing(needs: Needs, tmp_path: Path) -> None:
    assert lacks(needs) == [] and os.listdir(tmp_path / "runs") == ["storage.json"]
    assert list(needs.files) == [f"{tmp_path}/rows.json"]
    assert needs.folders == {f"{tmp_path}/images": {"inner": -1, "one.png": 3}, f"{tmp_path}/model": {"config.json": 2}}
    assert set(needs.plugins) == {f"{tmp_path}/mine.py", "json", "json.decoder"}


def test_each_thing_that_is_not_there_or_differs_is_named(needs: Needs, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[1]")
    (tmp_path / "images" / "one.png").write_bytes(b"another")
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "mine.py").write_text("a = 2\n")
    (tmp_path / "runs" / "storage.json").write_text(json.dumps({"id": "another"}))
    assert lacks(needs) == [
        f"{tmp_path}/mine.py: the plug-in's source is not the driver's",
        f"{tmp_path}/rows.json: its content is not that of the driver's",
        f"{tmp_path}/images: its one.png is not the driver's",
        f"{tmp_path}/model: no such folder",
        f"{tmp_path}/runs: another storage here; cluster.storage_path must be one folder that all nodes see, or "
        "s3://bucket/prefix",
    ]
    (tmp_path / "rows.json").unlink()
    (tmp_path / "images" / "one.png").unlink()
    (tmp_path / "mine.py").unlink()
    shutil.rmtree(tmp_path / "runs")
    assert lacks(replace(needs, plugins={**needs.plugins, "no.such": ""})) == [
        f"{tmp_path}/mine.py: no such file, and the run uses this plug-in",
        "no.such: no such module is installed, and the run uses this plug-in",
        f"{tmp_path}/rows.json: no such file",
        f"{tmp_path}/images: there is no one.png in it",
        f"{tmp_path}/model: no such folder",
        f"{tmp_path}/runs: empty or missing here; cluster.storage_path must be one folder that all nodes see, or "
        "s3://bucket/prefix",
    ]
    assert not (tmp_path / "runs").exists()


def test_another_program_and_other_packages(needs: Needs) -> None:
    program = {**needs.program, "orchestrator/run.py": "0", "orchestrator/gone.py": "0"}
    first, *rest = lacks(
        replace(needs, program=program, versions={**needs.versions, "pydantic": "1.0", "nothing": "2"})
    )
    assert first.endswith(
        "orchestrator/gone.py: it is not the driver's, nor are 1 more files of the program; install the same version "
        "on all nodes"
    )
    assert rest[0].startswith("pydantic 2.") and rest[0].endswith(": the driver has 1.0")
    assert rest[1:] == ["nothing is not installed: the driver has 2"]


def test_builds_of_one_version_are_one_version(needs: Needs) -> None:
    assert all("+" not in version for version in needs.versions.values())
