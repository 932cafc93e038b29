"""make_database(): an MLflow database that appears with all of its tables, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from orchestrator.plan.steady import found_at, steady


def make_database(path: Path) -> None:
    """Makes an sqlite file with MLflow's tables where there is none yet.

    MLflow makes its tables one after the other: killed in between, or met by a second process that does the same, it
    leaves a file that neither it nor `mlflow server` opens again. So they are made aside, and linked into place.

    Args:
        path: The file; one that exists is left as it is.

    Raises:
        Exception: of many kinds, MLflow's too: the disk is full, or the folder cannot be written.
    """
    steady(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    if found_at(path) is not None:
        return
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder:
        made, whole = Path(folder) / "made.db", Path(folder) / "whole.db"
        MlflowClient(f"sqlite:///{made}")
        # A copy: MLflow keeps the first file open, and its locks must not be those of the second.
        shutil.copyfile(made, whole)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was quicker
            os.link(whole, path)
