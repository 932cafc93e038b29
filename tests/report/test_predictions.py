"""`predictions`: every answer of an evaluation as the ledger keeps it, and the page of pictures."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from orchestrator.data.records.row_index import open_rows
from orchestrator.data.rows import data_spec
from orchestrator.errors import StorageError, UsageError
from orchestrator.evaluation.evaluate import evaluate_state
from orchestrator.models.initial_weights import write_initial_weights
from orchestrator.plan.experiment_plan import prepare
from orchestrator.report.pages.predictions import predictions_document, predictions_page

TINY_LLAVA = Path(__file__).parents[2] / "experiments" / "models" / "tiny-llava"
ROWS = 30


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """An experiment without phases, whose evaluations `vqa` (final, heavy) and `colours` are done; `later` is not."""
    folder = tmp_path_factory.mktemp("evaluated")
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (50, 40), colour).save(folder / f"{number}.png")
    said = [{"from": "human", "value": "<image>\nWhat <color>?"}, {"from": "gpt", "value": "red & blue"}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": said} for n in range(2)]
    records.append({"id": "2", "conversations": [{**said[0], "value": "No picture?"}, said[1]]})
    (folder / "colours.json").write_text(json.dumps(records))
    test = {"kind": "exact_match", "max_new_tokens": 3}
    spec = {
        "schema_version": 1, "name": "tests", "phases": {}, "cluster": {"storage_path": "runs"},
        "model": {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "float32"},
        "data": {
            "test": {"kind": "easy_vqa", "split": "test", "max_samples": ROWS},
            "colours": {"kind": "llava_json", "data_path": "colours.json", "image_folder": "."},
        },
        "compressors": {"heavy": {"kind": "average_pool", "layer": 1, "stride": 8}},
        "evaluate": {
            "vqa": {**test, "data": "test", "under": ["final", "heavy"]},
            "colours": {**test, "data": "colours"},
            "later": {**test, "data": "test", "max_new_tokens": 2},
        },
    }  # fmt: skip
    (folder / "tests.yaml").write_text(json.dumps(spec))
    walk = prepare(folder / "tests.yaml")
    cell, ledger = walk.cells[0], walk.ledger
    write_initial_weights(cell.root, ledger.writing_folder(cell.root.id))
    ledger.commit(cell.root.id)
    for job in cell.evaluations:
        if job.name != "later":
            evaluate_state(job, ledger)
    return folder


def document(folder: Path, *arguments, **options):
    walk = prepare(folder / "tests.yaml")
    return predictions_document(walk, walk.cells[0], *arguments, **options)


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
    walk = prepare(evaluated / "tests.yaml")
    job = next(job for job in walk.cells[0].evaluations if job.name == "vqa" and job.under == "final")
    result = json.loads((walk.ledger.storage / "evaluations" / f"{job.id}.json").read_text())
    assert set(result) == {"id", "name", "under", "metrics", "num_samples", "seconds", "examples"}
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


def test_a_picture_that_is_gone_is_told_in_its_place(evaluated):
    found = document(evaluated, "colours")
    found["predictions"][0]["images"] = [str(evaluated / "gone.png")]
    html = predictions_page(found)
    assert html.count("data:image/jpeg;base64,") == 1 and "gone.png is missing" in html


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), r"several evaluations.*vqa, colours, later"),
        (("vqaa",), r"--evaluation vqaa: .*did you mean vqa\?"),
        (("vqa", "light"), r"--under light: .*there are final, heavy"),
        (("later",), r"evaluate.later under final .* is not done yet"),
    ],
)
def test_what_there_is_not_is_told(evaluated, arguments, told):
    with pytest.raises(UsageError, match=told):
        document(evaluated, *arguments)


def test_results_without_answers_and_damaged_ones_are_told(evaluated, tmp_path):
    walk = prepare(evaluated / "tests.yaml")
    job = next(job for job in walk.cells[0].evaluations if job.name == "colours")
    file = walk.ledger.storage / "predictions" / f"{job.id}.jsonl.gz"
    whole = file.read_bytes()
    assert len(gzip.decompress(whole).splitlines()) == 3
    try:
        file.write_bytes(whole[:-9])
        with pytest.raises(StorageError, match="is damaged"):
            document(evaluated, "colours")
        file.unlink()
        with pytest.raises(UsageError, match=rf"kept no answers.*take .*evaluations/{job.id}\.json away"):
            document(evaluated, "colours")
        walk.ledger.write_evaluation(job.id, walk.ledger.evaluation(job.id), [{"row": 0, "answer": "a"}])
        with pytest.raises(UsageError, match="do not say which answers are right"):
            document(evaluated, "colours", wrong=True)
        assert predictions_page(document(evaluated, "colours")).count("card wrong") == 0
    finally:
        file.write_bytes(whole)


def test_the_verb_prints_lines_json_and_writes_a_page(evaluated):
    def llavolta(*arguments: str) -> str:
        command = [sys.executable, "-m", "orchestrator", "predictions", "tests.yaml", "--cell", "tests", *arguments]
        done = subprocess.run(command, cwd=evaluated, capture_output=True, text=True, timeout=120, check=False)
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
