"""Whatever stands in an experiment file, it is an experiment or a list of errors, and nothing else is raised."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from mutations import mutated
from repository import ROOT

from orchestrator.errors import SpecError
from orchestrator.spec.loader import load_experiment

FILES = sorted((ROOT / "experiments").rglob("*.yaml"))


@pytest.mark.parametrize("numbers", [range(60), pytest.param(range(60, 10_060), marks=pytest.mark.slow)])
def test_an_experiment_or_its_errors(numbers: range, tmp_path: Path) -> None:
    folder = tmp_path / "experiments"
    shutil.copytree(ROOT / "experiments", folder)
    for number in numbers:
        source = FILES[number % len(FILES)]
        file = folder / source.relative_to(ROOT / "experiments").with_name("mutated.yaml")
        file.write_text(mutated(source.read_text(), number), encoding="utf-8")
        with contextlib.suppress(SpecError):
            assert load_experiment(file).cells, number
