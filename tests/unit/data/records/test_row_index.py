"""The index of rows: made once, kept by content, the same for all who read it, mended where it is damaged."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conversations import say
from orchestrator_plugins.data.easy_vqa import EasyVqa, EasyVqaSpec
from orchestrator_plugins.data.llava_json import LlavaJson, LlavaJsonSpec
from PIL import Image

from orchestrator.data.records import columns, row_index
from orchestrator.data.records.row_index import open_rows
from orchestrator.data.train_data import build_train_data
from orchestrator.errors import DataError
from orchestrator.plan.cells.identity_fields import data_identity
from orchestrator.plan.identity import share_caches, shared_cache_folder

ROWS = 12


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(columns, "_temporary", lambda: tmp_path / "temporary")
    share_caches(tmp_path / "storage" / "cache")
    yield
    share_caches(None)


@pytest.fixture
def data(tmp_path):
    """A folder of rows: an image in two of three; every file an hour old."""

    def write(name: str = "data", rows: int = ROWS) -> LlavaJsonSpec:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        records = []
        for number in range(rows):
            record = {"conversations": say("<image>\nWhat?" if number % 3 else "Hello", f"answer {number}")}
            if number % 3:
                record["image"] = f"{number}.bmp"
                Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(folder / "images" / f"{number}.bmp")
            records.append(record)
        (folder / "data.json").write_text(json.dumps(records))
        for path in folder.rglob("*"):
            age(path)
        return LlavaJsonSpec(
            data_path=str(folder / "data.json"), image_folder=str(folder / "images"), conversation_template="vicuna_v1"
        )

    return write


def age(path: Path, seconds: float = 3600) -> None:
    """Lets a file be as old as data is that nobody just wrote."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def image_of(spec: LlavaJsonSpec, number: int) -> Path:
    return Path(str(spec.image_folder)) / f"{number}.bmp"


def index_files(kind: str) -> list[Path]:
    return sorted((shared_cache_folder() / "rows").glob(f"{kind}-*.arrow"))


def no_reading(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(row_index, "_batch", refuse)
    monkeypatch.setattr(row_index, "_look", refuse)


def test_rows_come_back_as_they_were_read(data):
    spec = data()
    rows = LlavaJson(spec).rows()
    assert len(rows) == ROWS and [row.index for row in rows] == list(range(ROWS))
    assert [turn.text for turn in rows[4].turns] == ["<image>\nWhat?", "answer 4"]
    assert [image.path for image in rows[4].images] == [str(image_of(spec, 4))]
    assert rows.num_words.tolist() == [row.num_words for row in rows]
    assert rows.num_images.tolist() == [len(row.images) for row in rows]
    assert [row.index for row in rows[2:5]] == [2, 3, 4] and rows[-1].index == ROWS - 1
    assert [row.index for row in rows.without([0, 5])] == [n for n in range(ROWS) if n not in (0, 5)]
    with pytest.raises(IndexError):
        rows[ROWS]


def test_a_second_look_reads_no_row_and_no_image(data, monkeypatch):
    spec = data()
    first = (spec.content_digest(), spec.num_rows())
    no_reading(monkeypatch)
    assert (spec.content_digest(), spec.num_rows()) == first
    assert len(LlavaJson(spec).rows()) == ROWS and LlavaJson(spec).check() == []


def test_a_recoloured_image_of_the_same_size_is_other_data(data):
    spec = data()
    before = spec.content_digest()
    path = image_of(spec, 4)
    size = path.stat().st_size
    Image.new("RGB", (12, 8), (0, 200, 0)).save(path)
    assert path.stat().st_size == size
    assert spec.content_digest() != before


def test_the_same_content_elsewhere_is_the_same_data(data, tmp_path):
    spec = data()
    before = spec.content_digest()
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    moved = spec.model_copy(
        update={
            "data_path": str(tmp_path / "moved" / "data.json"),
            "image_folder": str(tmp_path / "moved" / "images"),
        }
    )
    assert moved.content_digest() == before
    assert LlavaJson(moved).rows()[1].images[0].path.startswith(str(tmp_path / "moved"))
    for path in (tmp_path / "data").rglob("*"):
        age(path)  # touched, not changed
    assert spec.content_digest() == before


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_failing_storage_raises_and_changes_no_identity(data, monkeypatch, number, call):
    spec = data().model_copy(update={"on_bad_row": "drop", "max_bad_share": 0.5})
    victim = str(image_of(spec, 4))
    real_stat, real_sha = os.stat, row_index.file_sha256

    def failing_stat(path, **options):
        if str(path) == victim:
            raise OSError(number, os.strerror(number), victim)
        return real_stat(path, **options)

    def failing_sha(path):
        if str(path) == victim:
            raise OSError(number, os.strerror(number), victim)
        return real_sha(path)

    with monkeypatch.context() as patch:
        if call == "stat":
            patch.setattr(os, "stat", failing_stat)
        else:
            patch.setattr(row_index, "file_sha256", failing_sha)
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(number)):
                data_identity(spec)
    assert spec.num_rows() == ROWS and spec.remarks() == []


