"""A small search on the tiny model, as a file and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.loader import load_experiment

SEARCH = """
search:
  objectives: {eval/vqa/accuracy: max, cost/train_tflops: min}
  num_trials: 4
  space:
    phases.finetune.schedule:
      kind: staged_space
      num_stages: [1, 2, 3]
      variants: [full, light, heavy, wide]
      last: full
      boundaries: 1/4
"""


@pytest.fixture(scope="session")
def search_text(tiny_text: str) -> str:
    """The tiny experiment with a search in place of its grid; eight steps, quarters of two."""
    text = tiny_text[: tiny_text.index("matrix:")].replace("max_steps: 6", "max_steps: 8")
    more = "  wide: {kind: average_pool, layer: 1, stride: 2}\n  light: {kind: average_pool, layer: 2, stride: 2}\n"
    return text.replace("schedules:", more + "schedules:") + SEARCH


@pytest.fixture
def search_file(tmp_path: Path, search_text: str) -> Path:
    """The search in an otherwise empty folder."""
    path = tmp_path / "search.yaml"
    path.write_text(search_text)
    return path


@pytest.fixture
def loaded(search_file: Path) -> LoadedExperiment:
    """The search, loaded."""
    return load_experiment(search_file)
