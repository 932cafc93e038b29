"""Fixtures of tests on training: a tiny model and rows of uneven length, written once a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_workers import write_model, write_uneven_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of the model, file of the rows."""
    folder = tmp_path_factory.mktemp("made")
    return write_model(folder / "model"), write_uneven_rows(folder)
