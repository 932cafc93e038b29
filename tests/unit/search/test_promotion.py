"""The best trials run again: which they are, the cells they become, how these are shown, and what cannot be set."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from ledger_work import finish
from searched import Searched, by_state

from orchestrator.errors import SpecError
from orchestrator.plan.documents import plan_document
from orchestrator.plan.experiment_plan import ExperimentPlan, plan_trials
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.plan.trials import ADDED, Trial, best_trials, search_id
from orchestrator.report.experiment_report import report_document
from orchestrator.report.overview import experiment_tags
from orchestrator.report.table import table_of
from orchestrator.report.units import operations
from orchestrator.search.budget import Budget
from orchestrator.spec.loader import load_experiment
from orchestrator.spec.search import SearchSpec

ACCURACY, COST = "eval/vqa/accuracy", "cost/train_tflops"
PROMOTE = "  promote: {top: 2, seeds: [0, 1, 2]}\n"
COMPARED = "  promote: {top: 2, seeds: [0, 1, 2], baseline: full}\n"


@pytest.fixture
def ended(search_file: Path, search_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Searched:
    """A search whose four trials have ended."""
    monkeypatch.chdir(tmp_path)
    search_file.write_text(search_text + PROMOTE)
    search = Searched(search_file)
    search.run()
    return search


def promoted(search: Searched, *numbers: int) -> ExperimentPlan:
    walk = search.walk()
    trials = [replace(trial, promoted=trial.number in numbers) for trial in walk.trials]
    return plan_trials(load_experiment(search.file), walk.ledger, trials)


SPACE = {"seed": {"kind": "choice", "values": [1]}}


def numbers(objectives: dict[str, str], points: list[tuple[float, ...]], top: int, **more) -> list[int]:
    search = SearchSpec.model_validate({"objectives": objectives, "space": SPACE})
    trials = [
        Trial(n, {}, {}, "finished", (str(n),), dict(zip(objectives, point, strict=True)), **more)
        for n, point in enumerate(points)
    ]
    return [trial.number for trial in best_trials(trials, search, top)]


def test_the_front_is_promoted_by_its_first_objective_and_with_one_the_best():
    points = [(0.5, 1.0), (0.9, 3.0), (0.8, 4.0), (0.7, 2.0)]  # the third is beaten by the second
    assert numbers({ACCURACY: "max", COST: "min"}, points, 9) == [1, 3, 0]
    assert numbers({COST: "min", ACCURACY: "max"}, [point[::-1] for point in points], 2) == [0, 3]
    alone = [(accuracy,) for accuracy, _ in points]
    assert numbers({ACCURACY: "max"}, alone, 3) == [1, 2, 3] and numbers({ACCURACY: "min"}, alone, 1) == [0]
    assert numbers({ACCURACY: "max"}, alone, 3, excess={COST: 1.0}) == []


def test_equal_trials_are_promoted_once_under_the_earlier_number_and_others_never():
    search = SearchSpec.model_validate({"objectives": {ACCURACY: "max"}, "space": SPACE})
    first = Trial(0, {}, {}, "finished", ("a",), {ACCURACY: 0.5})
    others = [replace(first, number=1), replace(first, number=2, state="stopped", cells=("b",)), Trial(3, {}, {})]
    assert best_trials([first, *others, Trial(4, {}, {}).failed("diverged")], search, 9) == [first]


def test_what_is_promoted_is_no_part_of_a_trial_and_shares_its_cell(ended):
    before, walk = ended.walk(), promoted(ended, 1)
    new = walk.cells[len(before.cells) :]
    assert [cell.name for cell in new] == [f"promoted-001,seed={seed}" for seed in (0, 1, 2)]
    (own,) = walk.cells_of(walk.trials[1])
    assert own.name == "trial-001" and own.id == new[0].id and len({cell.id for cell in new}) == 3
    assert walk.trials[0] == before.trials[0] and walk.front == before.front
    work = walk.tree.work(walk.ledger)
    assert {job.seed for job in work if hasattr(job, "seed")} == {1, 2}, "seed 0 is the trial, which is trained"
    assert search_id(walk.loaded) == search_id(before.loaded)


def test_promoted_rows_are_means_over_their_seeds_beside_the_trials(ended):
    walk = promoted(ended, 1, 3)
    for job in walk.tree.work(walk.ledger):
        if isinstance(job, EvaluationJob):
            walk.ledger.write_evaluation(job.id, {"metrics": {"accuracy": by_state(job)}, "seconds": 1.0})
        else:
            finish(walk.ledger, job)
    rows = {row.name: row for row in table_of([walk]).rows}
    assert set(rows) == {f"trial-{n:03d}" for n in range(4)} | {"promoted-001", "promoted-003"}
    row = rows["promoted-003"]
    scores = [by_state(job) for cell in walk.cells if cell.name in row.cells for job in cell.evaluations[:1]]
    assert len(scores) == 3 and row.values[ACCURACY] == pytest.approx(mean(scores))
    assert "promoted" in row.marks and row.ci95[ACCURACY] > 0 and ADDED not in row.values
    assert "pareto" not in row.marks and row.status == "finished"
    assert rows["trial-003"].values[ACCURACY] == pytest.approx(scores[0])
    assert not any("promoted" in row.marks for name, row in rows.items() if name.startswith("trial"))


def test_what_promoted_cells_took_counts_to_no_budget(ended):
    walk = promoted(ended, 1)
    budget = Budget(walk.loaded)
    before = budget._hours(ended.walk())
    for job in walk.tree.work(walk.ledger):
        if not isinstance(job, EvaluationJob):
            finish(walk.ledger, job, train_seconds=7200.0)
    assert budget._hours(promoted(ended, 1)) == pytest.approx(before) and before[0] > 0


def test_what_is_set_is_set_beside_what_was_drawn(ended):
    text = ended.file.read_text().replace(PROMOTE, "  promote: {top: 1, set: {phases.finetune.max_steps: 16}}\n")
    ended.file.write_text(text)
    walk = promoted(ended, 2)
    cell = walk.cells[-1]
    assert cell.name == "promoted-002" and [plan.total_steps for plan in cell.phases] == [16]
    (own,) = walk.cells_of(walk.trials[2])
    assert cell.spec.phases.finetune.schedule == own.spec.phases.finetune.schedule and own.id != cell.id
    assert cell.axes["promoted"] == "trial-002" and cell.axes["phases.finetune.max_steps"] == 16


def test_plan_says_how_many_cells_it_will_be_until_they_are_there(ended):
    def notices(walk: ExperimentPlan) -> list[str]:
        document = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger)
        return [text for text in document["notices"] if text.startswith("search.promote")]

    (told,) = notices(ended.walk())
    assert "at most 2 of them are run again, 6 cells (3 of each)" in told
    assert notices(promoted(ended, 1)) == []
    ended.file.write_text(ended.file.read_text().replace(PROMOTE, COMPARED))
    (told,) = notices(ended.walk())
    assert "at most 2 of them are run again beside full, 9 cells (3 of each)" in told


def test_promoted_trials_are_compared_with_a_baseline_of_their_own(ended):
    ended.file.write_text(ended.file.read_text().replace(PROMOTE, COMPARED))
    assert not [cell for cell in promoted(ended).cells if "promoted" in cell.axes], "nothing to compare with yet"
    walk = promoted(ended, 1, 3)
    base = walk.cells[-3:]
    assert [cell.name for cell in base] == [f"promoted-full,seed={seed}" for seed in (0, 1, 2)]
    assert {cell.spec.phases.finetune.schedule for cell in base} == {"full"}
    assert walk.front == ended.walk().front
    for job in walk.tree.work(walk.ledger):
        if isinstance(job, EvaluationJob):
            walk.ledger.write_evaluation(job.id, {"metrics": {"accuracy": by_state(job)}, "seconds": 1.0})
        else:
            finish(walk.ledger, job)
    table = table_of([walk])
    rows = {row.name: row for row in table.rows}
    assert [name for name, row in rows.items() if "baseline" in row.marks] == ["promoted-full"]
    assert {name for name, row in rows.items() if row.against} == {"promoted-001", "promoted-003"}
    assert not any("no difference from the baseline" in text for text in table.warnings)
    one, full = rows["promoted-001"], rows["promoted-full"]
    assert one.against[ACCURACY] == pytest.approx(one.values[ACCURACY] - full.values[ACCURACY])
    document = report_document([walk])
    first, best, *_, searched = document["in_short"]
    assert first.startswith("Baseline, vqa accuracy (final): promoted-full has") and "Best" in best + searched
    assert not any(text.startswith("Best") and "trial-" in text for text in document["in_short"])
    added = sum(trial.added_train_tflops for trial in walk.trials)
    front = ", ".join(f"trial-{trial.number:03d}" for trial in walk.trials if walk.front.issuperset(trial.cells))
    assert (
        searched == f"{walk.loaded.spec.name}: 4 trials added {operations(added)} of training; on the front: {front}."
    )
    (told,) = document["experiments"]
    assert told["command"].startswith("llavolta search ")


def test_the_dashboard_tells_promoted_cells_by_their_trial_not_by_what_is_set(ended):
    more = "seeds: [0, 1], set: {phases.finetune.max_steps: 16}, baseline: heavy"
    ended.file.write_text(ended.file.read_text().replace(PROMOTE, f"  promote: {{top: 1, {more}}}\n"))
    view = experiment_tags(promoted(ended, 2))["mlflow.sharedViewState.cells"]
    shown = json.loads(zlib.decompress(base64.b64decode(json.loads(view)["state"].removeprefix("deflate;"))))
    assert [key["groupByData"] for key in shown["groupBy"]["groupByKeys"]] == ["phases.finetune.schedule", "promoted"]
    assert not any("max_steps" in column for column in shown["selectedColumns"])


def test_what_is_set_is_set_for_the_baseline_too(ended):
    compared = "  promote: {top: 1, set: {phases.finetune.max_steps: 16}, baseline: heavy}\n"
    ended.file.write_text(ended.file.read_text().replace(PROMOTE, compared))
    trial, base = promoted(ended, 2).cells[-2:]
    assert (trial.name, base.name) == ("promoted-002", "promoted-heavy")
    assert [plan.total_steps for plan in (*trial.phases, *base.phases)] == [16, 16]
    walk = promoted(ended, 2)
    params = [walk.record(cell).params["phases.finetune.schedule"] for cell in walk.cells[-2:]]
    assert params == [str(trial.axes["phases.finetune.schedule"]), "heavy"], "one column in MLflow"
    assert base.axes == {"phases.finetune.schedule": "heavy", "phases.finetune.max_steps": 16, "promoted": "heavy"}


WRONG = [
    ("{top: 2}", "search.promote", "run again as they were"),
    ("{seeds: []}", "search.promote.seeds", "at least 1"),
    ("{seeds: [1, 1]}", "search.promote.seeds", "stands there twice"),
    ("{seeds: [-1]}", "search.promote.seeds.0", "at least 0"),
    ("{set: {seed: 3}}", "search.promote.set.seed", "search.promote.seeds"),
    ("{set: {cluster.lanes: 2}}", "search.promote.set.cluster.lanes", "no part of a cell"),
    ("{set: {phases.finetune.max_step: 2}}", "search.promote.set.phases.finetune.max_step", "did you mean max_steps"),
    ("{set: {phases.finetune.max_steps: -2}}", "phases.finetune.max_steps", "at least 1"),
    ("{set: {phases.finetune.schedule: full}}", "search.promote.set.phases.finetune.schedule", "is searched"),
    ("{top: 2, baseline: full}", "search.promote", "run again as they were"),
    ("{seeds: [1], baseline: ful}", "search.promote.baseline", "did you mean full"),
    ("{seeds: [1], baseline: full}\nreport: {baseline: {seed: 0}}", "report.baseline", "a baseline of their own"),
    ("{set: {phases.finetune: {}}}", "search.promote.set.phases.finetune", "`phases.finetune.schedule` is searched"),
]


@pytest.mark.parametrize(("value", "path", "message"), WRONG)
def test_validate_tells_what_cannot_be_run_again(value, path, message, search_text, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(f"{search_text}  promote: {value}\n")
    with pytest.raises(SpecError) as caught:
        load_experiment(file)
    told = [fault for fault in caught.value.errors if path in fault.path and message in str(fault)]
    assert told and all(fault.line is not None for fault in told), str(caught.value)


def test_a_path_that_is_set_is_relative_to_the_file(search_text, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "other.json").write_text("{}")
    file = tmp_path / "sub" / "search.yaml"
    file.write_text(f"{search_text}  promote: {{set: {{phases.finetune.deepspeed: ../other.json}}}}\n")
    assert load_experiment(file).spec.search.promote.set == {"phases.finetune.deepspeed": str(tmp_path / "other.json")}
