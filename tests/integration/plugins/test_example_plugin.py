"""A plug-in package outside the tree: installed offline, found through its entry point, proven by the kit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from program import run_anew
from repository import ROOT

PACKAGE = ROOT / "tests" / "example_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the installed plug-in and nothing else."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(folder / "site"), str(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_program_lists_it(installed, tmp_path):
    site = str(installed / "site")
    assert "max_norm" in run_anew(["compressors"], tmp_path, PYTHONPATH=site).stdout
    assert "max_norm" not in run_anew(["compressors"], tmp_path).stdout


def test_an_experiment_file_may_name_it(installed, tmp_path, tiny_text):
    text = tiny_text.replace("kind: average_pool, layer: 1, stride: 8", "kind: max_norm, layer: 1, keep_ratio: 1/4")
    (tmp_path / "mine.yaml").write_text(text)
    done = run_anew(["validate", "mine.yaml"], tmp_path, PYTHONPATH=str(installed / "site"))
    assert done.stdout == "valid: 3 cells\n", done.stdout + done.stderr
    without = run_anew(["validate", "mine.yaml"], tmp_path)
    assert without.returncode != 0 and "max_norm" in without.stdout + without.stderr


def test_its_own_test_calls_the_kit(installed):
    environment = os.environ | {"PYTHONPATH": str(installed / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "test_max_norm.py"],
        cwd=installed / "source",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
