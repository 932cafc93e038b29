"""digit_grid: pictures read back and looked up in scikit-learn's own images answer every question as the rows do."""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from orchestrator_plugins.data import digit_grid
from orchestrator_plugins.data.digit_grid import DigitGrid, DigitGridSpec
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits

from orchestrator import plugin
from orchestrator.data.records.row_index import open_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digit_grid._pictures.cache_clear()
    yield
    digit_grid._pictures.cache_clear()


@pytest.fixture(scope="module")
def known():
    """8-bit pixels of an image of scikit-learn -> (its number, the digit it shows)."""
    found = load_digits()
    grey = (found.images * 255 // 16).astype(np.uint8)
    return {image.tobytes(): (number, int(found.target[number])) for number, image in enumerate(grey)}


def cells_of(path: str, size: int, cell: int) -> list[bytes]:
    """Return the 8x8 pixels of each cell, one of every `cell / 8` in both directions."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (size * cell, size * cell)
    times = cell // 8
    assert (pixels == pixels[::times, ::times].repeat(times, 0).repeat(times, 1)).all()
    small = pixels[::times, ::times]
    return [small[r : r + 8, c : c + 8].tobytes() for r in range(0, 8 * size, 8) for c in range(0, 8 * size, 8)]


def answered(question: str, digits: list[int], size: int) -> tuple[str, str]:
    """Answer a question from the digits in the cells; return the answer and the question's type."""
    if found := re.fullmatch(r"What digit is in row (\d+), column (\d+)\?", question):
        row, column = map(int, found.groups())
        return str(digits[(row - 1) * size + column - 1]), "place"
    if found := re.fullmatch(r"How many (\d)s are there\?", question):
        return str(digits.count(int(found[1]))), "count"
    found = re.fullmatch(r"Is there (an?) (\d)\?", question)
    assert found and (found[1] == "an") == (found[2] == "8")
    return ("yes" if int(found[2]) in digits else "no"), "identity"


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("size", "cell"), [(4, 16), (2, 24), (8, 8)])
def test_every_answer_is_what_the_picture_shows(known, split, size, cell):
    spec = DigitGridSpec(split=split, size=size, cell_pixels=cell, num_pictures=20, questions={"count": 2})
    rows = DigitGrid(spec).rows()
    assert len(rows) == spec.num_rows() == 20 * 8 and [row.index for row in rows] == list(range(160))
    for row in rows:
        digits = [known[cell_pixels][1] for cell_pixels in cells_of(row.images[0].path, size, cell)]
        mark, question = row.turns[0].text.split("\n")
        assert mark == "<image>"
        assert (row.turns[1].text, row.answer_type) == answered(question, digits, size)
    assert len({row.turns[0].text for row in rows}) > 20
    assert len({row.images[0].path for row in rows}) == 20


def test_no_digit_image_is_in_both_splits(known):
    seen = {}
    for split in ("train", "test"):
        rows = DigitGrid(DigitGridSpec(split=split, num_pictures=60)).rows()
        paths = {row.images[0].path for row in rows}
        seen[split] = {known[pixels][0] for path in paths for pixels in cells_of(path, 4, 16)}
    assert len(seen["train"]) > 500 and len(seen["test"]) > 200
    assert not seen["train"] & seen["test"]
    of = {split: [n for images in digit_grid.images_of(split) for n in images] for split in ("train", "test")}
    assert (len(of["train"]), len(of["test"])) == (1442, 355)
    assert sorted(of["train"] + of["test"]) == list(range(1797))


def test_answers_of_a_type_are_equally_frequent():
    """So that who does not look gets one in ten, one in five and one in two right."""
    asked = [each for grid in digit_grid._grids(digit_grid._drawn_from(DigitGridSpec())) for each in grid.asked]
    counts = {kind: Counter(answer for _, answer, of in asked if of == kind) for kind in ("place", "count", "identity")}
    assert counts["count"] == {str(number): 1600 for number in range(5)}
    assert counts["identity"] == {"yes": 4000, "no": 4000}
    assert set(counts["place"]) == set("0123456789")
    assert max(counts["place"].values()) < 1.06 * 1600
    # Nor does the digit asked for tell: of each, no answer is much more frequent.
    for digit in range(10):
        about = Counter(answer for text, answer, of in asked if of == "identity" and str(digit) in text)
        assert abs(about["yes"] - about["no"]) < 0.12 * about.total()


