"""easy_vqa against the package's own functions."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import easy_vqa
import pytest
from orchestrator_plugins.data.easy_vqa import EasyVqa, EasyVqaSpec

from orchestrator.data.records.row_index import open_rows


@pytest.mark.parametrize(("split", "count"), [("train", 38_575), ("test", 9_673)])
def test_rows_are_the_packages_own(split, count):
    spec = EasyVqaSpec(split=split)
    questions, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    rows = EasyVqa(spec).rows()
    assert spec.num_rows() == len(rows) == count
    assert [row.turns[0].text for row in rows] == [f"<image>\n{question}" for question in questions]
    assert [row.turns[1].text for row in rows] == answers
    assert [row.images[0].path for row in rows] == [paths[image] for image in images]
    assert EasyVqa(spec).check() == []


def test_what_is_tuned_on_shows_no_picture_of_the_rest():
    whole, first, rest = (EasyVqa(EasyVqaSpec(split=split)) for split in ("train", "train[:90%]", "train[90%:]"))
    pictures = [{image.path for row in part.rows() for image in row.images} for part in (first, rest)]
    assert [len(found) for found in pictures] == [3600, 400] and not pictures[0] & pictures[1]
    turns = [row.turns for part in (first, rest) for row in part.rows()]
    assert turns == [row.turns for row in whole.rows()]
    assert len({part._spec.content_digest() for part in (whole, first, rest)}) == 3


def test_answer_types():
    types = {}
    for row in EasyVqa(EasyVqaSpec(split="test")).rows():
        types.setdefault(row.answer_type, set()).add(row.turns[1].text)
    assert types == {
        "yes_no": {"yes", "no"},
        "shape": {"circle", "rectangle", "triangle"},
        "color": {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"},
    }


def test_max_samples_is_spread_over_the_split():
    spec = EasyVqaSpec(split="test", max_samples=2000)
    rows = EasyVqa(spec).rows()
    assert spec.num_rows() == len(rows) == len({row.index for row in rows}) == 2000
    assert max(row.index for row in rows) > 9_600
    share = Counter(row.answer_type for row in rows)["yes_no"] / 2000
    all_rows = EasyVqa(EasyVqaSpec(split="test")).rows()
    assert share == pytest.approx(Counter(row.answer_type for row in all_rows)["yes_no"] / len(all_rows), abs=0.03)
    assert EasyVqaSpec(split="test", max_samples=10**6).num_rows() == 9_673


def test_digest_is_of_the_split_and_stable():
    train, test = EasyVqaSpec(split="train").content_digest(), EasyVqaSpec(split="test").content_digest()
    assert train != test and len(train) == 64
    assert EasyVqaSpec(split="train", max_samples=5).content_digest() == train


def test_a_package_that_moved_is_read_where_it_is(tmp_path, monkeypatch):
    """Another environment with the same package: same content, other paths."""
    package = Path(easy_vqa.__file__).parent
    monkeypatch.delitem(sys.modules, "easy_vqa")
    spec = EasyVqaSpec(split="test", max_samples=20)
    for environment in ("first", "second"):
        shutil.copytree(package / "data" / "test", tmp_path / environment / "easy_vqa" / "data" / "test")
        (tmp_path / environment / "easy_vqa" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path / environment)
        rows = open_rows(spec, spec.content_digest())
        folder = tmp_path / environment / "easy_vqa" / "data" / "test" / "images"
        assert {str(Path(image.path).parent) for row in rows for image in row.images} == {str(folder)}
        shutil.rmtree(tmp_path / environment)
