"""What trials add to the tree, and the search that stops before one would exceed its budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.errors import UsageError
from orchestrator.plan.documents import plan_document
from orchestrator.plan.experiment_plan import ExperimentPlan, plan_trials, prepare
from orchestrator.plan.trials import TrialNotes
from orchestrator.search.budget import most_trials
from orchestrator.search.search import SearchSession
from orchestrator.search.tuning import Proposer

TRIALS = 12


class Desk:
    """Tune's side with trials that wait side by side: it proposes, whatever becomes of them, until it is stopped."""

    def __init__(self, walk: ExperimentPlan, at_once: int) -> None:
        self.proposer = Proposer(walk.loaded.spec, walk.trials, None)
        self.at_once, self.left, self.refused = at_once, TRIALS, []
        self.ended = False

    def take(self) -> list[dict]:
        some = [] if self.ended else [self.proposer.suggest(str(self.left - i)) for i in range(self.at_once)]
        self.left -= len(some)
        return [{key: one[key] for key in ("number", "params", "values")} for one in some]

    def answer(self, number: int, answer: dict) -> None:
        self.refused.append(number)

    def stop(self) -> None:
        self.ended = True


@pytest.fixture
def new_session(search_file: Path, search_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a session of the search with further lines, as a driver that starts does."""
    monkeypatch.chdir(tmp_path)

    def make(lines: str = "", at_once: int = 1) -> tuple[SearchSession, Desk]:
        search_file.write_text(search_text.replace("num_trials: 4", f"num_trials: {TRIALS}") + lines)
        walk = prepare(search_file)
        notes = TrialNotes(walk.ledger.store, "s")
        walk = plan_trials(walk.loaded, walk.ledger, notes.read())
        session, desk = SearchSession(walk, notes, Console(quiet=True)), Desk(walk, at_once)
        session.begin(desk)
        return session, desk

    return make


def propose(session: SearchSession, desk: Desk) -> None:
    while desk.left > 0 and not desk.ended:
        session.newer_work()


def added(session: SearchSession) -> list[float]:
    return [trial.added_train_tflops for trial in session.walk.trials]


def shared_tflops(walk: ExperimentPlan) -> float:
    document = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger)
    return document["totals"]["train_tflops_shared"]


def test_what_trials_add_is_what_their_tree_costs(new_session):
    session, desk = new_session()
    propose(session, desk)
    found = added(session)
    assert len(found) == TRIALS and sum(found) == pytest.approx(shared_tflops(session.walk))
    alone = plan_document(session.walk.loaded, session.walk.cells, session.walk.tree, session.walk.ledger)
    costs = [cell["cost"]["train_tflops"] for cell in alone["cells"]]
    assert found[0] == pytest.approx(costs[0])
    assert all(one <= cost * (1 + 1e-9) for one, cost in zip(found, costs, strict=True)) and sum(found) < sum(costs)
    assert [trial.added_train_tflops for trial in session._notes.read()] == found


def test_a_beginning_that_is_under_way_in_one_piece_is_trained_again_and_counted(new_session):
    session, desk = new_session()
    propose(session, desk)
    begun, cut = session.walk, None
    for count in range(1, TRIALS):  # a trial that cuts a stage run of those before it
        earlier = plan_trials(begun.loaded, begun.ledger, begun.trials[:count])
        later = plan_trials(begun.loaded, begun.ledger, begun.trials[: count + 1])
        runs = earlier.tree.stage_runs
        cuts = (job for job in later.tree.stage_runs.values() if job.id in runs)
        cut = next((job for job in cuts if runs[job.id].first_step < job.first_step), None)
        if cut is not None:
            break
    assert cut is not None
    trial = later.trials[count]
    free = session._budget.priced(trial, earlier, later).added_train_tflops
    (earlier.ledger.storage / "work" / cut.id).mkdir(parents=True)
    (earlier.ledger.storage / "work" / cut.id / "log.txt").write_text("begun\n")
    assert earlier.ledger.is_begun(cut.id)
    again = session._budget.priced(trial, earlier, later).added_train_tflops
    beginning = later.tree.stage_runs[cut.parent]
    costs = {
        run["id"]: run["cost"]["train_tflops"]
        for run in plan_document(later.loaded, later.cells, later.tree, later.ledger)["stage_runs"]
    }
    assert again - free == pytest.approx(costs[beginning.id])


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_search_stops_before_the_trial_that_would_exceed_it(at_once, new_session):
    session, desk = new_session(at_once=at_once)
    propose(session, desk)
    whole = added(session)
    for path in session.walk.ledger.storage.glob("searches/s/*"):
        path.unlink()
    limit = sum(whole[:5]) + whole[5] / 2
    session, desk = new_session(f"  budget: {{train_tflops: {limit!r}}}\n", at_once)
    propose(session, desk)
    assert added(session) == pytest.approx(whole[:5]) and whole[5] > 0
    # Another driver after a kill counts what was noted, stops at the same trial, and goes on with a higher limit.
    session, desk = new_session(f"  budget: {{train_tflops: {limit!r}}}\n", at_once)
    propose(session, desk)
    assert added(session) == pytest.approx(whole[:5]) and 5 in desk.refused
    session, desk = new_session(f"  budget: {{train_tflops: {limit + whole[5]!r}}}\n", at_once)
    propose(session, desk)
    assert added(session)[:6] == pytest.approx(whole[:6])
    assert sum(added(session)) <= limit + whole[5]


def test_notes_from_before_count_as_what_their_trials_cost_alone(new_session):
    session, desk = new_session()
    propose(session, desk)
    for trial in session.walk.trials:
        session._notes.write(replace(trial, added_train_tflops=None))
    alone = plan_document(session.walk.loaded, session.walk.cells, session.walk.tree, session.walk.ledger)
    total = alone["totals"]["train_tflops_alone"]
    session, _ = new_session(f"  budget: {{train_tflops: {total!r}}}\n")
    free = replace(session.walk.trials[0], number=TRIALS, added_train_tflops=total / 1000)
    assert "are used" in session._budget.refusal(free, session.walk, session.walk)


def test_operations_that_the_formula_does_not_know_are_no_limit(new_session, monkeypatch):
    monkeypatch.setattr("orchestrator.plan.cell_costs.unpriced", lambda *_: "its tower has experts")
    with pytest.raises(UsageError, match=r"search.budget.train_tflops cannot be kept: .*its tower has experts"):
        new_session("  budget: {train_tflops: 1.0}\n")


def test_hours_wait_for_a_speed_and_end_the_search(new_session):
    session, desk = new_session("  budget: {gpu_hours: 2}\n", at_once=3)
    session.newer_work()
    assert len(session.walk.trials) == 1, "the speed is not known"
    ledger, job = session.walk.ledger, next(iter(session.walk.tree.stage_runs.values()))
    metrics = ledger.metrics_file(job.id)
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"step": 0, "step_seconds": 360.0}) + "\n")  # a tenth of an hour a step, eight steps
    propose(session, desk)
    assert 1 < len(session.walk.trials) < TRIALS and desk.ended
    steps = sum(job.last_step - job.first_step for job in session.walk.tree.stage_runs.values())
    assert steps / 10 < 2.5, "heavy steps are cheaper than others, by the formula"
    document = plan_document(session.walk.loaded, session.walk.cells, session.walk.tree, ledger)["totals"]
    assert document["worker_hours_done"] + document["worker_hours_left"] <= 2


def test_trials_are_a_limit_too(new_session):
    session, _ = new_session("  budget: {trials: 3}\n")
    assert most_trials(session.walk.loaded.spec) == 3
    session, _ = new_session("  budget: {trials: 100}\n")
    assert most_trials(session.walk.loaded.spec) == TRIALS
