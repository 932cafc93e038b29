"""`data check` and `data show`: every row's errors and lengths, and one row as the model gets it."""

from __future__ import annotations

import functools
import re

import pytest
from inspected_rows import GOOD, cells, record, write_experiment

from orchestrator.data.check import check_document, check_uses, row_document, uses_of_cells
from orchestrator.data.processing.encode import IGNORED_LABEL, Encoder
from orchestrator.data.records.row_index import open_rows
from orchestrator.data.rows import data_spec
from orchestrator.errors import DataError, UsageError
from orchestrator.plan.experiment_plan import prepare
from orchestrator.report.console import print_check, print_row
from orchestrator.report.documents import Document
from orchestrator.report.pages import row_page, row_title

VISUAL = 64  # tokens of an image of the tiny LLaVA


@pytest.fixture
def experiment(tmp_path):
    return functools.partial(write_experiment, tmp_path)


def test_all_rows_are_measured_as_the_model_gets_them(experiment, processor):
    found = check_document(cells(experiment(GOOD)))
    assert found["valid"]
    mine, test = found["sets"]
    assert (mine["name"], mine["where"], mine["rows"], mine["errors"]) == ("mine", "phases.finetune", 3, [])
    assert (test["name"], test["where"], test["rows"]) == ("test", "evaluate.vqa", 5)
    spec = prepare(experiment(GOOD)).cells[0].spec.data["mine"]
    samples = [Encoder(processor, "vicuna_v1", 256).encode(row) for row in open_rows(spec)]
    lengths = [len(sample) for sample in samples]
    assert mine["lengths"]["tokens"]["max"] == max(lengths) and mine["lengths"]["tokens"]["min"] == min(lengths)
    assert mine["lengths"]["tokens"]["longest_row"] == lengths.index(max(lengths))
    assert mine["lengths"]["visual_tokens"] == {
        "min": 0, "median": VISUAL, "mean": round(2 * VISUAL / 3, 3), "p95": VISUAL, "max": VISUAL, "longest_row": 0
    }  # fmt: skip
    labels = [int((sample.labels != IGNORED_LABEL).sum()) for sample in samples]
    assert mine["lengths"]["label_tokens"]["max"] == max(labels)
    assert "label_tokens" not in test["lengths"]
    assert "data.mine (llava_json), phases.finetune: 3 rows" in Document(found, print_check).to_text()


def test_every_error_is_told_by_its_row_and_good_rows_are_measured_all_the_same(experiment):
    bad = [
        record(3, "<image>\nGone", "Yes", image="gone.png"),
        record(4, "<image>\nNo picture", "No"),
        {"id": "5", "conversations": "none"},
        record(6, "<image> <image> <image> <image>", "four", image=["0.png", "1.png", "2.png", "0.png"]),
    ]
    found = check_document(cells(experiment(GOOD + bad)))
    mine, test = found["sets"]
    assert not found["valid"] and not test["errors"]
    assert [entry["row"] for entry in mine["errors"]] == [3, 4, 5, 6]
    assert mine["rows"] == 7 and mine["lengths"]["tokens"]["longest_row"] == 2
    text = Document(found, print_check).to_text()
    assert (
        "error: row 3: " in text and "gone.png" in text and "4 errors" in text and "model_max_length is 256" not in text
    )


def test_rows_that_the_file_allows_to_drop_are_no_errors(experiment):
    gone = record(3, "<image>\nGone", "Yes", image="gone.png")
    found = check_document(cells(experiment([*GOOD, gone], on_bad_row="drop", max_bad_share=0.5)))
    assert found["valid"] and not found["sets"][0]["errors"]
    assert [entry["row"] for entry in found["sets"][0]["dropped"]] == [3]
    found = check_document(cells(experiment([*GOOD, gone], on_bad_row="drop", max_bad_share=0.1)))
    assert not found["valid"] and [entry["row"] for entry in found["sets"][0]["errors"]] == [3]


def test_a_file_that_is_not_there_and_images_that_are_never_seen_are_errors(experiment):
    path = experiment([record(0, "No picture", "at all")])
    (error,) = check_document(cells(path))["sets"][0]["errors"]
    assert error["row"] is None and "projector would be trained" in error["error"]
    path = experiment(GOOD)
    (path.parent / "data.json").unlink()
    found = check_document(cells(path))
    assert not found["valid"] and "no such file" in found["sets"][0]["errors"][0]["error"]


