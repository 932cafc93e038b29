"""Experiment files in a folder of their own, with the design's example and a small LLaVA config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from spec_files import TINY

from orchestrator import registry

SMALL = """\
name: small
model: {model_name_or_path: tiny, weights: random}
data:
  train: {kind: easy_vqa, split: train}
  test: {kind: easy_vqa, split: test}
compressors:
  heavy: {kind: average_pool, layer: 2, stride: 8}
  wide: {kind: average_pool, layer: 2, stride: 2}
schedules:
  two:
    kind: stages
    stages: [{share: 1/2, compressor: heavy}, {}]
phases:
  finetune:
    data: train
    schedule: two
    max_steps: 100
    learning_rate: 1e-3
evaluate:
  vqa: {kind: exact_match, data: test}
"""


@pytest.fixture(autouse=True)
def _own_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plug-ins of one test are unknown to the next, which may use the same names."""
    monkeypatch.setattr(registry, "_from_plugins", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the model `tiny`: 4 decoder layers, 8 x 8 visual tokens."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    for name in ("tokenizer.json", "processor_config.json"):
        (tmp_path / "tiny" / name).touch()
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    """Writes a file into the folder."""

    def _write(text: str | bytes, name: str = "experiment.yaml") -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return _write


@pytest.fixture
def small() -> str:
    """A small valid experiment."""
    return SMALL
