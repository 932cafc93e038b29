"""`check_data` proves the built-in data kinds and names what is wrong with broken ones, each broken in one way."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from PIL import Image

from orchestrator import plugin


class Captions(plugin.DataSpec):
    """One row a line of a text file: an image's name, a caption."""

    implementation: ClassVar[str] = f"{__name__}:CaptionRows"
    path_fields: ClassVar[tuple[str, ...]] = ("folder",)

    kind: Literal["captions"] = "captions"
    folder: str
    broken: str = ""

    def lines(self):
        lines = [line for line in (Path(self.folder) / "captions.txt").read_text().splitlines() if line]
        return [lines[place] for place in plugin.evenly_spread(len(lines), self.max_samples)]

    def num_rows(self):
        return len(self.lines()) + (self.broken == "counts one more")

    def content_digest(self):
        if self.broken == "digests the path":
            return plugin.content_digest(__file__)
        if self.broken == "digests at random":
            return f"{random.getrandbits(256):064x}"
        if self.broken == "short digest":
            return "abc"
        text = (Path(self.folder) / "captions.txt").read_bytes()
        images = b"" if self.broken == "leaves images out" else b"".join(p.read_bytes() for p in self.images())
        import hashlib

        return hashlib.sha256(text + images).hexdigest()

    def images(self):
        return sorted(Path(self.folder).glob("*.png"))


CALLS = itertools.count()


class CaptionRows:
    def __init__(self, spec):
        self.spec = spec

    def rows(self):
        found = [self.row(number, *line.split(" ", 1)) for number, line in enumerate(self.spec.lines())]
        broken = self.spec.broken
        if broken == "any order":
            turn = next(CALLS) % len(found)  # never the order of the call before, as a shuffle may be
            found = found[turn:] + found[:turn]
        if broken == "ignores max_samples" and self.spec.max_samples is not None:
            found = found * 3
        if broken == "loads torch":
            import torch  # noqa: F401
        return iter(found) if broken == "an iterator" else found

    def row(self, number, image, caption):
        broken: dict[str, Any] = {
            "a mapping": {"image": image},
            "no mark": self.made(number, image, "what is it?", caption),
            "no answer": plugin.Row(number, (), (plugin.Turn("user", "what is it?"),)),
            "a list of turns": plugin.Row(number, (), [plugin.Turn("user", "a"), plugin.Turn("assistant", "b")]),
            "a path for an image": plugin.Row(number, (image,), (plugin.Turn("user", "a"),)),
            "missing images": self.made(number, "none.png", "<image>", caption),
        }
        return broken.get(self.spec.broken, self.made(number, image, "<image>\nwhat is it?", caption))

    def made(self, number, image, question, caption):
        turns = (plugin.Turn("user", question), plugin.Turn("assistant", caption))
        return plugin.Row(number, (plugin.ImageRef(f"{self.spec.folder}/{image}"),), turns)

    def check(self, every_row=True):
        return {"reports an error": ["row 1: bad"], "reports None": None}.get(self.spec.broken, [])


class WithoutRows(Captions):
    """..."""

    implementation: ClassVar[str] = f"{__name__}:Nothing"


class Nothing:
    def __init__(self, spec):
        pass


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "captions.txt").write_text("".join(f"{number}.png picture {number}\n" for number in range(4)))
    return str(tmp_path)


BROKEN = {
    "counts one more": "num_rows counts 5, rows\\(\\) gives 4",
    "an iterator": "rows\\(\\) gives a sequence of rows.*raised TypeError",
    "a mapping": "return plugin.Row",
    "no mark": "has 1 images and 0 marks <image>",
    "no answer": "has turns of user; they are user and assistant in turn",
    "a list of turns": "give a tuple of plugin.Turn",
    "a path for an image": "give a tuple of plugin.ImageRef",
    "missing images": "none.png is missing",
    "any order": "holds another row; sort",
    "ignores max_samples": "with max_samples 1 there are 3 rows",
    "reports an error": "reports 1, first: row 1: bad",
    "reports None": "returned None; return a list",
    "short digest": "it is 'abc'; return 64 hexadecimal digits",
    "digests at random": "an equal spec has another one",
    "leaves images out": "with the content of an image: another 0.png has the same digest",
    "loads torch": "loads no torch: it does",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_promise_is_named(folder, broken):
    if broken == "loads torch" and find_spec("torch") is None:
        pytest.skip("torch is not installed")
    with pytest.raises(AssertionError, match=BROKEN[broken]) as caught:
        plugin.check_data(Captions(folder=folder, broken=broken))
    assert "captions breaks" in str(caught.value)


def test_a_digest_of_something_else_does_not_see_the_content_change(folder):
    with pytest.raises(AssertionError, match=r"with the content of an image: another 0\.png has the same digest"):
        plugin.check_data(Captions(folder=folder, broken="digests the path"))


def test_an_implementation_without_rows_is_named(folder):
    with pytest.raises(AssertionError, match=r"its implementation exists and has rows, check: .*Nothing lacks rows"):
        plugin.check_data(WithoutRows(folder=folder))


def test_a_sound_one_keeps_its_contract(folder):
    report = plugin.check_data(Captions(folder=folder))
    assert "content_digest changes with the content of an image" in report.held
    assert "counting and reading rows loads no torch" in report.held and not report.skipped
    assert sorted(path.name for path in Path(folder).iterdir()) == ["0.png", "1.png", "2.png", "3.png", "captions.txt"]


def test_built_in_data_kinds_keep_their_contract(folder):
    report = plugin.check_data({"kind": "easy_vqa", "split": "test", "max_samples": 40})
    assert report.skipped == ("content_digest changes with the content: the spec has no path_fields to change",)
    assert plugin.check_data({"kind": "digit_grid", "num_pictures": 8}).skipped == report.skipped
    conversation = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]
    records = [{"image": f"images/{number}.png", "conversations": conversation} for number in range(4)]
    images = Path(folder) / "images"
    images.mkdir()
    for number in range(4):
        shutil.copy(f"{folder}/{number}.png", images)
    path = Path(folder) / "rows.json"
    path.write_text(json.dumps(records))
    report = plugin.check_data({"kind": "llava_json", "data_path": str(path)})
    for what in ("a file", "an image"):
        assert f"content_digest changes with the content of {what}" in report.held


def test_an_empty_set_proves_nothing(folder):
    (Path(folder) / "captions.txt").write_text("")
    with pytest.raises(AssertionError, match="there are none; check it on data with at least one row"):
        plugin.check_data(Captions(folder=folder))


def test_a_data_kind_needs_its_paths():
    with pytest.raises(plugin.UsageError, match="captions requires folder"):
        plugin.check_data(Captions)
