"""Files of records: lists and lines, read piece by piece; what else a file is, is told in one line."""

import gzip
import json
import os
import zipfile

import pytest
from conversations import say
from orchestrator_plugins.data.llava_json import LlavaJson, LlavaJsonSpec

from orchestrator.data.records import json_records
from orchestrator.data.records.json_records import read_records
from orchestrator.errors import DataError

ASK = say("<image>\nWhat?", "A square.")


def records(tmp_path, data, name="data.json"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_records(path))


GOOD = [{"id": number, "conversations": say(f"a {number}\U0001f525é", 'b]},{\\"')} for number in range(9)]
LINES = "\n".join(map(json.dumps, GOOD))


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**22])
@pytest.mark.parametrize("options", [{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_a_list_is_read_piece_by_piece(chunk, options, tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "CHUNK_CHARACTERS", chunk)
    text = json.dumps(GOOD, **options)
    for whole in (text, f"\ufeff\r\n{text}\n\n"):
        assert records(tmp_path, whole) == records(tmp_path, whole, "DATA.JSON") == GOOD
    assert records(tmp_path, '[1, 23, null, "x", [2], {}]') == [1, 23, None, "x", [2], {}]
    assert records(tmp_path, "[ ]") == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_lines_are_read_under_each_of_their_names(name, end, tmp_path):
    assert records(tmp_path, LINES.replace("\n", end), name) == GOOD
    assert records(tmp_path, "\ufeff" + LINES, name) == GOOD


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", json.dumps(GOOD), "this is a JSON list, not one record a line; name it .json"),
        ("a.NDJSON", json.dumps(GOOD, indent=1), "this is a JSON list"),
        ("a.json", LINES, "this is JSON lines, one record a line, not a JSON list; name it .jsonl"),
        ("a.JSON", "\ufeff\n" + LINES, "this is JSON lines"),
        ("a.json", json.dumps({"train": GOOD, "test": []}), "holds a dict of train, test; LLaVA's format is a list"),
        ("a.json", json.dumps({"train": GOOD}, indent=1), "holds a dict of train;"),
        ("a.jsonl", json.dumps({"train": GOOD}, indent=1), "holds one mapping of train, not one record a line"),
        ("a.json", "", "is empty: it has no rows"),
        ("a.jsonl", " \n\n", "is empty: it has no rows"),
        ("a.json", "id,image,text\n1,a.png,b\n", "is not JSON: it begins with 'id,image,text'"),
        ("a.json", "<!DOCTYPE html>\n<html>", "is not JSON but an HTML page: the download went wrong"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\n", "but a git-lfs pointer: run `git lfs pull`"),
        ("a.json", b"PAR1\x15\x04", "but a parquet file"),
        ("a.jsonl", b"ARROW1\0\0", "but an Arrow file"),
        ("a.json", gzip.compress(b"[]", mtime=0), "but a gzip file: unpack it"),
        ("a.json", bytes(4096), "but nothing but zeros"),
        ("a.json", json.dumps(GOOD).encode("utf-16"), "but UTF-16 text: save it as UTF-8"),
        ("a.jsonl", LINES.encode("utf-16-le"), "but UTF-16 text"),
        ("a.json", json.dumps(GOOD)[:-2], "row 8: the file ends in it"),
        ("a.json", json.dumps(GOOD)[:-1], "row 9: "),
        ("a.json", json.dumps(GOOD)[:-1] + ",", "row 9: the file ends before its list does"),
        ("a.json", json.dumps(GOOD).replace('"id": 4', '"id": 4x'), "row 4: Expecting ',' delimiter"),
        ("a.json", json.dumps(GOOD).replace(', {"id": 3', ' {"id": 3'), "row 3: a comma or ] belongs before it"),
        ("a.json", json.dumps(GOOD) + "[]", "the list has ended, and there is more: '['"),
        ("a.json", "[" * 100_000, "row 0: too deeply nested"),
        ("a.json", "[" + "9" * 5000 + "]", "row 0: Exceeds the limit"),
    ],
)
def test_a_file_that_is_something_else_is_told_in_one_line(name, data, words, tmp_path):
    with pytest.raises(DataError) as told:
        records(tmp_path, data, name)
    assert words in str(told.value) and "\n" not in str(told.value)
    spec = LlavaJsonSpec(data_path=str(tmp_path / name))
    assert LlavaJson(spec).check() == [str(told.value)]


def test_a_zip_a_folder_and_a_pipe(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.json", "w") as file:
        file.writestr("b.json", "[]")
    with pytest.raises(DataError, match="but a zip file"):
        list(read_records(tmp_path / "a.json"))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        list(read_records(tmp_path))
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(DataError, match=r"fifo\.json is no regular file"):
        list(read_records(tmp_path / "fifo.json"))


def test_a_broken_line_and_what_is_in_a_line_spoil_their_own_row_only(tmp_path):
    lines = [
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "\\ud83d\\udd25"}]}',
        '{"conversations": [{"from": "human", "value": "\\ud83d"}, {"from": "gpt", "value": "b"}]}',
        b'{"conversations": [{"from": "human", "value": "caf\xe9"}, {"from": "gpt", "value": "b"}]}',
        b'{"conversations": [{"from": "human", "value": "\xed\xa0\xbd"}, {"from": "gpt", "value": "b"}]}',
        '{"conversations": [{"from": "human", "value": "a", "value": "c"}, {"from": "gpt", "value": "b"}]}',
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 1, "id": 2}',
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": NaN}]}',
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": NaN}',
        "null",
        '{"conversations": ',
    ]
    data = [line.encode() if isinstance(line, str) else line for line in lines]
    wanted = {
        1: "holds '\\ud83d', half of an escaped character",
        2: "holds a byte that is not UTF-8",
        3: "holds a byte that is not UTF-8",
        4: "turn 0 has the key `value` twice",
        5: "the record has the key `id` twice",
        6: "the text of turn 1 is nan, not a string",
        8: "a record is a mapping, this is null",
        9: "the line is not JSON",
    }
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(data))
    found = LlavaJson(LlavaJsonSpec(data_path=str(tmp_path / "a.jsonl"))).index()
    assert found.bad.keys() == wanted.keys() and found.good.tolist() == [0, 7]
    assert all(wanted[index] in fault for index, fault in found.bad.items())
    assert found.row(0).turns[1].text == "\U0001f525"
    # The same in a list, but for the line that is no JSON at all.
    (tmp_path / "a.json").write_bytes(b"[" + b",".join(data[:-1]) + b"]")
    of_list = LlavaJson(LlavaJsonSpec(data_path=str(tmp_path / "a.json"))).index()
    assert of_list.bad == {index: fault for index, fault in found.bad.items() if index != 9}


def test_what_most_rows_have_in_common_is_told_once(conversation_file, pictures):
    alpaca = [{"instruction": "a", "output": str(number)} for number in range(58)]
    spec = LlavaJsonSpec(data_path=conversation_file(alpaca))
    (fault,) = LlavaJson(spec).check()
    assert fault.startswith(
        "all 58 rows, the first is row 0: it has instruction, output (this looks like Alpaca's form"
    )
    missing = [{"image": f"train/{number}.png", "conversations": ASK} for number in range(40)]
    other = [{"image": "0.png", "conversations": ASK}, {"image": "0.png", "conversations": []}]
    spec = LlavaJsonSpec(data_path=conversation_file([*other, *missing], "b.json"), image_folder=str(pictures))
    faults = LlavaJson(spec).check()
    assert faults[0] == f"40 of 42 rows, the first is row 2: {pictures}/train/0.png is missing"
    assert faults[1] == "row 1: `conversations` is empty" and len(faults) == 2
    dropping = spec.model_copy(update={"on_bad_row": "drop"})
    assert "97.62% of the rows are bad" in LlavaJson(dropping).check()[0]
