"""What travels with a submitted experiment, what must be there already, and what one content is."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

import orchestrator as llv
from orchestrator import registry
from orchestrator.dispatch.package import FOLDER, MOST_MIB, Package, package_of

pytestmark = pytest.mark.usefixtures("built_in_only")
PLUGIN = """
from typing import Literal
from orchestrator_plugins.data.easy_vqa import EasyVqaSpec

class MineSpec(EasyVqaSpec):
    \"\"\"easy_vqa.\"\"\"
    kind: Literal["mine"] = "mine"
"""
BASE = """
schema_version: 1
name: base
model: {model_name_or_path: ../models/tiny, weights: random}
plugins: [plug.py]
data:
  train: {kind: mine, split: train}
  rows: {kind: llava_json, data_path: /there/rows.json, image_folder: ~/images, num_samples: 8}
compressors: {heavy: {kind: average_pool, layer: 1, stride: 8}}
phases:
  finetune: {data: train, schedule: heavy, max_steps: 2, global_batch_size: 16, deepspeed: ../zero.json}
"""
SPEC = """
schema_version: 1
name: mine
extends: parts/base.yaml
cluster: {storage_path: /there/results}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_text: str) -> Path:
    """An experiment over two folders: spec, what it extends, a plug-in, a model's folder, a DeepSpeed file."""
    model = Path(tiny_text.partition("model_name_or_path: ")[2].partition(",")[0])
    return _write(tmp_path / "work", model)


def _write(folder: Path, model: Path) -> Path:
    (folder / "parts").mkdir(parents=True)
    (folder / "models" / "tiny").mkdir(parents=True)
    for file in model.iterdir():
        (folder / "models" / "tiny" / file.name).write_bytes(file.read_bytes())
    (folder / "parts" / "plug.py").write_text(PLUGIN)
    (folder / "parts" / "base.yaml").write_text(BASE)
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    (folder / "mine.yaml").write_text(SPEC)
    (folder / "notes.txt").write_text("stays at home")
    return folder


def packed(file: Path, *settings: str) -> Package:
    return package_of(llv.load(file, settings).loaded)


def test_what_is_named_by_a_relative_path_travels_and_nothing_else(folder: Path) -> None:
    package = packed(folder / "mine.yaml")
    model = {f"{FOLDER}/models/tiny/{file.name}" for file in (folder / "models" / "tiny").iterdir()}
    own = {f"{FOLDER}/{name}" for name in ("mine.yaml", "parts/base.yaml", "parts/plug.py", "zero.json")}
    assert set(package.files) == own | model
    assert package.spec == f"{FOLDER}/mine.yaml"
    assert package.elsewhere == ("data.rows.data_path: /there/rows.json", "data.rows.image_folder: ~/images")


def test_what_travelled_is_the_same_experiment_where_it_arrives(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, there = tmp_path / "a.zip", tmp_path / "there"
    package = packed(folder / "mine.yaml")
    package.write(archive)
    first = archive.read_bytes()
    package.write(archive)
    assert archive.read_bytes() == first
    before = [cell.id for cell in llv.load(folder / "mine.yaml").cells]
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(there)
    monkeypatch.setattr(registry, "_from_plugins", {})  # as in the process there
    monkeypatch.chdir(there / package.folder)
    assert [cell.id for cell in llv.load(there / package.spec).cells] == before
    assert packed(there / package.spec).digest == package.digest


def test_a_path_of_set_is_found_from_the_folder_that_stands_for_this_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "models")
    package = packed(folder / "mine.yaml", "phases.finetune.deepspeed=../zero.json")
    assert package.folder == f"{FOLDER}/models"
    assert f"{FOLDER}/zero.json" in package.files


def test_the_content_is_what_counts(folder: Path) -> None:
    spec, plug = folder / "mine.yaml", folder / "parts" / "plug.py"
    digest = packed(spec).digest
    spec.write_text(SPEC + "# a remark\n")
    (folder / "notes.txt").write_text("other notes")
    assert packed(spec, "cluster.address=auto", "seed=0").digest == digest
    assert packed(spec, "seed=3").digest != digest
    plug.write_text(plug.read_text() + "# another version\n")
    assert packed(spec).digest != digest


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["cluster.storage_path=null"], "says where its results go"),
        (["cluster.storage_path=here"], "would be removed with the job"),
        (["tracking.tracking_uri=sqlite:///here.db"], "would be removed with the job"),
        (["data.rows.data_path=nowhere.json"], "there is nothing to send"),
    ],
)
def test_what_cannot_be_submitted_is_told_at_once(folder: Path, settings: list[str], told: str) -> None:
    with pytest.raises(llv.SpecError, match=told):
        packed(folder / "mine.yaml", *settings)


def test_much_does_not_travel(folder: Path) -> None:
    with (folder / "models" / "tiny" / "model.safetensors").open("wb") as weights:
        weights.truncate((MOST_MIB << 20) + 1)
    with pytest.raises(llv.SpecError, match=f"at most {MOST_MIB} MiB") as caught:
        packed(folder / "mine.yaml")
    [error] = caught.value.errors
    assert (error.path, error.value) == ("model.model_name_or_path", "../models/tiny")
    assert error.file == str(folder / "parts" / "base.yaml") and error.line is not None


def test_no_secret_travels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "the-token-of-this-test")
    (folder / "mine.yaml").write_text(SPEC + "# the-token-of-this-test\n")
    with pytest.raises(llv.SpecError, match="must not travel") as caught:
        packed(folder / "mine.yaml")
    assert "the-token-of-this-test" not in str(caught.value)


def test_a_mapping_is_no_file() -> None:
    experiment = llv.load({"schema_version": 1, "name": "m", "model": {"model_name_or_path": "a/b"}, "phases": {}})
    with pytest.raises(llv.UsageError, match="write it to a file"):
        package_of(experiment.loaded)
