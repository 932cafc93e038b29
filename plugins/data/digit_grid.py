"""`digit_grid`: scikit-learn's 1,797 real handwritten digits, set into grids, with questions of place, count, identity.

Nothing is downloaded: the digits come in the package scikit-learn (Alpaydin and Kaynak, Optical Recognition of
Handwritten Digits, UCI 1998, its test part: 8x8 pixels, 17 grey values). Grids and questions are a pure function of the
spec's fields; the pictures are drawn into the cache.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

from orchestrator_plugins.data.drawn import files_in_cache, random_numbers, reasons
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin

DIGIT_PIXELS = 8
WHITE = 16
TEST_EVERY = 5
"""Of the images of each digit, in the package's order, every fifth is a test image and never in a training grid."""
PICTURES = {"train": 4000, "test": 500}


class QuestionMix(plugin.Spec):
    """Questions about each picture, by type."""

    place: plugin.Whole = 4
    """`What digit is in row 2, column 3?`: a digit; cells of a picture are asked for once."""
    count: plugin.Whole = 2
    """`How many 7s are there?`: from 0 to `size`, each as often as the others."""
    identity: plugin.Whole = 2
    """`Is there a 5?`: yes as often as no."""

    @property
    def total(self) -> int:
        """Number of questions about a picture."""
        return self.place + self.count + self.identity


class DigitGridSpec(plugin.DataSpec):
    """Questions about a square grid of real handwritten digits, answered by one digit or by yes or no."""

    implementation: ClassVar[str] = "orchestrator_plugins.data.digit_grid:DigitGrid"

    kind: Literal["digit_grid"] = "digit_grid"
    split: Literal["train", "test"] = "train"
    """Whose digit images: 1,442 for training, 355 others for testing."""
    size: Annotated[int, Field(ge=2, le=16)] = 4
    """Digits in a row and in a column."""
    cell_pixels: Annotated[int, Field(ge=8, le=128, multiple_of=8)] = 16
    """Side of a cell in pixels, a multiple of the digits' own 8; the picture is `size` times as wide and high."""
    num_pictures: plugin.Count | None = None
    """Pictures of the split; null takes 4,000 for training and 500 for testing."""
    questions: QuestionMix = QuestionMix()
    """How many questions of each type are asked about a picture."""
    join_questions: plugin.Flag = False
    """Whether all questions about a picture are one conversation, as in LLaVA-1.5's data (Liu et al., arXiv 2310.03744,
    appendix A): fewer tokens for as many answers, for training. An evaluation reads the last answer.
    """
    seed: plugin.Whole = 0
    """What digits, cells and questions are drawn from; not the experiment's seed."""
    conversation_template: Literal["chat_template", "vicuna_v1", "plain"] = "chat_template"
    """How a question becomes a prompt: the tokenizer's own `chat_template`, `vicuna_v1` (LLaVA-1.5), or `plain`."""

    @model_validator(mode="after")
    def _fits(self) -> DigitGridSpec:
        mix, cells = self.questions, self.size**2
        if not mix.total:
            raise PydanticCustomError("digit_grid_questions", "a picture has at least one question")
        if mix.place > cells:
            text = "a picture has {cells} cells, each asked for once; ask for at most {cells} places"
            raise PydanticCustomError("digit_grid_questions", text, {"cells": cells})
        most = min(self.size, 8)
        if mix.count > most:
            text = "with size {size} at most {most} numbers can be asked for"
            raise PydanticCustomError("digit_grid_questions", text, {"size": self.size, "most": most})
        if mix.identity > 10:
            raise PydanticCustomError("digit_grid_questions", "there are 10 digits; ask for at most 10 of them")
        return self

    @property
    def pictures(self) -> int:
        """Number of pictures of the split."""
        return self.num_pictures or PICTURES[self.split]

    @property
    def rows_each(self) -> int:
        """Number of rows about a picture."""
        return 1 if self.join_questions else self.questions.total

    def num_rows(self) -> int:
        """Return the rows in use."""
        return len(plugin.evenly_spread(self.pictures * self.rows_each, self.max_samples))

    def column_names(self) -> tuple[str, ...]:
        """Return none: a row is its questions and their answers."""
        return ()

    def content_digest(self) -> str:
        """Return the SHA-256 over the split's questions and pixels."""
        return _content(_drawn_from(self))


class Grid(NamedTuple):
    """One picture and what is asked about it.

    Attributes:
        digits: The digit in each cell, in raster order.
        images: Which of the package's images shows it, likewise.
        asked: `(question, answer, type)` each.
    """

    digits: tuple[int, ...]
    images: tuple[int, ...]
    asked: tuple[tuple[str, str, str], ...]


