"""The verbs data check and data show print what the functions return."""

from __future__ import annotations

import functools
import json
import subprocess

import pytest
from inspected_rows import GOOD, cells, record, write_experiment
from program import run_forked

import orchestrator as llv
from orchestrator.data.check import check_document, row_document
from orchestrator.errors import DataError


def test_the_verbs(tmp_path):
    experiment = functools.partial(write_experiment, tmp_path)

    def llavolta(*arguments: str) -> subprocess.CompletedProcess:
        return run_forked(["data", *arguments], tmp_path)

    path = experiment([*GOOD, record(3, "<image>\nGone", "Yes", image="gone.png")])
    done = llavolta("check", "look.yaml", "--json")
    assert done.returncode == 1 and json.loads(done.stdout) == check_document(cells(path)), done.stderr
    done = llavolta("show", "look.yaml", "--row", "1", "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == row_document(cells(path), None, 1), done.stderr
    done = llavolta("show", "look.yaml", "--data", "test", "--format", "html", "-o", "row.html")
    assert done.returncode == 0 and "<img" in (path.parent / "row.html").read_text(), done.stderr
    done = llavolta("show", "look.yaml", "--row", "9")
    assert done.returncode == 2 and "rows 0 to 3" in done.stderr
    path = experiment(GOOD)
    done = llavolta("check", "look.yaml")
    assert done.returncode == 0 and done.stdout.endswith("as the file allows\n"), done.stdout


def test_a_search_without_trials_has_its_data_checked(tmp_path):
    path = write_experiment(tmp_path, [*GOOD, record(3, "<image>\nGone", "Yes", image="gone.png")])
    search = {
        "objectives": {"eval/vqa/accuracy": "max", "cost/train_tflops": "min"}, "num_trials": 2,
        "space": {"phases.finetune.learning_rate": {"kind": "log_uniform", "low": 1e-4, "high": 1e-3}},
    }  # fmt: skip
    path.write_text(json.dumps({**json.loads(path.read_text()), "search": search}))
    with pytest.raises(DataError, match=r"gone\.png"):
        llv.load(path).check_data()
