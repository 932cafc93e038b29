"""Constraints: what may be written, which trials meet them, and what Optuna and the table are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from orchestrator.errors import SpecError, StageRunError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.experiment_plan import ExperimentPlan, plan_trials, prepare
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.trials import Trial, TrialNotes, front_of, search_id
from orchestrator.report.table import ablation_table
from orchestrator.search.search import SearchSession, as_stored
from orchestrator.search.trial_mailbox import EXCESS
from orchestrator.search.tuning import Proposer
from orchestrator.spec.constraint import ConstraintText
from orchestrator.spec.loader import load_experiment

ACCURACY, COST = "eval/vqa/accuracy", "cost/train_tflops"
READER = TypeAdapter(ConstraintText)


@pytest.mark.parametrize(
    ("text", "value", "reference", "excess"),
    [
        (">= 0.7", 0.65, 0.0, 0.05),
        ("<=1e-3", 0.5, 0.0, 0.499),
        (">= full", 0.7, 0.7, 0.0),
        (">= full - 0.005", 0.7, 0.7, -0.005),
        ("<= four-stage.b + 2", 5.0, 1.0, 2.0),
        (">= -1", 0.0, 0.0, -1.0),
    ],
)
def test_by_how_much_a_value_is_beyond_its_limit(text, value, reference, excess):
    found = READER.validate_python(text)
    assert found.excess(value, reference) == pytest.approx(excess)
    assert READER.dump_python(found) == text


@pytest.mark.parametrize("text", ["> 0.7", "0.7", ">= full -", ">= full - x", ">= 2 * full", ">=", ">= 1e999", 0.7])
def test_what_is_no_constraint_is_refused(text):
    with pytest.raises(ValidationError, match="a constraint is written"):
        READER.validate_python(text)


@pytest.mark.parametrize(
    ("line", "path", "message"),
    [
        ("{eval/vqa/accuracy: '> 0.5'}", "search.constraints.eval/vqa/accuracy", "a constraint is written"),
        ("{eval/vqa/acuracy: '>= 0.5'}", "search.constraints.eval/vqa/acuracy", "did you mean eval/vqa/accuracy?"),
        ("{eval/vqa/accuracy: '>= fulll'}", "search.constraints.eval/vqa/accuracy", "did you mean full?"),
    ],
)
def test_validate_tells_what_a_constraint_cannot_be_and_where(line, path, message, search_text, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(f"{search_text}  constraints: {line}\n")
    with pytest.raises(SpecError) as caught:
        load_experiment(file)
    (fault,) = caught.value.errors
    assert fault.path == path and message in str(fault) and fault.line == len(search_text.splitlines()) + 1


@pytest.fixture
def walk(search_file: Path, search_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentPlan:
    """A search of two seeds whose accuracy is compared with full tokens."""
    monkeypatch.chdir(tmp_path)
    lines = (
        "  constraints: {eval/vqa/accuracy: '>= full - 0.005', cost/train_tflops: '<= 100'}\nmatrix: {seed: [0, 1]}\n"
    )
    search_file.write_text(search_text + lines)
    return prepare(search_file)


def with_trial(walk: ExperimentPlan) -> ExperimentPlan:
    """The search with a trial that is not full tokens itself."""
    proposer = Proposer(walk.loaded.spec, (), None)
    proposal = next(one for one in map(proposer.suggest, "abcdef") if "1/4" in str(one["values"]))
    return plan_trials(walk.loaded, walk.ledger, [Trial(0, proposal["params"], proposal["values"])])


def test_what_is_compared_with_is_trained_first_once_a_seed(walk):
    assert [cell.name for cell in walk.cells] == ["full,seed=0", "full,seed=1"]
    assert {cell.spec.phases.finetune.schedule for cell in walk.cells} == {"full"}
    walk = with_trial(walk)
    assert [cell.name for cell in walk.cells][:2] == ["full,seed=0", "full,seed=1"] and len(walk.cells) == 4
    assert walk.tree.work(walk.ledger)[1].id in walk.jobs_of(walk.cells[0])


@pytest.mark.parametrize(("full", "own", "excess"), [(0.7, 0.696, -0.001), (0.7, 0.68, 0.015)])
def test_a_trial_is_judged_once_what_it_is_compared_with_is_there(full, own, excess, walk, monkeypatch):
    walk, finished = with_trial(walk), set()
    monkeypatch.setattr(ExperimentPlan, "status", lambda _, cell: "finished" if cell.id in finished else "new")
    scores = {cell.id: full if cell.name.startswith("full") else own for cell in walk.cells}

    def record(_, cell):
        return CellRecord(cell.id, cell.name, "finished", summary={ACCURACY: scores[cell.id], COST: 1.0})

    monkeypatch.setattr(ExperimentPlan, "record", record)
    (trial,) = walk.trials
    finished |= set(trial.cells)
    assert as_stored(walk, trial).state == "proposed", "not before"
    finished |= {cell.id for cell in walk.cells}
    ended = as_stored(walk, trial)
    assert ended.state == "finished" and ended.excess == pytest.approx({ACCURACY: excess, COST: -99.0})
    assert ended.violated == ((ACCURACY,) if excess > 0 else ())
    assert bool(walk.with_trial(ended).front) == (excess < 0)


def test_a_search_ends_where_what_it_compares_with_fails(walk, monkeypatch):
    session = SearchSession(walk, TrialNotes(walk.ledger.store, "s"), Console(quiet=True))
    job = walk.tree.path_of[walk.cells[0].id][-1]
    event = {"event": "failed", "id": job, "type": "stage", "attempt": 1, "error": "it diverged", "kind": "Diverged"}
    session.on_event(event)
    session._answer(None)
    assert "search.constraints compares with is not trained: it diverged" in session.unmeasured
    monkeypatch.setattr(Ledger, "failure", lambda _, name: {"error": "it diverged"} if name == job else None)
    with pytest.raises(StageRunError, match=r"full, which search.constraints compares with, failed: it diverged"):
        walk.reference_values()


def test_other_constraints_are_another_search(walk, search_text, tmp_path):
    file = tmp_path / "other.yaml"
    found = {search_id(walk.loaded)}
    for line in ("", "  constraints: {eval/vqa/accuracy: '>= full'}\n"):
        file.write_text(search_text + line + "matrix: {seed: [0, 1]}\n")
        found.add(search_id(load_experiment(file)))
    assert len(found) == 3


def test_what_violates_is_not_on_the_front_and_the_table_says_so(loaded):
    points = [(0.5, 2.0, 0.1), (0.4, 1.0, 0.0), (0.3, 3.0, -0.1)]
    trials = [
        Trial(n, {}, {}, "finished", (f"{n}",), {ACCURACY: a, COST: c}, {ACCURACY: excess})
        for n, (a, c, excess) in enumerate(points)
    ]
    assert front_of(trials, loaded.spec.search) == {"1"}
    records = [CellRecord(n, n, "finished", tags={"violates": ACCURACY} if n == "a" else {}) for n in "ab"]
    assert [row.marks for row in ablation_table(records, {"a": {}, "b": {}}).rows] == [(f"violates {ACCURACY}",), ()]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_optuna_is_told_and_a_resumed_search_tells_it_the_same(sampler, search_text, tmp_path):
    file = tmp_path / "search.yaml"
    text = search_text.replace("boundaries: 1/4", "boundaries: 1/8")  # so many recipes that none need be drawn anew
    file.write_text(f"{text}  algorithm: {{sampler: {sampler}}}\n")
    spec = load_experiment(file).spec
    proposer, trials = Proposer(spec, (), None), []
    blind = []
    for number in range(19):
        config = proposer.suggest(str(number))
        stages = config["values"]["phases.finetune.schedule"]["stages"]
        objectives, excess = {ACCURACY: 1 / len(stages), COST: float(len(str(stages)))}, {ACCURACY: 2.5 - len(stages)}
        told = objectives | {f"{EXCESS}{name}": value for name, value in excess.items()}
        proposer.on_trial_complete(str(number), told)
        trial = Trial(config["number"], config["params"], config["values"], "finished", ("x",), objectives, excess)
        trials.append(trial)
        if number < 10 or number % 4:  # TPE draws the first ten at random
            continue
        resumed = Proposer(spec, trials, None)
        seen = [each.constraints for each in resumed._ot_study.trials]
        assert seen == [each.constraints for each in proposer._ot_study.trials] == [t.excess for t in trials]
        assert resumed._drawn() == proposer._drawn()
        blind.append(Proposer(spec, [replace(trial, excess={}) for trial in trials], None)._drawn() == resumed._drawn())
    assert all(blind) == (sampler == "random"), "TPE knows which trials are allowed"
