"""llava_json on real files: what it reads, and that every fault is found before training, with its row."""

from pathlib import Path

import pytest
from conversations import say
from orchestrator_plugins.data.llava_json import LlavaJson, LlavaJsonSpec
from PIL import Image

from orchestrator.errors import DataError
from orchestrator.plan.cells.identity_fields import data_identity

GOOD = [
    {"id": "a", "image": "0.png", "conversations": say("<image>\nWhat is it?", "A square.")},
    {
        "id": "b",
        "image": ["1.png", "2.png"],
        "conversations": say("First <image> then <image>?", "Two.", "And?", "No."),
    },
    {"id": "c", "conversations": say("Hello", "Hi")},
    {"id": "d", "image": ["3.png"], "conversations": say("No picture yet", "Right", "Look: <image>", "I see")},
    {"id": "e", "image": None, "conversations": say("Only text", "Yes")},
]


def spec_of(path, pictures, **fields):
    return LlavaJsonSpec(data_path=path, image_folder=str(pictures), **fields)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_good_rows(name, conversation_file, pictures):
    spec = spec_of(conversation_file(GOOD, name), pictures)
    assert LlavaJson(spec).check() == []
    rows = LlavaJson(spec).rows()
    assert spec.num_rows() == len(rows) == 5
    assert [[Path(image.path).name for image in row.images] for row in rows] == [
        ["0.png"],
        ["1.png", "2.png"],
        [],
        ["3.png"],
        [],
    ]
    assert [turn.role for turn in rows[1].turns] == ["user", "assistant"] * 2
    assert rows[3].turns[2].text == "Look: <image>"