class DigitGrid:
    """The rows of one split."""

    def __init__(self, spec: DigitGridSpec) -> None:
        self._spec = spec

    def rows(self) -> Sequence[plugin.Row]:
        """Return one row a question, or with `join_questions` one a picture: the image, a line end, the question.

        Raises:
            DataError: scikit-learn is not installed, or the pictures cannot be written to the cache.
        """
        spec, made = self._spec, _drawn_from(self._spec)
        used = plugin.evenly_spread(spec.pictures * spec.rows_each, spec.max_samples)
        paths = _pictures(made, tuple(dict.fromkeys(index // spec.rows_each for index in used)))
        rows, grids = [], _grids(made)
        for index in used:
            picture, turn = divmod(index, spec.rows_each)
            asked = grids[picture].asked if spec.join_questions else grids[picture].asked[turn : turn + 1]
            turns = [
                part
                for question, answer, _ in asked
                for part in (plugin.Turn("user", question), plugin.Turn("assistant", answer))
            ]
            turns[0] = plugin.Turn("user", f"{plugin.IMAGE_MARK}\n{turns[0].text}")
            sort = None if spec.join_questions else asked[0][2]
            rows.append(plugin.Row(index, (plugin.ImageRef(paths[picture]),), tuple(turns), sort))
        return rows

    def check(self, every_row: bool = True) -> list[str]:
        """Return why the rows cannot be had, if they cannot."""
        return reasons(self)


@dataclass(frozen=True)
class _Made:
    """What grids are a function of: every field of the spec that they depend on."""

    split: str
    size: int
    cell_pixels: int
    pictures: int
    place: int
    count: int
    identity: int
    seed: int


def _drawn_from(spec: DigitGridSpec) -> _Made:
    mix = spec.questions
    shape = spec.split, spec.size, spec.cell_pixels, spec.pictures
    return _Made(*shape, mix.place, mix.count, mix.identity, spec.seed)


class Digits(NamedTuple):
    """The package's images, in its order.

    Attributes:
        images: 64 grey values each, 0 to 16, in raster order.
        shown: The digit that each shows.
    """

    images: tuple[bytes, ...]
    shown: tuple[int, ...]


@cache
def read_digits() -> Digits:
    """Return the package's images, read from its file: `sklearn.datasets.load_digits` takes seconds to import.

    Raises:
        DataError: scikit-learn is not installed, or its file is not what it was.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise plugin.DataError("digit_grid: the package scikit-learn is not installed; pip install scikit-learn")
    path = Path(next(iter(package.submodule_search_locations))) / "datasets" / "data" / "digits.csv.gz"
    images: list[bytes] = []
    shown: list[int] = []
    try:
        with gzip.open(path, "rt") as file:
            for line in file:
                *values, digit = map(int, line.split(","))
                if len(values) != DIGIT_PIXELS**2 or max(values) > WHITE or not 0 <= digit <= 9:
                    raise ValueError(f"line {len(images) + 1} is no digit of 8x8 values from 0 to {WHITE}")
                images.append(bytes(values))
                shown.append(digit)
    except (OSError, EOFError, ValueError) as error:
        raise plugin.DataError(
            f"digit_grid: {path} cannot be read: {error}; install the package scikit-learn again"
        ) from error
    return Digits(tuple(images), tuple(shown))


def images_of(split: str) -> list[list[int]]:
    """Return, for each digit, which of the package's images a split draws from."""
    found: list[list[int]] = []
    for digit in range(10):
        of_digit = [number for number, shown in enumerate(read_digits().shown) if shown == digit]
        test = of_digit[TEST_EVERY - 1 :: TEST_EVERY]
        found.append(test if split == "test" else [number for number in of_digit if number not in test])
    return found


class _Draws:
    """Random choices for a purpose.

    Args:
        count: How many there are at most.
        purpose: What they are drawn for.
    """

    def __init__(self, count: int, *purpose: object) -> None:
        self._numbers = random_numbers(count, *purpose)

    def one_of(self, values: Sequence[int]) -> int:
        """Return one of these values."""
        return values[next(self._numbers) % len(values)]

    def shuffled(self, values: Sequence[int]) -> list[int]:
        """Return these values in a random order."""
        return [value for _, value in sorted((next(self._numbers), value) for value in values)]


@lru_cache(maxsize=8)
def _grids(made: _Made) -> tuple[Grid, ...]:
    pools = images_of(made.split)
    return tuple(_grid(made, number, pools) for number in range(made.pictures))


def _grid(made: _Made, number: int, pools: Sequence[Sequence[int]]) -> Grid:
    """Return a picture: how often the counted digits are in it is drawn first, other cells are filled with the rest.

    One digit is in no cell, so that there is always one to ask for in vain.
    """
    cells = made.size**2
    draws = _Draws(5 * cells + 40, "digit_grid", made.split, made.size, made.seed, number)
    names = draws.shuffled(range(10))
    counted, rest = names[: made.count], names[made.count : 9]
    # Numbers and answers go round, picture by picture, so that each is as frequent as the others.
    wanted = [(number * made.count + turn) % (made.size + 1) for turn in range(made.count)]
    digits = [digit for digit, times in zip(counted, wanted, strict=True) for _ in range(times)]
    digits += [draws.one_of(rest) for _ in range(cells - len(digits))]
    digits = draws.shuffled(digits)
    images = [draws.one_of(pools[digit]) for digit in digits]
    order, asked = draws.shuffled(range(10)), []
    present, absent = [d for d in order if d in digits], [d for d in order if d not in digits]
    for turn in range(made.identity):
        yes = (number * made.identity + turn) % 2 == 0
        # Where a picture has no more digits of one sort, the other is asked for; each digit once.
        digit = ((present or absent) if yes else (absent or present)).pop()
        answer = "yes" if digit in digits else "no"
        asked.append((f"Is there {'an' if digit == 8 else 'a'} {digit}?", answer, "identity"))
    for digit, times in zip(counted, wanted, strict=True):
        asked.append((f"How many {digit}s are there?", str(times), "count"))
    for cell in draws.shuffled(range(cells))[: made.place]:
        row, column = divmod(cell, made.size)
        asked.append((f"What digit is in row {row + 1}, column {column + 1}?", str(digits[cell]), "place"))
    # Mixed, so that neither a place in a joined conversation nor every n-th row goes with one type.
    return Grid(tuple(digits), tuple(images), tuple(asked[turn] for turn in draws.shuffled(range(len(asked)))))


@cache
def _wide_lines(times: int) -> list[list[bytes]]:
    """Return the 8 lines of each of the package's images, 8-bit grey, every pixel `times` as wide."""
    table = bytes(value * 255 // WHITE if value <= WHITE else 255 for value in range(256))
    lines = []
    for image in read_digits().images:
        wide = bytes(value for value in image.translate(table) for _ in range(times))
        each = DIGIT_PIXELS * times
        lines.append([wide[first : first + each] for first in range(0, len(wide), each)])
    return lines


def pixels_of(grid: Grid, size: int, cell_pixels: int) -> bytes:
    """Return a picture, 8-bit grey in raster order, white on black; the pixels of a digit are repeated."""
    times = cell_pixels // DIGIT_PIXELS
    lines, picture = _wide_lines(times), []
    for first in range(0, len(grid.images), size):
        cells = [lines[number] for number in grid.images[first : first + size]]
        picture += [b"".join(line) * times for line in zip(*cells, strict=True)]
    return b"".join(picture)


@lru_cache(maxsize=8)
def _content(made: _Made) -> str:
    content = sha256()
    for grid in _grids(made):
        content.update(pixels_of(grid, made.size, made.cell_pixels))
        content.update(repr(grid.asked).encode())
    return content.hexdigest()


@lru_cache(maxsize=8)
def _pictures(made: _Made, numbers: tuple[int, ...]) -> dict[int, str]:
    """Return the paths of some pictures in the cache; what is missing or damaged there is written again."""
    grids = _grids(made)

    def write(path: Path, number: int) -> None:
        _write(path, _bitmap(pixels_of(grids[number], made.size, made.cell_pixels), made.size * made.cell_pixels))

    return files_in_cache("digit_grid", _content(made), numbers, ".bmp", "its pictures", write)


def _bitmap(pixels: bytes, side: int) -> bytes:
    from PIL import Image  # late: planning draws no picture

    data = io.BytesIO()
    Image.frombytes("L", (side, side), pixels).save(
        data, "BMP"
    )  # without compression: its bytes depend on the pixels alone
    return data.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Write a file whole, unless it holds this already: several processes may draw the same pictures."""
    try:
        if path.read_bytes() == data:
            return
    except FileNotFoundError:
        pass
    aside = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    aside.write_bytes(data)
    aside.replace(path)