def test_what_decoding_says_of_a_failing_storage_is_not_kept(data, monkeypatch):
    spec = data().model_copy(update={"on_bad_row": "drop", "max_bad_share": 0.5})
    real = row_index.verify_image

    def fails_once(path, reading):
        monkeypatch.setattr(row_index, "verify_image", real)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(row_index, "verify_image", fails_once)
    with pytest.raises(DataError, match="Input/output error"):
        spec.content_digest()
    assert spec.num_rows() == ROWS


@pytest.mark.parametrize("what", ["image", "rows"])
def test_a_rank_that_finds_other_data_than_was_planned_says_so(data, processor, what):
    spec = data()
    entry = {"name": "mine", "share": 1.0, "spec": spec.model_dump(mode="json"), "content": spec.content_digest()}
    assert len(build_train_data([entry], processor, 2048)) == ROWS
    if what == "image":
        image_of(spec, 4).unlink()
    else:
        path = Path(spec.data_path)
        path.write_text(path.read_text().replace("answer 4", "answer 5"))
    with pytest.raises(DataError, match="changed since it was planned"):
        build_train_data([entry], processor, 2048)


def test_a_transient_error_on_one_rank_fails_and_drops_nothing(data, processor, monkeypatch):
    spec = data().model_copy(update={"on_bad_row": "drop", "max_bad_share": 0.5})
    entry = {"name": "mine", "share": 1.0, "spec": spec.model_dump(mode="json"), "content": spec.content_digest()}
    real = row_index._stat

    def fails_once(path):
        monkeypatch.setattr(row_index, "_stat", real)
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(row_index, "_stat", fails_once)
    with pytest.raises(OSError, match="Stale"):
        build_train_data([entry], processor, 2048)
    assert len(build_train_data([entry], processor, 2048)) == ROWS


def test_dropped_rows_are_part_of_what_the_data_is_and_are_told(data):
    spec = data()
    dropping = spec.model_copy(update={"on_bad_row": "drop", "max_bad_share": 0.5})
    whole = dropping.content_digest()
    image_of(spec, 4).unlink()
    assert dropping.num_rows() == ROWS - 1 and dropping.content_digest() != whole
    assert [row.index for row in LlavaJson(dropping).rows()] == [n for n in range(ROWS) if n != 4]
    assert dropping.remarks() == [f"1 of {ROWS} rows dropped; row 4: {image_of(spec, 4)} is missing"]
    assert LlavaJson(spec).check() == [f"row 4: {image_of(spec, 4)} is missing"]


def test_many_dropped_rows_are_counted(data):
    spec = data().model_copy(update={"on_bad_row": "drop", "max_bad_share": 1})
    for path in Path(str(spec.image_folder)).iterdir():
        path.unlink()
    (told,) = spec.remarks()
    assert told.startswith(f"8 of {ROWS} rows dropped; row 1: ") and told.endswith("; ... and 3 more")


def test_an_interrupted_index_goes_on_where_it_was(data, monkeypatch):
    monkeypatch.setattr(row_index, "CHUNK_ROWS", 2)
    monkeypatch.setattr(row_index, "CHUNK_IMAGES", 2)
    spec, done = data(), {"rows": 0, "images": 0}
    real_batch, real_look = row_index._batch, row_index._look

    def batch(*arguments):
        if done["rows"] == 3:
            raise KeyboardInterrupt
        done["rows"] += 1
        return real_batch(*arguments)

    def look(*arguments):
        if done["images"] == 2:
            raise KeyboardInterrupt
        done["images"] += 1
        return real_look(*arguments)

    for module, name, function in ((row_index, "_batch", batch), (row_index, "_look", look)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, function)
            with pytest.raises(KeyboardInterrupt):
                spec.content_digest()
    # Three of six chunks of rows and two of four of images are there already.
    assert done == {"rows": 3, "images": 2}
    counted = []
    monkeypatch.setattr(row_index, "_look", lambda *a: counted.append(1) or real_look(*a))
    digest_after = spec.content_digest()
    assert len(counted) == 2
    shutil.rmtree(shared_cache_folder())
    assert spec.content_digest() == digest_after
    assert not list((shared_cache_folder() / "rows").glob("*.part"))


