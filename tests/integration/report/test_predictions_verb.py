"""The verb predictions prints lines, JSON and a page."""

from __future__ import annotations

import json

from evaluated_experiment import ROWS, document, write_evaluated
from program import run_forked

from orchestrator.plan.experiment_plan import prepare


def test_the_verb_prints_lines_json_and_writes_a_page(tmp_path):
    evaluated = write_evaluated(tmp_path)

    def llavolta(*arguments: str) -> str:
        done = run_forked(["predictions", "tests.yaml", "--cell", "tests", *arguments], evaluated)
        assert done.returncode == 0, done.stderr
        return done.stdout

    walk = prepare(evaluated / "tests.yaml")
    assert walk.cells[0].name == "tests"
    found = document(evaluated, "vqa")["predictions"]
    assert [json.loads(line) for line in llavolta("--evaluation", "vqa").splitlines()] == found
    as_json = json.loads(llavolta("--evaluation", "vqa", "--json", "--limit", "2"))
    assert as_json["predictions"] == found[:2] and as_json["num_samples"] == ROWS
    assert llavolta("--evaluation", "vqa", "--format", "html", "--wrong", "-o", "page.html") == ""
    assert "wrong predictions" in (evaluated / "page.html").read_text()
