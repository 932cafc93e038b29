"""Cells that share their beginnings end as if each were trained alone, and a changed grid runs only what is new."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bench_tree import Grove, compare, dispatch, groves_of, outcome_of
from training_workers import launch

from orchestrator.plan.experiment_plan import ExperimentPlan, prepare

CELLS = 8
STAGE_RUNS = 2 + 4 + 8
GRID = """
  light: {kind: average_pool, layer: 2, stride: 2}
  random: {kind: random_drop, layer: 1, keep_tokens: 16}
schedules:
  three: {kind: stages, stages: [{share: 1/3, compressor: heavy}, {share: 1/3, compressor: heavy}, {}]}
"""
AXES = """
  schedules.three.stages.0.compressor: [heavy, random]
  schedules.three.stages.1.compressor: [heavy, full]
  schedules.three.stages.2.compressor: [full, random]
"""


def write_grid(folder: Path, tiny_text: str) -> Path:
    """The tiny experiment with two variants in each of three stages; one of them draws at random."""
    before, rest = tiny_text.split("schedules:")
    phases = rest[rest.index("phases:") :].replace("data: train\n", "data: train\n    schedule: three\n")
    path = folder / "grid.yaml"
    path.write_text(
        before.rstrip() + GRID + phases[: phases.index("matrix:")]
        + f"cluster: {{storage_path: {folder / 'runs'}}}\nmatrix:{AXES}"
    )  # fmt: skip
    return path


def finish(path: Path, shared: bool = True) -> list[str]:
    """Does all that is missing, as one tree or every cell alone; returns the jobs that were begun, in order."""
    return launch(1, finish_here, path, shared)


def finish_here(path: Path, shared: bool) -> list[str]:
    walk = prepare(path)
    groves = groves_of(walk, shared)
    return [job for evaluations in (False, True) for job in dispatch(walk, groves, evaluations, local=True)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> ExperimentPlan:
    """Eight cells, trained and tested as one tree."""
    path = write_grid(tmp_path_factory.mktemp("tree"), tiny_text)
    begun = finish(path)
    walk = prepare(path)
    assert len(begun) == len(set(begun)) == 1 + STAGE_RUNS + len(walk.tree.evaluations)
    return walk


def copied(walk: ExperimentPlan, folder: Path, old: str, new: str) -> ExperimentPlan:
    """The same experiment and storage in another folder, with one text replaced in the file."""
    source = Path(walk.loaded.path).parent
    shutil.copytree(source, folder, dirs_exist_ok=True, symlinks=True)
    text = (folder / "grid.yaml").read_text().replace(str(source), str(folder))
    assert old in text
    (folder / "grid.yaml").write_text(text.replace(old, new))
    return prepare(folder / "grid.yaml")


def written(walk: ExperimentPlan) -> dict[str, tuple[int, int]]:
    """Each sealed state's manifest: its inode and when it was written."""
    found = walk.ledger.storage.glob("stage_runs/*/manifest.json")
    return {path.parent.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_every_cell_of_a_tree_is_the_cell_trained_alone_bit_by_bit(
    tree: ExperimentPlan, tmp_path: Path, tiny_text: str
) -> None:
    path = write_grid(tmp_path, tiny_text)
    begun = finish(path, shared=False)
    groves = groves_of(prepare(path), shared=False)
    assert len([job for job in begun if job.partition("-")[2] in tree.tree.stage_runs]) > STAGE_RUNS
    shared = Grove("", tree.tree, tree.ledger)
    equal = compare(tree.cells, shared, groves)
    assert equal == dict.fromkeys(("cells", "curves", "weights", "evaluations"), CELLS)
    assert len({outcome_of(cell, shared)["weights"] for cell in tree.cells}) == CELLS  # none is equal by accident


@pytest.mark.slow
def test_one_changed_axis_value_runs_only_the_new_stage_runs(tree: ExperimentPlan, tmp_path: Path) -> None:
    changed = copied(
        tree, tmp_path / "changed", "stages.2.compressor: [full, random]", "stages.2.compressor: [full, light]"
    )
    before = written(changed)
    new = [state for state in changed.tree.stage_runs if state not in tree.tree.stage_runs]
    assert len(new) == 4
    begun = finish(changed.loaded.path)
    assert [job for job in begun if job in changed.tree.stage_runs] == new
    tests = {job.id for state in new for job in changed.tree.evaluations_of[state]}
    assert set(begun) == {*new, *tests}
    after = written(changed)
    assert {state: after[state] for state in before} == before and after.keys() - before.keys() == set(new)


@pytest.mark.slow
def test_an_added_evaluation_runs_alone(tree: ExperimentPlan, tmp_path: Path) -> None:
    more = copied(tree, tmp_path / "more", "under: [final, full]", "under: [final, full, light]")
    before = written(more)
    begun = finish(more.loaded.path)
    assert len(begun) == CELLS and set(begun) <= more.tree.evaluations.keys() - tree.tree.evaluations.keys()
    assert written(more) == before


def test_a_finished_grid_leaves_nothing_to_do(tree: ExperimentPlan) -> None:
    assert prepare(tree.loaded.path).tree.work(tree.ledger) == []
