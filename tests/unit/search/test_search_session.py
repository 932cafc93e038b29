"""The session of a search alone: every trial is answered, whatever becomes of what it stands on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from rich.console import Console

from orchestrator import run
from orchestrator.errors import TrackingError
from orchestrator.plan import trials
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.experiment_plan import ExperimentPlan, plan_trials, prepare
from orchestrator.plan.trials import TrialNotes
from orchestrator.search.search import SearchSession
from orchestrator.search.tuning import Proposer
from orchestrator.tracking.upload_queue import UploadQueue


class Desk:
    """Proposes one trial, as Tune's side does, and keeps its answer."""

    ended = False

    def __init__(self, walk: ExperimentPlan) -> None:
        drawn = Proposer(walk.loaded.spec, (), None).suggest("first")
        self.new = [{key: drawn[key] for key in ("number", "params", "values")}]
        self.answers: dict[int, dict] = {}

    def take(self) -> list[dict]:
        new, self.new = self.new, []
        return new

    def answer(self, number: int, answer: dict) -> None:
        self.answers[number] = answer

    def stop(self) -> None:
        self.ended = True


def tracking_is_away() -> NoReturn:
    raise TrackingError("no server answers")


@pytest.fixture
def begun(search_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SearchSession, Desk]]:
    """A search with one trial under way."""
    monkeypatch.chdir(tmp_path)
    walk = prepare(search_file)
    session = SearchSession(walk, TrialNotes(walk.ledger.store, "s"), Console(quiet=True))
    desk = Desk(walk)
    session.begin(desk)
    with UploadQueue(tracking_is_away) as session._recorder:
        yield session, desk


def event(kind: str, name: str, error: str, cause: str) -> dict:
    return {"event": kind, "id": name, "type": "stage", "attempt": 1, "error": error, "kind": cause}


def test_a_trial_whose_stage_run_is_skipped_has_failed(begun):
    session, desk = begun
    work = session.newer_work()
    assert work and not desk.answers
    session.on_event(event("failed", "a-rehearsal", "its worker died", "LostWorker"))
    assert session.newer_work() is None and not desk.answers
    session.on_event(
        event("skipped", session.walk.tree.path_of[session.walk.cells[0].id][-1], "not run: what it needs", "Skipped")
    )
    session.newer_work()
    assert desk.answers == {0: {"failed": "not run: what it needs"}}
    assert [trial.state for trial in session.walk.trials] == ["failed"]


def test_a_storage_that_cannot_be_written_is_no_trials_fault_and_ends_the_search(begun):
    session, desk = begun
    work = session.newer_work()
    assert work
    session.on_event(event("failed", work[0].id, "no space left", "StorageError"))
    session.on_event(event("skipped", work[1].id, "not run", "Skipped"))
    session.newer_work()
    assert session.broken == "no space left" and not desk.answers


def test_a_record_of_an_earlier_front_that_is_on_its_way_is_not_the_last(begun, monkeypatch):
    """MLflow was read before it came, and said what the present front says."""
    session, _ = begun
    session.newer_work()
    cell = session.walk.cells[0]
    monkeypatch.setattr(ExperimentPlan, "record", lambda _, each: CellRecord(each.id, each.name, "finished"))
    monkeypatch.setattr(run, "write_cell_folder", lambda *_: None)
    monkeypatch.setattr(run, "read_state", lambda *_: SimpleNamespace(runs={cell.id: "as it should be"}))
    monkeypatch.setattr(run, "has_record", lambda known, _: known == "as it should be")
    monkeypatch.setattr(run, "abandoned", lambda *_: [])
    queued: list[str] = []
    monkeypatch.setattr(session, "_queue", lambda cells: queued.extend(each.id for each in cells))
    session._record_all()
    assert queued == []
    session._recorder.put(cell.id, lambda: CellRecord(cell.id, cell.name, "finished"))  # never sent: there is no server
    session._record_all()
    assert queued == [cell.id]


def test_what_is_not_proposed_yet_is_counted_by_the_number_of_trials(begun):
    session, _ = begun
    session._num_trials = 4
    session.newer_work()
    assert session.work_to_come() == 3
    assert 0 < session.view._progress._to_come == 3


def test_what_was_planned_is_not_expanded_again_and_planned_alike(begun, monkeypatch):
    session, desk = begun
    proposer = Proposer(session.walk.loaded.spec, (), None)
    desk.new = [proposer.suggest(str(number)) for number in range(5)]
    desk.new = [{key: one[key] for key in ("number", "params", "values")} for one in desk.new]
    expanded: list[str] = []
    whole = trials.trial_cells
    monkeypatch.setattr(trials, "trial_cells", lambda *given: (expanded.append(given[1]), whole(*given))[1])
    session.newer_work()
    assert expanded == [f"trial-{number:03d}" for number in range(5)]
    anew = plan_trials(session.walk.loaded, session.walk.ledger, session.walk.trials)
    assert (anew.cells, anew.tree, anew.trials) == (session.walk.cells, session.walk.tree, session.walk.trials)


def test_a_checkpoint_is_sized_by_the_model_before_there_are_cells(
    begun: tuple[SearchSession, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks wait by it for one that moves a checkpoint; a model of unknown sizes counts as ten billion weights."""
    session, _ = begun
    assert session.checkpoint_bytes() == 16 * 205_952  # the formula leaves out norms and biases
    monkeypatch.setattr("orchestrator.run.model_facts", lambda *_: None)
    assert session.checkpoint_bytes() == 16e10
