"""`easy_vqa`: the 5,000 images and 48,248 questions of the PyPI package easy-vqa, with its own train/test split."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

from orchestrator import plugin

SHAPES = frozenset({"circle", "rectangle", "triangle"})
_PARTS = {"train[:90%]": range(3600), "train[90%:]": range(3600, 4000)}
"""Numbers of the images of a part."""


class EasyVqaSpec(plugin.DataSpec):
    """Questions about one coloured shape in a 64x64 image, answered by one word."""

    implementation: ClassVar[str] = "orchestrator_plugins.data.easy_vqa:EasyVqa"

    kind: Literal["easy_vqa"] = "easy_vqa"
    split: Literal["train", "test", "train[:90%]", "train[90%:]"] = "train"
    """The package's own split: 38,575 training and 9,673 test questions, on different images; or the questions
    about the first 90 % of the training images, and about the others, to tune on.
    """
    conversation_template: Literal["chat_template", "vicuna_v1", "plain"] = "chat_template"
    """How a question becomes a prompt: the tokenizer's own `chat_template`, `vicuna_v1` (LLaVA-1.5), or `plain`."""

    def num_rows(self) -> int:
        """Return the questions in use."""
        return len(plugin.evenly_spread(len(_questions(self.split)), self.max_samples))

    def column_names(self) -> tuple[str, ...]:
        """Return none: a row is its question and its answer."""
        return ()

    def content_digest(self) -> str:
        """Return the SHA-256 over the split's questions and image files, and which part of them it is."""
        package_split, *part = self.split.split("[")
        digest = _split_digest(package_split)
        return hashlib.sha256(f"{digest}[{part[0]}".encode()).hexdigest() if part else digest


class EasyVqa:
    """The rows of one split."""

    def __init__(self, spec: EasyVqaSpec) -> None:
        self._spec = spec

    def rows(self) -> Sequence[plugin.Row]:
        """Return one row a question: the image, a line end, the question; the answer is one word."""
        questions = _questions(self._spec.split)
        images = _split_folder(self._spec.split) / "images"
        rows = []
        for index in plugin.evenly_spread(len(questions), self._spec.max_samples):
            question, answer, image = questions[index]
            turns = (plugin.Turn("user", f"{plugin.IMAGE_MARK}\n{question}"), plugin.Turn("assistant", answer))
            rows.append(plugin.Row(index, (plugin.ImageRef(f"{images}/{image}.png"),), turns, answer_type(answer)))
        return rows

    def check(self, every_row: bool = True) -> list[str]:
        """Return the images that the package should have and has not."""
        paths = sorted({image.path for row in self.rows() for image in row.images}) if every_row else []
        return [
            f"{path} is missing; install the package easy-vqa again" for path in paths if not plugin.file_exists(path)
        ]


def answer_type(answer: str) -> str:
    """Return `yes_no`, `shape` or `color`."""
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in SHAPES else "color"


def _split_folder(split: str) -> Path:
    """Return the package's folder of a split, or of the split that it is a part of."""
    package = importlib.util.find_spec("easy_vqa")
    if package is None or not package.submodule_search_locations:
        raise plugin.DataError("easy_vqa: the package easy-vqa is not installed; pip install easy-vqa")
    return Path(next(iter(package.submodule_search_locations))) / "data" / split.partition("[")[0]


@cache
def _questions(split: str) -> list[tuple[str, str, int]]:
    path = _split_folder(split) / "questions.json"
    try:
        questions = [(question, answer, image) for question, answer, image in json.loads(path.read_bytes())]
    except (OSError, ValueError) as error:
        raise plugin.DataError(
            f"easy_vqa: {path} cannot be read: {error}; install the package easy-vqa again"
        ) from error
    return [row for row in questions if split not in _PARTS or row[2] in _PARTS[split]]


@cache
def _split_digest(split: str) -> str:
    folder = _split_folder(split)
    digest = hashlib.sha256((folder / "questions.json").read_bytes())
    for image in sorted((folder / "images").glob("*.png")):
        digest.update(image.name.encode())
        digest.update(hashlib.sha256(image.read_bytes()).digest())
    return digest.hexdigest()
