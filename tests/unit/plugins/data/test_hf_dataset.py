"""hf_dataset on real Parquet files: its rows are what pyarrow reads from them, in order; faults are told by row."""

import io
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversations import say
from PIL import Image
from pydantic import ValidationError

from orchestrator import plugin
from orchestrator.data.records.row_index import open_rows
from orchestrator.data.train_data import build_train_data
from orchestrator.plan.cells.identity_fields import data_identity

pytest.importorskip("datasets")

from orchestrator_plugins.data.hf_dataset import HfDataset, HfDatasetSpec

COLUMNS = {"conversations": None, "image": "picture", "question": "q", "answer": "a", "id": "key"}


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(data, "PNG")
    return data.getvalue()


def record(number: int) -> dict:
    return {
        "picture": {"bytes": png(number % 7), "path": f"{number}.png"},
        "q": f"What is {number}?",
        "a": f"answer {number}",
        "key": f"k{number}",
        "unread": number,
    }


def write(folder: Path, records: list[dict], parts: int = 2) -> Path:
    """Write records as a hub's data set is laid out."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    each = -(-len(records) // parts)
    for part in range(parts):
        table = pa.Table.from_pylist(records[part * each : (part + 1) * each])
        file = folder / "data" / f"train-{part:05}-of-{parts:05}.parquet"
        pq.write_table(table, file, row_group_size=2)
        os.utime(file, (10**9, 10**9))
    return folder


def spec_of(folder, **fields) -> HfDatasetSpec:
    return HfDatasetSpec.model_validate({"data_path": str(folder), "columns": COLUMNS, **fields})


def shown(rows) -> list[tuple]:
    return [
        (row.index, [turn.text for turn in row.turns], [Path(image.path).read_bytes() for image in row.images])
        for row in rows
    ]


def expected(numbers, start: int = 0) -> list[tuple]:
    return [
        (place, [f"<image>\nWhat is {number}?", f"answer {number}"], [png(number % 7)])
        for place, number in enumerate(numbers, start)
    ]


def test_rows_are_those_of_the_files_in_order(tmp_path):
    folder = write(tmp_path / "set", [record(number) for number in range(10)])
    spec = spec_of(folder)
    assert HfDataset(spec).check() == [] and spec.num_rows() == 10 and spec.remarks() == []
    assert shown(HfDataset(spec).rows()) == expected(range(10))
    assert len({image.path for row in HfDataset(spec).rows() for image in row.images}) == 7  # equal ones are one file
    streamed = spec_of(folder, streaming=True)
    assert shown(HfDataset(streamed).rows()) == expected(range(10))
    assert streamed.content_digest() == spec.content_digest()
    parts = {"train[:70%]": range(7), "train[7:]": range(7, 10), "train[8:]+train[:2]": [8, 9, 0, 1]}
    for split, numbers in parts.items():
        part = spec_of(folder, split=split)
        assert shown(HfDataset(part).rows()) == expected(numbers)
        assert data_identity(part)[0] != data_identity(spec)[0] == data_identity(streamed)[0]
    cut = spec_of(folder, max_samples=5)
    assert [row.index for row in HfDataset(cut).rows()] == [0, 2, 4, 6, 8] and cut.num_rows() == 5


def test_conversations_lists_of_images_and_rows_without(tmp_path):
    records = [
        {"image": [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}],
         "conversations": say("<image> and <image>?", "Two.", "And?", "No.")},
        {"image": [], "conversations": say("Hello", "Hi")},
    ]  # fmt: skip
    columns = {"image": "image", "conversations": "conversations"}
    rows = HfDataset(spec_of(write(tmp_path / "set", records, parts=1), columns=columns)).rows()
    assert [len(row.images) for row in rows] == [2, 0]
    assert [turn.role for turn in rows[0].turns] == ["user", "assistant"] * 2


def test_of_several_answers_the_most_frequent(tmp_path):
    answers = [["b", "a", "a"], ["b", "a"], []]
    folder = write(tmp_path / "set", [{**record(n), "a": each} for n, each in enumerate(answers)], parts=1)
    spec = spec_of(folder, on_bad_row="drop", max_bad_share=0.5)
    assert [row.turns[1].text for row in HfDataset(spec).rows()] == ["a", "b"]
    assert spec.remarks() == ["1 of 3 rows dropped; row 2: `a` is empty: the row has no answer (key 'k2')"]


def test_an_integer_is_its_digits_and_a_class_label_its_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**record(n), "a": n, "sort": n % 2, "picks": [1, 0, 1]} for n in range(3)]
    folder = write(tmp_path / "numbers", rows, parts=1)
    assert [row.turns[1].text for row in HfDataset(spec_of(folder)).rows()] == ["0", "1", "2"]

    classes = datasets.ClassLabel(names=["cat", "dog"])
    labelled = datasets.Dataset.from_list([*rows, {**rows[0], "picks": [-1]}])  # as a hidden test set has it
    labelled = labelled.cast_column("sort", classes).cast_column("picks", datasets.List(classes))
    (tmp_path / "labels").mkdir()
    labelled.to_parquet(tmp_path / "labels" / "train-00000-of-00001.parquet")
    columns = {**COLUMNS, "answer": "picks", "category": "sort"}
    named = HfDataset(spec_of(tmp_path / "labels", columns=columns, on_bad_row="drop", max_bad_share=0.5))
    assert [(row.turns[1].text, row.answer_type) for row in named.rows()] == [
        ("dog", kind) for kind in ("cat", "dog", "cat")
    ]
    assert "`picks` is [None], neither a text, an integer nor a list of them" in named._spec.remarks()[0]


@pytest.mark.parametrize(
    ("answer", "more", "told"),
    [
        (1, {"choices": ["x", "y"]}, "a number, and the row has options"),
        (True, {}, "`a` is True, neither a text, an integer nor a list of them"),
        (0.5, {}, "`a` is 0.5, neither"),
        (None, {}, "`a` is None, neither"),
    ],
)
def test_an_answer_that_may_be_read_in_two_ways_is_refused(tmp_path, answer, more, told):
    folder = write(tmp_path / "set", [{**record(0), "a": answer, **more}], parts=1)
    columns = {**COLUMNS, **({"options": "choices"} if more else {})}
    (error,) = HfDataset(spec_of(folder, columns=columns)).check()
    assert told in error


def test_bad_rows_are_told_and_dropped_up_to_the_allowed_share(tmp_path):
    records = [record(number) for number in range(8)]
    records[1]["picture"] = {"bytes": png(1)[:40], "path": None}
    records[4]["a"] = " "
    records[6]["q"] = None
    folder = write(tmp_path / "set", records)
    errors = HfDataset(spec_of(folder)).check()
    assert [error.split(":")[0] for error in errors] == ["row 1", "row 4", "row 6"]
    assert "is damaged" in errors[0] and "answer of turn 1 is empty (key 'k4')" in errors[1]
    assert "`q` is None, not a text (key 'k6')" in errors[2]
    with pytest.raises(plugin.DataError, match="2 errors"):
        HfDataset(spec_of(folder)).rows()
    dropping = spec_of(folder, on_bad_row="drop", max_bad_share=0.4)
    assert [row.index for row in HfDataset(dropping).rows()] == [0, 2, 3, 5, 7] and dropping.num_rows() == 5
    strict = spec_of(folder, on_bad_row="drop", max_bad_share=0.3)
    assert "37.50% of the rows are bad, max_bad_share allows 30.00%" in HfDataset(strict).check()[0]


def test_what_it_is_is_its_content_not_its_place(tmp_path):
    records = [record(number) for number in range(6)]
    folder = write(tmp_path / "set", records)
    before = spec_of(folder).content_digest()
    shutil.copytree(folder, tmp_path / "moved")
    assert spec_of(tmp_path / "moved").content_digest() == before
    # Another answer of the same length: the file's size and time of change are what they were.
    records[5]["a"] = "answer X"
    write(folder, records)
    changed = spec_of(folder)
    assert changed.content_digest() != before
    assert HfDataset(changed).rows()[5].turns[1].text == "answer X"
    with pytest.raises(plugin.DataError, match="has changed since it was planned"):
        open_rows(changed, before)


@pytest.mark.parametrize("damage", ["gone", "another picture"])
def test_a_cache_that_was_emptied_or_damaged_is_filled_again(tmp_path, damage):
    spec = spec_of(write(tmp_path / "set", [record(number) for number in range(6)]))
    content, wanted = spec.content_digest(), shown(HfDataset(spec).rows())
    victim = Path(HfDataset(spec).rows()[2].images[0].path)
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(png(5))
    assert spec.content_digest() == content and shown(open_rows(spec, content)) == wanted


def test_a_second_look_asks_the_library_nothing(tmp_path, monkeypatch):
    import datasets

    spec = spec_of(write(tmp_path / "set", [record(number) for number in range(6)]))
    first = spec.content_digest(), spec.num_rows()
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: pytest.fail("read again"))
    assert (spec.content_digest(), spec.num_rows()) == first and len(HfDataset(spec).rows()) == 6


def test_lengths_and_order_are_those_of_any_rows(tmp_path, processor):
    spec = spec_of(write(tmp_path / "set", [record(number) for number in range(6)]), conversation_template="vicuna_v1")
    entry = {"name": "mine", "share": 1.0, "spec": spec.model_dump(mode="json"), "content": spec.content_digest()}
    data = build_train_data([entry], processor, 2048)
    again = build_train_data([{**entry, "spec": {**entry["spec"], "streaming": True}}], processor, 2048)
    for step in range(3):
        assert data.batch_indices(0, step, 4) == again.batch_indices(0, step, 4)
    assert {name: value.shape for name, value in data.collate([0, 5]).items()}["input_ids"][0] == 2


def test_a_hub_set_is_read_from_the_cache_and_never_downloaded(tmp_path):
    spec = HfDatasetSpec(repo_id="some/set", columns=COLUMNS)
    (error,) = HfDataset(spec).check()
    assert "hf download --repo-type dataset some/set --revision main" in error and spec.num_rows() is None
    with pytest.raises(FileNotFoundError):
        spec.content_digest()
    place = tmp_path / "hub" / "datasets--some--set"
    write(place / "snapshots" / "c0ffee", [record(number) for number in range(4)])
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("c0ffee")
    assert shown(HfDataset(spec).rows()) == expected(range(4))
    local = spec_of(place / "snapshots" / "c0ffee")
    assert local.content_digest() == spec.content_digest()


def test_what_cannot_be_read_says_so(tmp_path):
    folder = write(tmp_path / "set", [record(number) for number in range(4)])
    (error,) = HfDataset(spec_of(folder, columns={**COLUMNS, "answer": "reply"})).check()
    assert "has no column reply; it has picture, q, a, key, unread" in error
    (error,) = HfDataset(spec_of(folder, split="validation")).check()
    assert "split validation, cannot be read by datasets" in error
    file = folder / "data" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    (error,) = HfDataset(spec_of(folder)).check()
    assert "cannot be read by datasets" in error
    (error,) = HfDataset(spec_of(tmp_path / "none")).check()
    assert "there is no such file" in error


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"repo_id": "a/b", "data_path": "c"}, "either `data_path` or `repo_id`"),
        ({}, "either `data_path` or `repo_id`"),
        ({"data_path": "c", "split": "train[:95%]", "streaming": True}, "a stream has no parts"),
        ({"data_path": "c", "split": "train[:95%"}, "a split is written"),
        ({"data_path": "c", "columns": {"question": "q"}}, "`question` and `answer`"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        HfDatasetSpec.model_validate(fields)


def test_the_contract_of_a_data_kind_holds(tmp_path):
    folder = write(tmp_path / "set", [record(number) for number in range(6)])
    report = plugin.check_data({"kind": "hf_dataset", "data_path": str(folder), "columns": COLUMNS})
    assert "counting and reading rows loads no torch" in report.held


def test_columns_for_evaluations_change_no_training(tmp_path):
    more = {"people": [{"answer": "one", "id": 1}, {"answer": "1", "id": 2}], "kind": "count", "choices": ["1", "2"]}
    folder = write(tmp_path / "set", [{**record(number), **more, "level": number} for number in range(4)])
    plain = spec_of(folder)
    having = spec_of(
        folder,
        columns={
            **COLUMNS, "answers": "people", "category": "kind", "options": "choices", "others": {"difficulty": "level"},
        },
    )  # fmt: skip
    assert having.column_names() == ("answers", "options", "category", "difficulty") and plain.column_names() == ()
    row, other = HfDataset(having).rows()[2], HfDataset(plain).rows()[2]
    assert row.columns == {
        "answers": more["people"], "options": ["1", "2"], "category": "count", "difficulty": 2
    }  # fmt: skip
    assert row.answer_type == "count" and plugin.text_column(row, "answers") == ["one", "1"]
    assert other.columns == {} and (row.turns, row.images) == (other.turns, other.images)
    assert data_identity(having) == data_identity(plain), "no state is trained again"
    assert plain.model_dump(mode="json")["columns"].keys() == {*COLUMNS, "system"}
    with pytest.raises(ValidationError, match="answers has a place of its own"):
        spec_of(folder, columns={**COLUMNS, "others": {"answers": "people"}})


def test_rows_without_a_column_for_evaluations_are_bad(tmp_path):
    folder = write(tmp_path / "set", [{**record(number), "kind": "count" if number else None} for number in range(3)])
    (error,) = HfDataset(spec_of(folder, columns={**COLUMNS, "category": "kind"})).check()
    assert error.startswith("row 0: `category` is missing, which columns names")
    (error,) = HfDataset(spec_of(folder, columns={**COLUMNS, "category": "typ"})).check()
    assert "has no column typ; it has picture, q, a, key, unread, kind" in error
