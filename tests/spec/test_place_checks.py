"""What cannot run is refused by `validate`, with the reason and what to do: places, folders, implementations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.loader import load_experiment

ROWS = "train: {kind: easy_vqa, split: train}"
MODEL = "model_name_or_path: tiny, weights: random"
PARTS = "model_name_or_path: tiny, weights: {{vision_tower: {}, projector: random, language_model: {}}}"
JSON = "train: {{kind: llava_json, data_path: {}}}"
TABLE = [
    (("seed: 0", "cluster: {address: 'ray://head:10001'}"), "does not run over Ray's client"),
    ((ROWS, JSON.format("https://host/rows.json")), "not from an address"),
    ((ROWS, JSON.format("s3://bucket/rows.json")), "not from an address"),
    ((ROWS, JSON.format("hf://datasets/org/rows.json")), "not from an address"),
    ((ROWS, JSON.format("rows.parquet")), "`.parquet` files are not read"),
    ((ROWS, JSON.format("rows.CSV")), "`.CSV` files are not read"),
    ((ROWS, JSON.format("tiny")), "a folder stands where a file belongs"),
    ((ROWS, JSON.format("rows.json, image_folder: experiment.yaml")), "a file stands where a folder belongs"),
    ((MODEL, "model_name_or_path: adapter, weights: random"), "merge_and_unload"),
    ((MODEL, "model_name_or_path: gguf"), "GGUF holds quantised weights"),
    ((MODEL, "model_name_or_path: empty"), "the folder has no config.json"),
    ((MODEL, PARTS.format("random", "adapter")), "merge_and_unload"),
    ((MODEL, PARTS.format("empty", "random")), "the folder has no config.json"),
    ((MODEL, PARTS.format("random", "gguf/model.gguf")), "GGUF holds quantised weights"),
]


@pytest.fixture
def places(folder: Path) -> Path:
    for name in ("adapter/adapter_config.json", "gguf/model.gguf", "empty/notes.txt"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(("change", "message"), TABLE, ids=[change[1][:60] for change, _ in TABLE])
def test_what_cannot_be_used_is_refused(
    places: Path, write: Callable[..., Path], small: str, change: tuple[str, str], message: str
) -> None:
    text = f"seed: 0\n{small}"
    assert change[0] in text
    with pytest.raises(SpecError) as caught:
        load_experiment(write(text.replace(*change)))
    (fault,) = caught.value.faults
    assert message in f"{fault.message} {fault.hint}"
    assert fault.line is not None and fault.value is not None


def test_data_that_is_not_here_yet_is_noted(folder: Path, write: Callable[..., Path], small: str) -> None:
    loaded = load_experiment(write(small.replace(ROWS, JSON.format("rows.json"))))
    assert [notice for notice in loaded.notices if f"data.train.data_path: there is no {folder}/rows.json" in notice]


PLUGIN = """
from typing import ClassVar, Literal
from orchestrator.spec.components import DataSpec

class OwnRows(DataSpec):
    {implementation}
    kind: Literal["own_rows"] = "own_rows"
    def num_rows(self): return 10
    def content_digest(self): return ""

class Whole:
    def rows(self): return []

class Lacking:
    def lines(self): return []

def make(): return Whole()
"""


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("", "names nothing"),
        ("implementation: ClassVar[str] = 'Whole'", "is not MODULE:CLASS"),
        ("implementation: ClassVar[str] = 'nowhere_at_all:Whole'", "there is no module nowhere_at_all"),
        ("implementation: ClassVar[str] = 'nowhere_at_all.deep:Whole'", "there is no module nowhere_at_all.deep"),
        ("implementation: ClassVar[str] = __name__ + ':Hole'", "the module has no Hole"),
        ("implementation: ClassVar[str] = __name__ + ':Lacking'", "Lacking lacks rows()"),
        ("implementation: ClassVar[str] = __name__ + ':Whole'", None),
        ("implementation: ClassVar[str] = __name__ + ':make'", None),
    ],
)
def test_an_implementation_is_there(
    write: Callable[..., Path], small: str, implementation: str, message: str | None
) -> None:
    write(PLUGIN.format(implementation=implementation), "own.py")
    file = write("plugins: [own.py]\n" + small.replace(ROWS, "train: {kind: own_rows}"))
    if message is None:
        assert load_experiment(file).cells
        return
    with pytest.raises(SpecError) as caught:
        load_experiment(file)
    (fault,) = caught.value.faults
    assert message in fault.message and fault.path == "data.train.kind"
