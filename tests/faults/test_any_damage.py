"""A ledger in which any one file was changed shows what was measured or nothing, and the next run mends it."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

import orchestrator as llv
from orchestrator.errors import LlavoltaError

SHOWN = ("result.json", "metrics.jsonl", "job.json", "manifest.json")
"""What figures are read from in a stage run's folder; its weights are read to the last byte when they are used."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> tuple[Path, Path]:
    """A finished grid's file and a copy of its storage, which lies beside the file."""
    folder = tmp_path_factory.mktemp("damage")
    text = tiny_text.replace("[full, heavy, two_stage]", "[full, two_stage]").replace("max_steps: 6", "max_steps: 2")
    file = folder / "tiny.yaml"
    file.write_text(
        f"{text}\ncluster: {{storage_path: {folder}/runs}}\ntracking: {{tracking_uri: sqlite:///{folder}/m.db}}\n"
    )
    assert run(file) == 0
    shutil.copytree(folder / "runs", folder / "whole", symlinks=True)
    return file, folder / "whole"


def run(file: Path) -> int:
    return llv.load(file).run(local=True, console=Console(quiet=True)).exit_code


Figures = tuple[dict[tuple[str, str], float], set[tuple[object, ...]]]


def shown(file: Path) -> Figures:
    """Every figure of every cell, by cell and name, and every point of its curves."""
    cells = llv.load(file).cells
    figures = {(cell.name, name): value for cell in cells for name, value in cell.metrics.items()}
    return figures, {(cell.name, *point) for cell in cells for point in (*cell.record.history, *cell.record.along)}


def cut(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path, _: Path) -> None:
    path.unlink()


def flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def other_digits(path: Path, _: Path) -> None:
    """Every digit of every number becomes another: the file stays as long, and JSON where it was."""
    text = path.read_text(errors="surrogateescape")
    changed = re.sub(r"(?<=[ .:\d])\d(?=[\d.,\n}])", lambda found: str(int(found[0]) % 8 + 1), text)
    path.write_text(changed, errors="surrogateescape")


def swap(path: Path, sibling: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(sibling.read_bytes())
    sibling.write_bytes(data)


DAMAGES: tuple[Callable[[Path, Path], None], ...] = (cut, empty, remove, flip, other_digits, swap)


def places(storage: Path) -> Iterator[tuple[Path, Path]]:
    """Each file that figures come from, and another of its kind."""
    for kind in ("evaluations/*.json", *(f"stage_runs/*/{name}" for name in SHOWN)):
        files = sorted(storage.glob(kind))
        assert len(files) > 1, kind
        yield from zip(files, [*files[1:], files[0]], strict=True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_shown_was_measured(finished: tuple[Path, Path], damage: Callable[[Path, Path], None]) -> None:
    file, whole = finished
    storage = file.parent / "runs"
    figures, points = shown(file)
    assert any("accuracy" in name for _, name in figures) and points
    for path, sibling in places(storage):
        damage(path, sibling)
        with contextlib.suppress(LlavoltaError):
            now, left = shown(file)
            wrong = {name: value for name, value in now.items() if value != figures.get(name)}
            assert not wrong and left <= points, path.relative_to(storage)
        shutil.rmtree(storage)
        shutil.copytree(whole, storage, symlinks=True)


def test_the_next_run_mends_it(finished: tuple[Path, Path]) -> None:
    """One file of each kind with other digits: what a cell still needs is done again, and its scores are the same.

    Of a stage run whose successors are finished only the costs are missing then: its cells are not trained again.
    """
    file, _ = finished
    right = repeatable(shown(file))
    for path, sibling in {
        path.name if path.parent.name != "evaluations" else "evaluation": (path, sibling)
        for path, sibling in places(file.parent / "runs")
    }.values():
        other_digits(path, sibling)
    assert run(file) == 0
    now = repeatable(shown(file))
    assert now.items() <= right.items()
    assert [name for name in right if name not in now and not name[1].startswith("cost/")] == []


def repeatable(found: Figures) -> dict[tuple[str, str], float]:
    """The figures that are the same in a second run: no times."""
    return {name: value for name, value in found[0].items() if not re.search("seconds|memory|per_second", name[1])}