def test_a_row_is_shown_as_training_encodes_it(experiment, processor):
    path = experiment(GOOD)
    found = row_document(cells(path), "mine", 2)
    sample = Encoder(processor, "vicuna_v1", 256).encode(open_rows(cells(path)[0].spec.data["mine"])[2])
    ids = [token["id"] for token in found["tokens"] for _ in range(token["count"])]
    learned = [token["learned"] for token in found["tokens"] for _ in range(token["count"])]
    assert ids == sample.input_ids.tolist() and learned == (sample.labels != IGNORED_LABEL).tolist()
    assert [found["prompt"][first:last] for first, last in found["learned"]] == [" So</s>", " Because</s>"]
    lengths = found["lengths"]
    assert lengths["tokens"] == lengths["kept_tokens"] == len(sample) and lengths["visual_tokens"] == VISUAL
    assert lengths["tokens_before_expansion"] == len(sample) - VISUAL + 1
    (image,) = found["images"]
    assert image["path"] == str(path.parent / "2.png") and (image["width"], image["height"]) == (50, 40)
    assert image["visual_tokens"] == VISUAL and image["seen"]
    text = Document(found, print_row).to_text()
    assert "ASSISTANT:« So</s>»" in text and f"<image> x{VISUAL}" in text and "row 2 (3 rows can be used)" in text


def test_what_the_limit_cuts_off_is_told(experiment):
    rows = [record(0, "Hello", "Hi", "And <image>?", "No", image="0.png")]
    path = experiment(rows, max_length=70, conversation_template="chat_template")
    found = row_document(cells(path))
    assert not found["images"][0]["seen"] and found["lengths"]["visual_tokens"] == 0
    assert found["lengths"]["kept_tokens"] < 70 < found["lengths"]["tokens"]
    assert (
        "cut off by model_max_length" in Document(found, print_row).to_text()
        and "are cut off" in Document(found, print_row).to_text()
    )


def test_a_row_of_a_test_is_the_prompt_beside_the_right_answer(experiment):
    found = row_document(cells(experiment(GOOD)), "test")
    row = open_rows(data_spec({"kind": "easy_vqa", "split": "test", "max_samples": 5}))[0]
    assert found["where"] == "evaluate.vqa" and found["expected"] == row.turns[-1].text
    assert found["prompt"].endswith("ASSISTANT:") and not any(token["learned"] for token in found["tokens"])
    assert row_document(cells(experiment(GOOD)), "spare")["where"] == ""


def test_the_page_has_the_picture_and_marks_what_is_learned(experiment):
    html = row_page(row_document(cells(experiment(GOOD)), "mine", 0))
    assert html.count("data:image/jpeg;base64,") == 1 and "<mark> A &lt;red&gt; square&lt;/s&gt;</mark>" in html
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_rows_and_sets_that_are_not_there_are_told(experiment):
    path = experiment([*GOOD, record(3, "<image>\nGone", "Yes", image="gone.png")])
    with pytest.raises(UsageError, match=r"^data mime: .*did you mean mine\?"):
        row_document(cells(path), "mime")
    with pytest.raises(UsageError, match=r"^row 9: data\.mine has rows 0 to 3, 4 in all, .* nearest is 3"):
        row_document(cells(path), "mine", 9)
    with pytest.raises(DataError, match=r"row 3 cannot be used: .*gone\.png"):
        row_document(cells(path), "mine", 3)
    assert row_document(cells(path), "mine", 0)["row"] == 0  # the good ones can be looked at


def test_the_numbers_of_a_row_are_those_of_the_file(experiment):
    gone = [record(number, "<image>\nGone", "Yes", image="gone.png") for number in (3, 4)]
    title = row_title(row_document(cells(experiment([*GOOD[:2], *gone, record(4, "Why?", "So")])), "mine", 4))
    assert "row 4 (3 rows can be used)" in title
    with pytest.raises(DataError, match=r"100\.00% of the rows are bad, max_bad_share allows 10\.00%"):
        row_document(cells(experiment(gone, on_bad_row="drop", max_bad_share=0.1)), "mine")


def test_a_row_that_is_not_sampled_is_told(experiment):
    path = experiment([*GOOD, *GOOD], max_samples=2)
    assert "row 3 (2 rows can be used)" in row_title(row_document(cells(path), "mine", 3))
    assert "row 2, left out by max_samples (2 rows can be used)" in row_title(row_document(cells(path), "mine", 2))
    with pytest.raises(UsageError, match=r"^row 1: data\.test has rows 0 to \d+, .* the nearest is 0"):
        row_document(cells(path), "test", 1)
    gone = record(6, "<image>\nGone", "Yes", image="gone.png")
    path = experiment([*GOOD, *GOOD, gone], max_samples=2, on_bad_row="drop", max_bad_share=0.5)
    assert check_document(cells(path))["sets"][0]["rows"] == 2


def test_a_question_without_an_answer_is_counted(experiment):
    path = experiment([*GOOD, record(3, "Who?", "Ada", "Why?")])
    mine = check_document(cells(path))["sets"][0]
    said = "1 of 4 rows end with a question without an answer, which the model reads without learning it (row 3)"
    assert mine["notes"] == [said] and not mine["errors"]
    assert f"phases.finetune.data.mine: {said}" in check_uses(uses_of_cells(cells(path))).remarks
    assert not check_document(cells(experiment(GOOD)))["sets"][0]["notes"]
