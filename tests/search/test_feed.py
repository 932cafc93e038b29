"""The feed of a search alone: every trial is answered, whatever becomes of what it stands on."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.trials import Trial, TrialNotes
from orchestrator.search.feed import SearchFeed
from orchestrator.search.tuning import Proposer


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


@pytest.fixture
def begun(search_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SearchFeed, Desk, list[Trial]]:
    """A search with one trial under way."""
    monkeypatch.chdir(tmp_path)
    walk, ended = prepare(search_file), []
    feed = SearchFeed(walk, TrialNotes(walk.ledger.store, "s"), lambda _: None, lambda _: None, ended.append)
    desk = Desk(walk)
    feed.begin(desk)
    return feed, desk, ended


def event(kind: str, name: str, error: str, cause: str) -> dict:
    return {"event": kind, "id": name, "type": "stage", "attempt": 1, "error": error, "kind": cause}


def test_a_trial_whose_stage_run_is_skipped_has_failed(begun):
    feed, desk, ended = begun
    work = feed.work()
    assert work and not desk.answers
    feed.heard(event("failed", "a-rehearsal", "its worker died", "LostWorker"))
    assert feed.work() is None and not desk.answers
    feed.heard(event("skipped", feed.walk.tree.path_of[feed.walk.cells[0].id][-1], "not run: what it needs", "Skipped"))
    feed.work()
    assert desk.answers == {0: {"failed": "not run: what it needs"}}
    assert [trial.state for trial in ended] == ["failed"]


def test_a_storage_that_cannot_be_written_is_no_trials_fault_and_ends_the_search(begun):
    feed, desk, ended = begun
    work = feed.work()
    assert work
    feed.heard(event("failed", work[0].id, "no space left", "StorageError"))
    feed.heard(event("skipped", work[1].id, "not run", "Skipped"))
    feed.work()
    assert feed.broken == "no space left" and not desk.answers and not ended
