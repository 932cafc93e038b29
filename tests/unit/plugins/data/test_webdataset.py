"""webdataset on real shards: samples and their order are the library's, read at any place; faults are told by row."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from conversations import say
from orchestrator_plugins.data.webdataset import WebDataset, WebDatasetSpec, read_samples
from PIL import Image

from orchestrator import plugin
from orchestrator.data.records.image_files import open_image
from orchestrator.data.records.row_index import open_rows
from orchestrator.data.train_data import build_train_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number: int, form: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(data, form)
    return data.getvalue()


def record(number: int, **more) -> bytes:
    return json.dumps({"conversations": say("<image>\nWhat?", f"answer {number}"), **more}).encode()


def sample(number: int) -> list[tuple[str, bytes]]:
    return [(f"{number:04}.json", record(number)), (f"{number:04}.png", picture(number))]


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    os.utime(path, (10**9, 10**9))
    return path


@pytest.fixture
def shards(tmp_path):
    """Two shards of five samples."""
    for shard in range(2):
        members = [member for number in range(5 * shard, 5 * shard + 5) for member in sample(number)]
        write(tmp_path / "shards" / f"{shard:03}.tar", members)
    return tmp_path / "shards"


def spec_of(path, **fields) -> WebDatasetSpec:
    return WebDatasetSpec(data_path=str(path), **fields)


def shown(rows) -> list[tuple]:
    return [
        (row.index, [turn.text for turn in row.turns], [open_image(image.path).size for image in row.images])
        for row in rows
    ]


def expected(numbers) -> list[tuple]:
    return [(n, ["<image>\nWhat?", f"answer {n}"], [(8 + n, 8)]) for n in numbers]


@pytest.mark.parametrize("where", ["", "{000..001}.tar"])
def test_rows_are_read_from_the_shards_where_they_lie(shards, where, tmp_path):
    spec = spec_of(shards / where)
    assert WebDataset(spec).check() == [] and spec.num_rows() == 10
    rows = WebDataset(spec).rows()
    assert shown(rows) == expected(range(10)) and shown([rows[7]]) == expected([7])
    assert all(image.path.startswith(f"{shards}/00") for row in rows for image in row.images)
    assert rows.origin.images.sizes[rows[3].images[0].path] == (8, 11)
    cut = spec_of(shards / where, max_samples=5)
    assert [row.index for row in WebDataset(cut).rows()] == [0, 2, 4, 6, 8]
    assert not list((tmp_path / "cache").rglob("*.png"))


def test_samples_are_the_librarys(tmp_path):
    library = pytest.importorskip("webdataset")
    odd = [
        ("__meta__", b"x"),
        ("a/b.0.json", b"{}"),
        ("a/b.0.seg.PNG", b"1"),
        ("a/c.json", b"{}"),
        ("README", b"no dot"),
    ]
    shard = write(tmp_path / "odd.tar", [*sample(1), *odd, *sample(2), ("0002.cls", b"7")])
    data = shard.read_bytes()
    found = [
        (each.key, {ending: data[offset : offset + length] for ending, (offset, length) in each.members.items()})
        for each in read_samples(shard)
    ]
    wanted = library.WebDataset(str(shard), shardshuffle=False)
    assert found == [
        (each["__key__"], {key: value for key, value in each.items() if not key.startswith("__")}) for each in wanted
    ]
    assert len(found) == 4


def test_images_that_a_record_names_and_captions(tmp_path):
    both = record(0, image=["0000.b.jpg", "0000.a.png"]).replace(b"<image>", b"<image><image>")
    images = [("0000.a.png", picture(1)), ("0000.b.jpg", picture(2, "JPEG"))]
    elsewhere = [("0001.png", picture(3)), ("0001.json", record(1, image="coco/000.jpg"))]
    text_only = [("0002.json", json.dumps({"conversations": say("Hello", "Hi")}).encode())]
    shard = write(tmp_path / "a.tar", [("0000.json", both), *images, *elsewhere, *text_only])
    rows = WebDataset(spec_of(shard)).rows()
    assert [list(sizes) for _, _, sizes in shown(rows)] == [[(10, 8), (9, 8)], [(11, 8)], []]
    captions = write(tmp_path / "b.tar", [("0.png", picture(1)), ("0.txt", b"a dark square\n"), ("0.json", b"{}")])
    (row,) = WebDataset(spec_of(captions, text="txt", conversation_template="plain")).rows()
    assert [turn.text for turn in row.turns] == ["<image>", "a dark square"] and len(row.images) == 1


FAULTS = {
    "cut image": ([("1.png", picture(1)[:40]), ("1.json", record(1))], "1.png@512+40 is damaged"),
    "no json": ([("1.png", picture(1))], "it has .png; .json is missing (a.tar, 1)"),
    "no image": ([("1.json", record(1))], "1 <image> in the conversation, 0 images"),
    "not json": ([("1.json", b"{"), ("1.png", picture(1))], "its .json is not JSON"),
    "a list": ([("1.json", b"[]"), ("1.png", picture(1))], "its .json is a mapping"),
    "repeated key": ([("1.json", b'{"id": 1, "id": 2}'), ("1.png", picture(1))], "the record has the key `id` twice"),
    "two of a name": ([("1.json", record(1)), ("1.png", picture(1)), ("1.png", picture(2))], "two members .png"),
    "another's image": (
        [("1.json", record(1, image="2.png")), ("1.png", picture(1)), ("1.b.png", picture(2))],
        "names the image '2.png'; the sample's images are 1.png, 1.b.png",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_broken_sample_is_a_bad_row_with_its_reason(case, tmp_path):
    members, reason = FAULTS[case]
    shard = write(tmp_path / "a.tar", [*members, *sample(2), *sample(3)])
    (error,) = WebDataset(spec_of(shard)).check()
    assert error.startswith("row 0: ") and reason in error
    dropping = spec_of(shard, on_bad_row="drop", max_bad_share=0.4)
    assert [row.index for row in WebDataset(dropping).rows()] == [1, 2] == [1, dropping.num_rows()]
    assert dropping.remarks()[0].startswith("1 of 3 rows dropped; row 0: ")
    assert "33.33% of the rows" in WebDataset(spec_of(shard, on_bad_row="drop", max_bad_share=0.3)).check()[0]


def test_a_link_in_a_shard_is_a_bad_row(tmp_path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name, data in sample(0)[:1]:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
        link = tarfile.TarInfo("0000.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (error,) = WebDataset(spec_of(shard)).check()
    assert error == "row 0: its member .png is a link or no regular file (a.tar, 0000)"


@pytest.mark.parametrize("damage", ["in a member", "between members", "header", "two in one", "gzip", "empty", "text"])
def test_a_shard_that_is_not_whole_is_refused(shards, damage):
    """Else it would be a smaller set than it was, without a word."""
    shard, other = shards / "000.tar", shards / "001.tar"
    data = shard.read_bytes()
    last = [offset + size for each in read_samples(shard) for offset, size in each.members.values()]
    whole = -(-last[5] // 512) * 512
    if damage == "header":
        data = data[:whole] + b"\xff" * 512 + data[whole + 512 :]
    changed = {
        "in a member": data[: last[5] - 10], "between members": data[:whole], "header": data,
        "two in one": data + other.read_bytes(), "gzip": b"\x1f\x8b" + data, "empty": b"", "text": b"hello" * 300,
    }  # fmt: skip
    shard.write_bytes(changed[damage])
    (error,) = WebDataset(spec_of(shards)).check()
    assert "000.tar is not a whole tar file" in error


def test_a_missing_shard_is_told(shards):
    (error,) = WebDataset(spec_of(shards / "{000..002}.tar")).check()
    assert error.endswith(f"cannot be read: {shards}/002.tar is missing")
    assert spec_of(shards / "{000..002}.tar").num_rows() is None
    assert spec_of(shards / "{000..002}.tar", num_samples=15).num_rows() == 15


def test_a_changed_shard_is_other_data_and_a_moved_one_is_not(shards, tmp_path):
    spec = spec_of(shards)
    before = spec.content_digest()
    shutil.copytree(shards, tmp_path / "moved")
    assert spec_of(tmp_path / "moved").content_digest() == before
    shard = shards / "001.tar"
    size = shard.stat().st_size
    data = shard.read_bytes().replace(b"answer 7", b"answer X")
    shard.write_bytes(data)
    os.utime(shard, (10**9, 10**9))
    assert shard.stat().st_size == size and spec.content_digest() != before
    assert WebDataset(spec).rows()[7].turns[1].text == "answer X"
    with pytest.raises(plugin.DataError, match="has changed since it was planned"):
        open_rows(spec, before)


def test_a_second_look_reads_no_member(shards, monkeypatch):
    spec = spec_of(shards)
    first = spec.content_digest(), spec.num_rows()
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("read again"))
    assert (spec.content_digest(), spec.num_rows()) == first and len(WebDataset(spec).rows()) == 10


def test_a_row_is_trained_on_as_it_would_be_from_files(shards, processor, tmp_path):
    rows = [json.loads(record(number, image=f"{number}.png")) for number in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    found = []
    for values in (
        {"kind": "webdataset", "data_path": str(shards)},
        {"kind": "llava_json", "data_path": str(tmp_path / "rows.json")},
    ):
        spec = {**values, "conversation_template": "vicuna_v1"}
        found.append(build_train_data([{"name": "mine", "share": 1.0, "spec": spec}], processor, 2048))
    for step in range(4):
        indices = found[0].batch_indices(0, step, 4, group_by_modality_length=True)
        assert indices == found[1].batch_indices(0, step, 4, group_by_modality_length=True)
        first, second = (data.collate(indices) for data in found)
        assert all((first[name] == second[name]).all() for name in second) and first.keys() == second.keys()


def test_the_contract_of_a_data_kind_holds(shards):
    report = plugin.check_data({"kind": "webdataset", "data_path": str(shards)})
    assert "content_digest changes with the content of an image" in report.held and not report.skipped


def test_columns_for_evaluations_change_no_training(tmp_path):
    more = {"answers": ["a", "b"], "category": "count"}
    members = [
        member
        for number in range(3)
        for member in ((f"{number}.json", record(number, **more)), (f"{number}.png", picture(number)))
    ]
    write(tmp_path / "shards" / "0.tar", members)
    plain, having = (
        spec_of(tmp_path / "shards", ignore_keys=("answers",)),
        spec_of(tmp_path / "shards", columns=("answers", "category"), ignore_keys=("answers",)),
    )
    row = WebDataset(having).rows()[1]
    assert row.columns == more and row.answer_type == "count"
    other = WebDataset(plain).rows()[1]
    assert other.columns == {} and other.answer_type is None and (row.turns, row.images) == (other.turns, other.images)
    assert plain.content_digest() == having.content_digest() and "columns" not in plain.model_dump()
    missing = spec_of(tmp_path / "shards", columns=("options",), ignore_keys=("answers",))
    assert "`options` is missing, which columns names" in WebDataset(missing).check()[0]
