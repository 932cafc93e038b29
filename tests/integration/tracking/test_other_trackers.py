"""`tracking.also`: TensorBoard and Weights & Biases have what the ledger has, each point once, whatever happens."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from ledger_work import finish
from repository import ROOT
from rich.console import Console
from wandb_files import run_of

from orchestrator.errors import UsageError
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.run import RunOutcome, run_experiment

CSV = (ROOT / "docs" / "reference" / "metrics.md").read_text().partition("```python\n")[2].partition("```")[0]
NOTING = """
import json
from pathlib import Path
from orchestrator import plugin

class Noting(plugin.Tracker):
    kind = "noting"
    def log(self, record, points):
        if (self.folder / "closed").exists():
            raise OSError("the notebook is closed")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / (record.cell_name + ".jsonl")).open("a") as file:
            file.write(json.dumps([record.status, points]) + "\\n")
"""


@pytest.fixture
def tiny(
    tiny_experiment: Path, tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch, built_in_only: None
) -> Path:
    """The tiny experiment, with a plug-in's tracker beside it, and a storage and an MLflow of its own."""
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "noting.py").write_text(NOTING)
    return tiny_experiment


def planned(tiny: Path, also: str, done: int | None = None) -> ExperimentPlan:
    """The plan with these trackers, after the first `done` jobs of it (all by default)."""
    name = json.dumps("others " + tiny.parent.name)
    plan = prepare(
        tiny, [f"plugins=[{tiny.parent}/noting.py]", f"tracking.also=[{also}]", f"tracking.experiment_name={name}"]
    )
    for job in plan.tree.work(plan.ledger)[:done]:
        finish(plan.ledger, job)
    return plan


def run(plan: ExperimentPlan) -> RunOutcome:
    return run_experiment(plan.loaded, local=True, console=Console(file=io.StringIO()))


def in_storage(plan: ExperimentPlan, kind: str) -> Path:
    (folder,) = (plan.ledger.storage / kind).iterdir()
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def curves(record) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, value, step, _ in record.history:
        found.setdefault(name, []).append((step, value))
    return found


def test_tensorboard_reads_curves_final_values_and_recipe(tiny: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = planned(tiny, "tensorboard")
    assert run(plan).exit_code == 0
    for cell in plan.cells:
        record = plan.record(cell)
        read = EventAccumulator(str(in_storage(plan, "tensorboard") / cell.name)).Reload()
        there = {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}
        for name, points in curves(record).items():
            assert there.pop(name) == [(step, pytest.approx(value)) for step, value in points]
        final = {name: [(record.last_step, pytest.approx(value))] for name, value in record.summary.items()}
        assert {"eval/vqa/accuracy", "cost/train_tflops"} <= final.keys() and there == final
        session = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert session.count(b"finetune.schedule") == 1


def test_wandb_has_a_run_for_each_cell(tiny: Path) -> None:
    plan = planned(tiny, "wandb")
    assert run(plan).exit_code == 0
    folder = in_storage(plan, "wandb")
    for cell in plan.cells:
        record = plan.record(cell)
        (file,) = folder.glob(f"wandb/offline-run-*/run-{cell.id}.wandb")
        read = run_of([file])
        assert (read["id"], read["name"], read["project"]) == (cell.id, cell.name, plan.experiment_name)
        assert read["exit"] == 0 and record.params.items() <= read["config"].items()
        assert {name: read["summary"][name] for name in record.summary} == pytest.approx(record.summary)
        for name, points in curves(record).items():
            assert [(row["optimizer_step"], row[name]) for row in read["history"] if name in row] == points
        times = [point[3] / 1000 for point in record.history if point[0] == "train/loss"]
        assert [row["_timestamp"] for row in read["history"]] == pytest.approx(times)


def test_a_second_run_records_nothing_again(tiny: Path) -> None:
    plan = planned(tiny, "tensorboard, wandb, noting")
    assert run(plan).exit_code == 0
    before = {kind: contents(in_storage(plan, kind)) for kind in ("tensorboard", "wandb", "noting")}
    assert run(plan).exit_code == 0
    assert {kind: contents(in_storage(plan, kind)) for kind in before} == before and all(before.values())


def test_what_fails_is_told_stops_nothing_and_is_made_up_for(tiny: Path) -> None:
    plan = planned(tiny, "noting")
    storage = plan.ledger.storage
    run(prepare(tiny, [f"plugins=[{tiny.parent}/noting.py]"]))  # without it nothing is there
    assert not (storage / "noting").exists()
    assert run(plan).exit_code == 0
    folder = in_storage(plan, "noting")
    kept = contents(folder)
    for file in kept:
        file.unlink()
    (folder / "closed").touch()
    outcome = run(plan)
    assert outcome.exit_code == 0 and not outcome.unsent
    (note,) = [note for note in outcome.tracking_notes if note.startswith("noting has not recorded ")]
    assert note.endswith(": OSError: the notebook is closed") and plan.cells[0].name in note
    (folder / "closed").unlink()
    assert not run(plan).tracking_notes and contents(folder) == kept


def test_the_tracker_of_the_docs_writes_its_tables(tiny: Path) -> None:
    (tiny.parent / "noting.py").write_text(CSV)
    plan = planned(tiny, "csv")
    outcome = run(plan)
    assert outcome.exit_code == 0 and not outcome.tracking_notes
    for cell in plan.cells:
        record, folder = plan.record(cell), in_storage(plan, "csv") / cell.name
        rows = [",".join(map(str, point)) for point in record.history]
        assert (folder / "curves.csv").read_text().splitlines() == rows
        assert len((folder / "final.csv").read_text().splitlines()) == len(record.summary)


def test_each_point_is_handed_over_once_over_sessions_and_turns(tiny: Path) -> None:
    from orchestrator.tracking.protocol import open_trackers

    plan = planned(tiny, "noting", done=0)
    cell = plan.cells[-1]
    (tracker,) = open_trackers(["noting"], "it", plan.ledger.storage)
    turns = 0
    for job in plan.tree.work(plan.ledger):
        finish(plan.ledger, job)
        record = plan.record(cell)
        while not tracker.log_some(record, 7):
            turns += 1
        assert tracker.log_some(record, 7), "nothing is left"
        (tracker,) = open_trackers(["noting"], "it", plan.ledger.storage)
    lines = [json.loads(line) for line in (tracker.folder / f"{cell.name}.jsonl").read_text().splitlines()]
    handed = [tuple(point) for _, points in lines for point in points]
    assert handed == list(record.history) and turns == 2
    assert lines[-1][0] == "finished" and all(len(points) <= 7 for _, points in lines)

    late = ("eval/vqa/accuracy", 0.25, 1, 1001)  # an evaluation along the way comes after later steps
    for _ in range(2):
        assert tracker.log_some(replace(record, along=(late,)), 7)
    *_, (_, points) = map(json.loads, (tracker.folder / f"{cell.name}.jsonl").read_text().splitlines())
    assert [tuple(point) for point in points] == [late]


def test_a_library_that_is_missing_is_told_before_anything_is_trained(tiny: Path) -> None:
    plugin = tiny.parent / "noting.py"
    plugin.write_text(NOTING.replace('kind = "noting"', 'kind = "noting"\n    requires = {"no_such": "no-such[all]"}'))
    plan = planned(tiny, "noting", done=0)
    with pytest.raises(UsageError, match=r"also: noting needs no_such, .*pip install 'no-such\[all\]'"):
        run(plan)
    assert not plan.ledger.is_done(plan.cells[0].state)
