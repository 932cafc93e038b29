"""A toy experiment for plan tests: a real model folder, a plug-in data kind and evaluation, cells from mappings."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from repository import TINY_LLAVA

from orchestrator import registry
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.spec.experiment import ExperimentSpec

PLUGIN = """
from typing import ClassVar, Literal
import hashlib, json, pathlib
from orchestrator.data.rows import Row, Turn
from orchestrator.spec.components import DataSpec, EvaluationSpec

class ToyRows(DataSpec):
    implementation: ClassVar[str] = __name__ + ":Reader"
    not_identity: ClassVar[frozenset[str]] = frozenset({"num_samples"})
    path_fields: ClassVar[tuple[str, ...]] = ("file",)
    kind: Literal["toy_rows"] = "toy_rows"
    file: str
    conversation_template: str = "vicuna_v1"
    num_samples: int | None = None
    def num_rows(self):
        path = pathlib.Path(self.file)
        return len(json.loads(path.read_text())) if path.exists() else self.num_samples
    def content_digest(self):
        return hashlib.sha256(pathlib.Path(self.file).read_bytes()).hexdigest()

class Reader:
    def __init__(self, spec): self.spec = spec
    def rows(self):
        texts = json.loads(pathlib.Path(self.spec.file).read_text())
        return [Row(i, (), (Turn("user", q), Turn("assistant", a))) for i, (q, a) in enumerate(texts)]

class ToyMatch(EvaluationSpec):
    kind: Literal["toy_match"] = "toy_match"
    max_new_tokens: int = 8
"""


@dataclass
class Named:
    """Stands for the loader's cell."""

    name: str
    axes: dict[str, Any]
    spec: ExperimentSpec


@dataclass
class Loaded:
    """Stands for the loader's experiment."""

    cells: tuple[Named, ...]
    spec: ExperimentSpec = field(init=False)
    notices: tuple[str, ...] = ()
    starts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec = self.cells[0].spec


class Lab:
    """Makes cells from changes to one base experiment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(TINY_LLAVA, folder / "model")
        (folder / "rows.json").write_text(json.dumps([["What color?", "red"]] * 100))
        (folder / "other.json").write_text(json.dumps([["Is it blue?", "no"]] * 60))
        self.base: dict[str, Any] = {
            "name": "toy",
            "model": {"model_name_or_path": str(folder / "model"), "weights": "random", "dtype": "float32"},
            "data": {
                "train": {"kind": "toy_rows", "file": str(folder / "rows.json")},
                "test": {"kind": "toy_rows", "file": str(folder / "other.json")},
                "unused": {"kind": "toy_rows", "file": str(folder / "other.json"), "max_samples": 3},
            },
            "compressors": {
                "heavy": {"kind": "average_pool", "layer": 2, "stride": 8},
                "wide": {"kind": "average_pool", "layer": 2, "stride": 2},
                "light": {"kind": "average_pool", "layer": "75%", "stride": 2},
                "unused": {"kind": "average_pool", "layer": 0, "stride": 3},
            },
            "schedules": {"two": {"kind": "stages", "stages": [{"share": "1/2", "compressor": "heavy"}, {}]}},
            "phases": {
                "pretrain": {"data": "train", "train": ["projector"], "max_steps": 10, "seed": 5},
                "finetune": {
                    "data": {"train": 1.0, "test": 0.5},
                    "train": ["projector", "language_model"],
                    "max_steps": 20,
                    "schedule": "two",
                    "global_batch_size": 8,
                    "lora": {},
                    "learning_rate": {"projector": 1e-3, "language_model": 2e-5},
                },
            },
            "evaluate": {"score": {"kind": "toy_match", "data": "test", "under": ["final", "full", "heavy"]}},
        }

    def tree(self, **changes: Any) -> dict[str, Any]:
        """The base with dotted paths (`__` for a dot) set; `...` takes a key out."""
        tree = copy.deepcopy(self.base)
        for path, value in changes.items():
            *parents, last = path.split("__")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            if value is ...:
                del node[last]
            else:
                node[last] = value
        return tree

    def loaded(self, *trees: dict[str, Any]) -> Loaded:
        """An experiment of one cell per tree."""
        return Loaded(tuple(Named(f"cell{i}", {"i": i}, ExperimentSpec.model_validate(t)) for i, t in enumerate(trees)))

    def cell(self, **changes: Any) -> Cell:
        """The one cell of the changed base."""
        return expand_cells(self.loaded(self.tree(**changes)))[0]

    def schedules(self, *schedules: Any, **changes: Any) -> tuple[Cell, ...]:
        """A cell for each schedule: a name, or a list of variants of equal shares."""
        trees = []
        for schedule in schedules:
            if not isinstance(schedule, str):
                stages = [{"share": f"1/{len(schedule)}", "compressor": name} for name in schedule]
                schedule = {"kind": "stages", "stages": stages}
            trees.append(self.tree(**changes, phases__finetune__schedule=schedule))
        return expand_cells(self.loaded(*trees))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def toy_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plug-in file with a data kind and an evaluation, registered once."""
    file = tmp_path_factory.mktemp("plugin") / "toy_components.py"
    file.write_text(PLUGIN)
    registry.load_plugin(file.name, file.parent)
    return file


@pytest.fixture
def lab(tmp_path: Path, toy_plugin: Path) -> Lab:
    """The toy experiment."""
    return Lab(tmp_path)
