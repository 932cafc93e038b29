"""Fixtures of tests on data: the tiny model's processor, and conversation files with real images."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from repository import TINY_LLAVA

from orchestrator.spec.model import ModelSpec


@pytest.fixture(scope="session")
def processor():
    from orchestrator.data.processing.processor import load_processor

    return load_processor(ModelSpec(model_name_or_path=str(TINY_LLAVA)))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of six real pictures of several sizes and modes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    sizes = [(64, 64), (90, 30), (20, 70), (64, 64), (33, 33), (128, 64)]
    for number, size in enumerate(sizes):
        mode = ("RGB", "L", "RGBA", "P", "RGB", "1")[number]
        colour = (0, 0, 0, 255) if mode == "RGBA" else number % 2
        Image.new(mode, size, colour).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def conversation_file(tmp_path: Path):
    """Writes records as JSON or JSONL and gives the path."""

    def write(records: list[Any], name: str = "data.json") -> str:
        path = tmp_path / name
        if name.endswith("jsonl"):
            path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
        else:
            path.write_text(json.dumps(records))
        return str(path)

    return write
