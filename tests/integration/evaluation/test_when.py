"""Evaluations added to a finished grid, along the way, and without phases: what is trained does not change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from program import run_forked

import orchestrator as llv

SWEEP = "{kind: [average_pool, fastv], layer: [1, 2], keep_tokens: 4}"
PLAIN = "  vqa: {kind: exact_match, data: test, max_new_tokens: 3}\n"
MORE = f"""\
  vqa: {{kind: exact_match, data: test, max_new_tokens: 3, at: stage_ends}}
  steps: {{kind: exact_match, data: test, max_new_tokens: 2, under: full, at: {{every_steps: 2}}}}
  redundancy: {{kind: exact_match, data: test, max_new_tokens: 2, under: {SWEEP},
               cells: {{phases.finetune.schedule: heavy}}}}
"""


@pytest.fixture(scope="module")
def text(tiny_text: str) -> str:
    """Two cells, `heavy` and `two_stage`, one evaluation of each."""
    old = "  vqa: {kind: exact_match, data: test, under: [final, full]}\n"
    assert old in tiny_text and "[full, heavy, two_stage]" in tiny_text
    return tiny_text.replace(old, PLAIN).replace("[full, heavy, two_stage]", "[heavy, two_stage]")


def call(folder: Path, *arguments: str) -> str:
    done = run_forked(arguments, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def plain(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid, trained and tested at its end."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "tiny.yaml").write_text(text)
    call(folder, "run", "tiny.yaml", "--local")
    return folder


@pytest.fixture(scope="module")
def along(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid, trained with evaluations along the way."""
    folder = tmp_path_factory.mktemp("along")
    (folder / "tiny.yaml").write_text(text.replace(PLAIN, MORE))
    call(folder, "run", "tiny.yaml", "--local")
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    files = (folder / "runs" / "cells" / "tiny").glob("*/weights/model.safetensors")
    return {file.parent.parent.name: file.read_bytes() for file in files}


def curves(folder: Path) -> dict[str, dict[str, dict[int, float]]]:
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    found = {}
    for run in client.search_runs([client.get_experiment_by_name("tiny").experiment_id], "tags.cell_id != ''"):
        names = [name for name in run.data.metrics if name.startswith("eval/")]
        points = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        assert all(len(each) == len({point.step for point in each}) for each in points.values())
        found[run.info.run_name] = {name: {p.step: p.value for p in each} for name, each in points.items()}
    return found


def test_an_evaluation_along_the_way_changes_no_bit_of_training(plain: Path, along: Path) -> None:
    assert len(weights(plain)) == 2 and weights(plain) == weights(along)


def test_curves_are_over_optimizer_steps_and_the_table_shows_the_end(along: Path) -> None:
    found = curves(along)
    steps = {cell: {name: sorted(points) for name, points in each.items()} for cell, each in found.items()}
    sweep = {f"eval/redundancy/under_{kind}_layer{layer}_keep_tokens4/accuracy" for kind in ("average_pool", "fastv")
             for layer in (1, 2)}  # fmt: skip
    assert steps["schedule=heavy"]["eval/vqa/accuracy"] == [5], "its only stage ends with it"
    assert steps["schedule=two_stage"]["eval/vqa/accuracy"] == [2, 5]
    assert sweep <= steps["schedule=heavy"].keys() and not sweep & steps["schedule=two_stage"].keys()
    for cell in steps:
        assert steps[cell]["eval/steps/under_full/accuracy"] == [1, 3, 5]
    table = json.loads(llv.table([llv.load(along / "tiny.yaml", [f"cluster.storage_path={along / 'runs'}"])]).to_json())
    for row in table["rows"]:
        assert (
            row["metrics"]["eval/steps/under_full/accuracy"] == found[row["name"]]["eval/steps/under_full/accuracy"][5]
        )


def test_what_is_added_to_a_finished_grid_runs_alone_into_the_same_runs(plain: Path, text: str) -> None:
    before = curves(plain)
    trained = sorted(path.name for path in (plain / "runs" / "stage_runs").iterdir())
    changed = text.replace(PLAIN, MORE).replace("[heavy, two_stage]", "[heavy, two_stage, full]")
    (plain / "more.yaml").write_text(changed)
    plan = llv.load(plain / "more.yaml", [f"cluster.storage_path={plain / 'runs'}"]).plan()
    heavy = next(cell for cell in plan["cells"] if "heavy" in cell["name"])
    assert "leaves finished work at step 4, not stored: 3 steps again" in heavy["reason"]
    assert "2 evaluations along the way are missing (steps)" in heavy["reason"]
    done = run_forked(["evaluate", "more.yaml", "--local"], plain)
    told = done.stdout + done.stderr
    assert done.returncode == 1, "two states are not there to be tested"
    assert "not trained yet, and left out: schedule=full;" in told
    assert "states to be tested were not kept: schedule=heavy, schedule=two_stage;" in told
    assert sorted(path.name for path in (plain / "runs" / "stage_runs").iterdir()) == trained, "nothing is trained"
    after = curves(plain)
    assert after.keys() == before.keys() and sorted(after["schedule=two_stage"]["eval/vqa/accuracy"]) == [2, 5]
    assert sum(name.endswith("/accuracy") for name in after["schedule=heavy"]) == 1 + 4 + 1
    for cell, points in before.items():
        assert after[cell]["eval/vqa/accuracy"].items() >= points["eval/vqa/accuracy"].items()
    again = run_forked(["evaluate", "more.yaml", "--cell", "schedule=full", "--local"], plain)
    assert again.returncode == 2 and "cell schedule=full is not trained yet" in again.stderr


@pytest.mark.slow
def test_without_phases_a_model_is_evaluated_as_it_comes(tmp_path: Path, text: str) -> None:
    head = text[: text.index("schedules:")]
    evaluate = f"  as_it_comes: {{kind: exact_match, data: test, max_new_tokens: 2, under: [final, {SWEEP}]}}\n"
    (tmp_path / "tiny.yaml").write_text(f"{head}phases: {{}}\nevaluate:\n{evaluate}")
    told = call(tmp_path, "evaluate", "tiny.yaml", "--local")
    assert "left out" not in told
    (scores,) = curves(tmp_path).values()
    assert len([name for name in scores if name.endswith("/accuracy")]) == 5
    assert scores["eval/as_it_comes/accuracy"].keys() == {0}
