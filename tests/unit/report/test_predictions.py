"""`predictions`: every answer of an evaluation as the ledger keeps it, and the page of pictures."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from evaluated_experiment import ROWS, document, write_evaluated

from orchestrator.data.records.row_index import open_rows
from orchestrator.data.rows import data_spec
from orchestrator.errors import StorageError, UsageError
from orchestrator.plan.experiment_plan import prepare
from orchestrator.report.pages import predictions_page


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    return write_evaluated(tmp_path_factory.mktemp("evaluated"))


def test_every_row_has_its_answer_beside_the_question_the_picture_and_the_right_answer(evaluated):
    found = document(evaluated, "vqa")
    rows = open_rows(data_spec({"kind": "easy_vqa", "split": "test", "max_samples": ROWS}))
    assert [each["row"] for each in found["predictions"]] == [row.index for row in rows]
    assert [each["expected"] for each in found["predictions"]] == [row.turns[-1].text for row in rows]
    assert [each["images"] for each in found["predictions"]] == [[row.images[0].path] for row in rows]
    right = [each["right"] for each in found["predictions"]]
    assert found["metrics"]["accuracy"] == sum(right) / ROWS and found["num_samples"] == ROWS
    assert found["under"] == "final" and document(evaluated, "vqa", "heavy")["under"] == "heavy"
    wrong = document(evaluated, "vqa", wrong=True)["predictions"]
    assert wrong == [each for each in found["predictions"] if not each["right"]] and wrong


def test_the_result_beside_them_is_as_it_was(evaluated):
    plan = prepare(evaluated / "tests.yaml")
    job = next(job for job in plan.cells[0].evaluations if job.name == "vqa" and job.under == "final")
    result = json.loads((plan.ledger.storage / "evaluations" / f"{job.id}.json").read_text())
    kept = {"id", "name", "under", "metrics", "num_samples", "seconds", "examples"}
    assert set(result) == kept | {"fingerprint", "notices", "predictions_sha256", "seal"}
    first = document(evaluated, "vqa")["predictions"][:20]
    assert result["examples"] == [{key: each[key] for key in each if key != "images"} for each in first]


def test_the_page_holds_pictures_and_marks_what_is_wrong(evaluated):
    found = document(evaluated, "colours")
    html = predictions_page(found)
    assert html.count("data:image/jpeg;base64,") == 2 and html.count('class="card') == 3
    assert html.count('class="card wrong"') == sum(not each["right"] for each in found["predictions"])
    assert "What &lt;color&gt;?" in html and "red &amp; blue" in html and "all 3 predictions" in html
    assert not re.search(r'(src|href)="(?!data:)', html)  # no other file
    limited = predictions_page(document(evaluated, "vqa"), limit=5)
    assert limited.count('class="card') == 5 and f"the first 5 of {ROWS} predictions" in limited


def test_a_picture_that_is_gone_is_named_in_its_place(evaluated):
    found = document(evaluated, "colours")
    found["predictions"][0]["images"] = [str(evaluated / "gone.png")]
    html = predictions_page(found)
    assert html.count("data:image/jpeg;base64,") == 1 and "gone.png is missing" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"several evaluations.*vqa, colours, later"),
        (("vqaa",), r"^evaluation vqaa: .*did you mean vqa\?"),
        (("vqa", "light"), r"^under light: .*there are final, heavy"),
        (("later",), r"evaluate.later under final .* is not done yet in the storage /.*LLAVOLTA_STORAGE"),
    ],
)
def test_what_there_is_not_is_reported(evaluated, arguments, message):
    with pytest.raises(UsageError, match=message):
        document(evaluated, *arguments)


def test_results_without_answers_and_damaged_ones_are_reported(evaluated, tmp_path):
    plan = prepare(evaluated / "tests.yaml")
    job = next(job for job in plan.cells[0].evaluations if job.name == "colours")
    file = plan.ledger.storage / "predictions" / f"{job.id}.jsonl.gz"
    whole = file.read_bytes()
    assert len(gzip.decompress(whole).splitlines()) == 3
    try:
        file.write_bytes(whole[:-9])
        with pytest.raises(StorageError, match="is damaged"):
            document(evaluated, "colours")
        file.unlink()
        with pytest.raises(UsageError, match=rf"kept no answers.*take .*evaluations/{job.id}\.json away"):
            document(evaluated, "colours")
        plan.ledger.write_evaluation(job.id, plan.ledger.evaluation(job.id), [{"row": 0, "answer": "a"}])
        with pytest.raises(UsageError, match="do not say which answers are right"):
            document(evaluated, "colours", wrong=True)
        assert predictions_page(document(evaluated, "colours")).count("card wrong") == 0
    finally:
        file.write_bytes(whole)