def test_types_are_mixed_within_a_picture_and_in_samples():
    """A model learns which type comes first, and every fourth row would be of two types alone."""
    grids = digit_grid._grids(digit_grid._drawn_from(DigitGridSpec()))
    first = Counter(grid.asked[0][2] for grid in grids)
    assert all(abs(first[kind] / 4000 - share) < 0.03 for kind, share in (("place", 0.5), ("count", 0.25)))
    sampled = Counter(row.answer_type for row in DigitGrid(DigitGridSpec(split="test", max_samples=1000)).rows())
    assert all(abs(sampled[kind] / 1000 - share) < 0.06 for kind, share in (("place", 0.5), ("count", 0.25)))


def test_the_same_everywhere():
    spec = DigitGridSpec(num_pictures=30)
    assert spec.content_digest() == "1e4c84e0b44a8e8787d77698a3fdc703c4316a66b3323c2052195d165fc7bec3"
    others = [{"seed": 1}, {"split": "test"}, {"size": 5}, {"cell_pixels": 8}, {"questions": {"place": 5}}]
    changed = {DigitGridSpec(**{"num_pictures": 30, **other}).content_digest() for other in others}
    assert len(changed | {spec.content_digest()}) == 6
    more = DigitGrid(DigitGridSpec(num_pictures=40)).rows()
    assert [row.turns for row in more[:240]] == [row.turns for row in DigitGrid(spec).rows()]


def test_joined_questions_are_one_conversation_with_the_same_answers():
    spec = DigitGridSpec(num_pictures=10)
    apart = DigitGrid(spec).rows()
    joined = DigitGrid(spec.model_copy(update={"join_questions": True})).rows()
    assert len(joined) == spec.model_copy(update={"join_questions": True}).num_rows() == 10
    for number, row in enumerate(joined):
        single = apart[8 * number : 8 * number + 8]
        assert row.images == single[0].images and row.answer_type is None
        texts = [turn.text.removeprefix("<image>\n") for turn in row.turns]
        assert texts == [turn.text.removeprefix("<image>\n") for each in single for turn in each.turns]
        assert sum("<image>" in turn.text for turn in row.turns) == 1


def test_max_samples_draws_only_the_pictures_it_needs(tmp_path):
    spec = DigitGridSpec(split="test", max_samples=12)
    rows = DigitGrid(spec).rows()
    assert len(rows) == spec.num_rows() == 12 and rows[-1].index > 3600
    assert len(list(tmp_path.rglob("*.bmp"))) == len({row.images[0].path for row in rows}) <= 12
    assert len(list(tmp_path.rglob("*.bmp*"))) <= 12  # nothing is left half written


@pytest.mark.parametrize("damage", ["gone", "empty", "another picture"])
def test_a_picture_that_is_not_what_was_drawn_is_drawn_again(damage):
    spec = DigitGridSpec(num_pictures=3)
    content, rows = spec.content_digest(), DigitGrid(spec).rows()
    paths = [Path(path) for path in dict.fromkeys(row.images[0].path for row in rows)]
    wanted = paths[1].read_bytes()
    if damage == "gone":
        paths[1].unlink()
    else:
        paths[1].write_bytes(b"" if damage == "empty" else paths[0].read_bytes())
    digit_grid._pictures.cache_clear()
    assert DigitGrid(spec).check() == [] and paths[1].read_bytes() == wanted
    assert list(open_rows(spec, content)) == list(rows)


def test_without_its_package_it_says_what_to_install(monkeypatch):
    for module in [name for name in sys.modules if name == "sklearn" or name.startswith("sklearn.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(digit_grid.importlib.util, "find_spec", lambda name: None)
    digit_grid.read_digits.cache_clear()
    try:
        with pytest.raises(plugin.DataError, match="pip install scikit-learn"):
            DigitGridSpec(num_pictures=2, seed=9).content_digest()
        assert DigitGridSpec(num_pictures=2, seed=9).num_rows() == 16
    finally:
        digit_grid.read_digits.cache_clear()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"questions": {"place": 0, "count": 0, "identity": 0}}, "at least one question"),
        ({"size": 2, "questions": {"place": 5}}, "at most 4 places"),
        ({"size": 2, "questions": {"count": 3}}, "at most 2 numbers"),
        ({"questions": {"identity": 11}}, "10 digits"),
        ({"cell_pixels": 12}, "multiple of 8"),
    ],
)
def test_what_a_picture_cannot_have_is_refused(values, reason):
    with pytest.raises(ValidationError, match=reason):
        DigitGridSpec.model_validate(values)