def test_a_chunk_damaged_after_an_interruption_is_made_again(data, monkeypatch):
    monkeypatch.setattr(row_index, "CHUNK_ROWS", 2)
    spec, real, made = data(), row_index._batch, []

    def batch(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(real(*arguments))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(row_index, "_batch", batch)
        with pytest.raises(KeyboardInterrupt):
            spec.content_digest()
    chunk = min((shared_cache_folder() / "rows").glob("rows-*.part/*"))
    content = bytearray(chunk.read_bytes())
    content[content.index(b"answer 1")] ^= 1
    chunk.unlink()
    chunk.write_bytes(content)
    found = spec.content_digest(), [row.index for row in LlavaJson(spec).rows()]
    shutil.rmtree(shared_cache_folder())
    assert found == (spec.content_digest(), list(range(ROWS)))


def test_two_at_once_come_to_the_same(data, monkeypatch):
    monkeypatch.setattr(row_index, "CHUNK_ROWS", 2)
    monkeypatch.setattr(row_index, "CHUNK_IMAGES", 2)
    spec, found, faults = data(), [], []

    def work():
        try:
            found.append(spec.content_digest())
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(set(found)) == 1


def test_a_cache_that_cannot_be_written_costs_only_time(data, monkeypatch):
    spec = data()
    wanted = spec.content_digest()
    shutil.rmtree(shared_cache_folder())
    real = columns.write_columns

    def refuse(file, batches, schema):
        if not file.is_relative_to(columns._temporary()):
            raise OSError(errno.EROFS, "Read-only file system", str(file))
        real(file, batches, schema)

    monkeypatch.setattr(columns, "write_columns", refuse)
    assert spec.content_digest() == wanted and len(LlavaJson(spec).rows()) == ROWS
    assert not index_files("rows")


@pytest.mark.parametrize("kind", ["rows", "images"])
@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "flip"])
def test_a_damaged_index_is_made_again(data, kind, damage):
    spec = data()
    wanted = spec.content_digest()
    (file,) = index_files(kind)
    content = bytearray(file.read_bytes())
    if damage == "flip":  # in a column that all who open the index look at
        at = content.index(np.array([0, 1, 2, 3], dtype=np.int64).tobytes()) if kind == "rows" else 600
        content[at + 8] ^= 1
    new = {"cut": content[: len(content) // 2], "empty": b"", "zeros": b"\0" * len(content), "flip": content}
    file.write_bytes(bytes(new[damage]))
    assert spec.content_digest() == wanted
    assert [row.index for row in LlavaJson(spec).rows()] == list(range(ROWS))


def test_a_damaged_text_is_never_trained_on(data):
    spec = data()
    spec.content_digest()
    (file,) = index_files("rows")
    file.write_bytes(file.read_bytes().replace(b"answer 4", b"answer 9"))
    with pytest.raises(DataError, match="the index of the rows is damaged"):
        list(LlavaJson(spec).rows())
    assert [row.turns[1].text for row in LlavaJson(spec).rows()] == [f"answer {n}" for n in range(ROWS)]


def test_an_index_of_another_machine_is_not_believed(data):
    """One storage, the same paths, other files behind them."""
    spec = data()
    before = spec.content_digest()
    path = image_of(spec, 4)
    path.write_bytes(path.read_bytes()[:-3] + b"\x01\x02\x03")
    age(path, 7200)
    assert spec.content_digest() != before


def test_a_file_that_changes_while_it_is_read_is_told(data, monkeypatch):
    spec = data()
    real = row_index.file_sha256

    def sha(path):
        found = real(path)
        if path == str(image_of(spec, 4)):
            Path(path).write_bytes(b"other")
        return found

    monkeypatch.setattr(row_index, "file_sha256", sha)
    with pytest.raises(DataError, match="changes while it is read"):
        spec.content_digest()


TRUNCATED = {"jpg": {}, "bmp": {}, "gif": {}, "tif": {}, "tiff": {"compression": "tiff_lzw"}, "png": {}, "webp": {}}


@pytest.mark.parametrize("ending", TRUNCATED)
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_truncated_image_is_dropped_and_told(tmp_path, ending, share):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{ending}"
    Image.fromarray(noise).save(path, **TRUNCATED[ending])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    records = [{"image": path.name, "conversations": say("<image>", "a")}, {"conversations": say("b", "c")}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    spec = LlavaJsonSpec(data_path=str(tmp_path / "data.json"), on_bad_row="drop", max_bad_share=0.5)
    assert spec.num_rows() == 1
    assert spec.remarks()[0].startswith(f"1 of 2 rows dropped; row 0: {path} is ")


def test_any_kind_of_data_gets_an_index(monkeypatch):
    spec = EasyVqaSpec(split="test", max_samples=20)
    rows = open_rows(spec, spec.content_digest())
    assert list(rows) == list(EasyVqa(spec).rows())
    no_reading(monkeypatch)
    assert [row.answer_type for row in open_rows(spec)] == [row.answer_type for row in EasyVqa(spec).rows()]