FAULTS = {
    "missing image": ({"image": "no.png", "conversations": say("<image> ?", "a")}, "no.png is missing"),
    "image is text": ({"image": "text.png", "conversations": say("<image> ?", "a")}, "not an image"),
    "empty image": ({"image": "empty.png", "conversations": say("<image> ?", "a")}, "is empty"),
    "cut image": ({"image": "cut.png", "conversations": say("<image> ?", "a")}, "cut.png is"),
    "folder": ({"image": ".", "conversations": say("<image> ?", "a")}, "is a folder"),
    "bomb": ({"image": "bomb.png", "conversations": say("<image> ?", "a")}, "bomb"),
    "nul in name": ({"image": "a\0.png", "conversations": say("<image> ?", "a")}, "path holds a NUL"),
    "placeholder in answer": ({"image": "0.png", "conversations": say("?", "<image>")}, "an answer holds <image>"),
    "empty conversation": ({"image": "0.png", "conversations": []}, "empty"),
    "no conversation": (
        {"image": "0.png"},
        "it has image; `conversations` is missing (LLaVA's format: conversations, image)",
    ),
    "no answer": ({"conversations": say("Hello")}, "no answer"),
    "gpt first": (
        {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
        "expected human",
    ),
    "human twice": ({"conversations": [{"from": "human", "value": "a"}] * 2}, "expected gpt"),
    "unknown role": ({"conversations": [{"from": "robot", "value": "a"}, {"from": "gpt", "value": "b"}]}, "'robot'"),
    "role is a list": ({"conversations": [{"from": ["human"], "value": "a"}]}, "from human, gpt or system"),
    "turn is text": ({"conversations": ["hello"]}, "turn 0 is a mapping"),
    "row is a list": ([1, 2], "a record is a mapping"),
    "image in a list is null": ({"image": ["0.png", None], "conversations": say("<image><image>", "a")}, "None"),
    "sound": ({"audio": "a.wav", "conversations": say("What?", "a")}, "`audio` is not read: sounds are not read"),
}


@pytest.fixture
def broken_pictures(pictures, monkeypatch):
    (pictures / "text.png").write_text("not a picture")
    (pictures / "empty.png").touch()
    whole = (pictures / "5.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (2000, 1000)).save(pictures / "bomb.png")
    monkeypatch.setattr("orchestrator.data.records.image_files.MAX_PIXELS", 1_500_000)
    return pictures


@pytest.mark.parametrize("case", FAULTS)
def test_every_fault_is_told_by_row(case, conversation_file, broken_pictures):
    record, words = FAULTS[case]
    spec = spec_of(conversation_file([*GOOD, record, *GOOD]), broken_pictures)
    faults = LlavaJson(spec).check()
    assert len(faults) == 1
    assert faults[0].startswith("row 5: ") and words in faults[0]


def test_all_faults_are_told_at_once_and_named_by_their_own_row(conversation_file, broken_pictures):
    records = [record for record, _ in FAULTS.values()]
    spec = spec_of(conversation_file(records), broken_pictures)
    faults = LlavaJson(spec).check()
    assert [fault.split(":")[0] for fault in faults] == [f"row {i}" for i in range(len(records))]
    # Without opening images, those of the rows themselves are still told.
    assert len(LlavaJson(spec).check(every_row=False)) == len(records) - 6
    with pytest.raises(DataError) as told:
        LlavaJson(spec).rows()
    text = str(told.value)
    assert spec.data_path in text and "13 errors" in text and "row 18:" in text


def test_more_than_twenty_faults_are_counted(conversation_file, pictures):
    different = [{**GOOD[2], letter * 3: 1} for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX"]
    spec = spec_of(conversation_file([*different, *GOOD * 50]), pictures)
    with pytest.raises(DataError) as told:
        LlavaJson(spec).rows()
    text = str(told.value)
    assert "50 errors" in text and "row 19:" in text and "row 20:" not in text and "and 30 more" in text


def test_drop_leaves_bad_rows_out_up_to_the_allowed_share(conversation_file, broken_pictures):
    records = [*GOOD * 18, FAULTS["missing image"][0], FAULTS["no answer"][0], *GOOD]
    path = conversation_file(records)  # 2 of 97
    allowed = spec_of(path, broken_pictures, on_bad_row="drop", max_bad_share=0.03)
    rows = LlavaJson(allowed).rows()
    assert allowed.num_rows() == len(rows) == 95 and {90, 91}.isdisjoint(row.index for row in rows)
    assert LlavaJson(allowed).check() == []
    strict = spec_of(path, broken_pictures, on_bad_row="drop", max_bad_share=0.02)
    faults = LlavaJson(strict).check()
    assert "2.06% of the rows are bad, max_bad_share allows 2.00%" in faults[0] and len(faults) == 3
    with pytest.raises(DataError, match="max_bad_share"):
        LlavaJson(strict).rows()


def test_rows_that_are_all_bad_are_a_fault_whatever_is_allowed(conversation_file, pictures):
    spec = spec_of(conversation_file([{"conversations": []}]), pictures, on_bad_row="drop", max_bad_share=1)
    with pytest.raises(DataError):
        LlavaJson(spec).rows()


def test_a_mended_image_is_no_fault_any_more(conversation_file, pictures):
    spec = spec_of(conversation_file([{"image": "9.png", "conversations": say("<image>", "a")}]), pictures)
    assert len(LlavaJson(spec).check()) == 1
    before = spec.content_digest()
    Image.new("RGB", (8, 8)).save(pictures / "9.png")
    assert LlavaJson(spec).check() == []
    assert spec.content_digest() != before


def test_a_file_that_cannot_be_read_is_told_by_check_and_rows(tmp_path, pictures):
    (tmp_path / "a.json").write_text("[]")
    for name, words in {"a.json": "has no rows", "none.json": "cannot be read"}.items():
        spec = spec_of(str(tmp_path / name), pictures)
        assert words in LlavaJson(spec).check()[0]
        with pytest.raises(DataError, match=words):
            LlavaJson(spec).rows()


def test_num_samples_plans_without_the_file_and_is_checked_with_it(tmp_path, conversation_file, pictures):
    absent = spec_of(str(tmp_path / "none.json"), pictures)
    assert absent.num_rows() is None
    assert absent.model_copy(update={"num_samples": 665_298}).num_rows() == 665_298
    assert absent.model_copy(update={"num_samples": 665_298, "max_samples": 100}).num_rows() == 100
    wrong = spec_of(conversation_file(GOOD), pictures, num_samples=4)
    assert "num_samples is 4, the file has 5 rows" in LlavaJson(wrong).check()[0]


def test_max_samples_and_identity(conversation_file, pictures):
    spec = spec_of(conversation_file(GOOD), pictures, max_samples=2)
    assert [row.index for row in LlavaJson(spec).rows()] == [0, 2] and spec.num_rows() == 2
    other = spec_of(conversation_file(GOOD, "copy.json"), pictures)
    assert spec.content_digest() == other.content_digest()
    changed = spec_of(conversation_file(GOOD[:4], "less.json"), pictures)
    assert spec.content_digest() != changed.content_digest()


def test_plain_takes_one_image_question_and_one_caption(conversation_file, pictures):
    spec = spec_of(conversation_file(GOOD), pictures, conversation_template="plain")
    (fault,) = LlavaJson(spec).check()
    assert fault.startswith("4 of 5 rows, the first is row 1: plain takes one question")


ASKED = {"image": "0.png", "conversations": say("<image>\nHow many?", "2")}


def test_columns_are_for_evaluations_and_change_no_training(conversation_file, pictures):
    path = conversation_file([{**ASKED, "answers": ["2", "two"], "category": "count"}] * 2, "data.json")
    plain = spec_of(path, pictures, ignore_keys=("answers",))
    with_columns = spec_of(path, pictures, columns=("answers", "category"))
    row, other = LlavaJson(with_columns).rows()[1], LlavaJson(plain).rows()[1]
    assert row.columns == {"answers": ["2", "two"], "category": "count"} and row.answer_type == "count"
    assert other.columns == {} and other.answer_type is None and (row.turns, row.images) == (other.turns, other.images)
    assert plain.content_digest() == with_columns.content_digest()
    options = [{}, {"columns": ("category",)}, {"columns": ("answers",)}]
    identities = [data_identity(spec_of(path, pictures, **{"ignore_keys": ("answers",), **one}))[0] for one in options]
    assert identities[0] == identities[1] == identities[2], "training reads no column, so no state is another"
    assert "columns" not in plain.model_dump() and with_columns.model_dump()["columns"] == ("answers", "category")


@pytest.mark.parametrize(
    ("record", "columns", "told"),
    [
        ({**ASKED, "answers": ["2"]}, (), "`answers` is not read: an evaluation reads them where columns names them"),
        (ASKED, ("answers",), "`answers` is missing, which columns names; the record has image, conversations"),
        ({**ASKED, "answers": None}, ("answers",), "`answers` is missing"),
        ({**ASKED, "answers": ["\ud800"]}, ("answers",), "`answers` holds"),
    ],
)
def test_rows_without_a_column_are_bad(record, columns, told, conversation_file, pictures):
    spec = spec_of(conversation_file([record, record], "data.json"), pictures, columns=columns)
    assert told in "\n".join(LlavaJson(spec).check())


def test_a_column_is_no_part_of_the_conversation(pictures):
    with pytest.raises(ValueError, match="image is read as the conversation; a column is another key"):
        spec_of("data.json", pictures, columns=("image",))
