"""What tests of the whole walk share: a tiny experiment on real data, and the program as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
collect_ignore = ["example_plugin"]  # a package of its own; tests/plugins/test_example_plugin.py installs and tests it
TINY_LLAVA = ROOT / "experiments" / "models" / "tiny-llava"

TINY_EXPERIMENT = f"""
schema_version: 1
name: tiny
model: {{model_name_or_path: {TINY_LLAVA}, weights: random, dtype: float32}}
data:
  train: {{kind: easy_vqa, split: train, max_samples: 200}}
  test: {{kind: easy_vqa, split: test, max_samples: 40}}
compressors:
  heavy: {{kind: average_pool, layer: 1, stride: 8}}
schedules:
  two_stage:
    kind: stages
    stages: [{{share: 1/2, compressor: heavy}}, {{}}]
phases:
  finetune:
    data: train
    train: [vision_tower, projector, language_model]
    max_steps: 6
    global_batch_size: 16
    per_device_train_batch_size: 8
    learning_rate: 1.0e-3
    model_max_length: 128
    deepspeed: zero0
evaluate:
  vqa: {{kind: exact_match, data: test, under: [final, full]}}
matrix:
  phases.finetune.schedule: [full, heavy, two_stage]
"""


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """Three cells of six steps; `heavy` and `two_stage` begin alike."""
    return TINY_EXPERIMENT


@pytest.fixture
def tiny_experiment(tmp_path: Path, tiny_text: str) -> Path:
    """The tiny experiment as a file in an otherwise empty folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_text)
    return path


@pytest.fixture
def llavolta(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Starts the program in an empty folder without a terminal, as a script would."""

    def start(*arguments: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "LLAVOLTA", "RAY_"))}
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *map(str, arguments)],
            cwd=tmp_path,
            env={**env, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return start
