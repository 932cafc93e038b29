"""Cells that are the same work under several names: one run in MLflow, named as the first of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from ledger_work import finish
from rich.console import Console

from orchestrator.plan.experiment_plan import prepare
from orchestrator.run import run_experiment
from orchestrator.tracking.mlflow_state import read_state


def test_the_run_is_named_as_the_first_cell_however_often_it_is_recorded(
    tiny_experiment: Path, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
    tiny_experiment.write_text(tiny_text.replace("matrix:\n", "matrix:\n  compressors.heavy.stride: [8, 4]\n"))
    plan = prepare(tiny_experiment)
    for job in plan.tree.work(plan.ledger):
        finish(plan.ledger, job)
    first, twin = plan.cells[0], plan.cells[3]
    assert first.id == twin.id
    for _ in range(2):
        outcome = run_experiment(plan.loaded, local=True, console=Console(file=io.StringIO()))
        assert outcome.exit_code == 0 and not outcome.unsent and len(outcome.table.rows) == 6
        state = read_state(plan.tracking_uri, plan.experiment_name)
        assert state is not None and len(state.runs.keys() - {"tiny"}) == 5
        run = state.runs[first.id]
        assert run.name == first.name == "stride=8,schedule=full"
        assert run.params["compressors.heavy.stride"] == "8" and run.tags["cell_id"] == first.id
        assert not [tag for tag in run.tags if "stride" in tag]  # what another cell's record would have changed
    assert plan.folder(twin).is_dir()
