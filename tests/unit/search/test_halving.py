"""Trials stopped at rungs: compared as the rule says, planned and paid for no further, and taken up again."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from searched import Searched, by_state

from orchestrator.errors import SpecError, UsageError
from orchestrator.plan.documents import plan_document, status_document
from orchestrator.plan.experiment_plan import plan_trials, prepare
from orchestrator.plan.trials import ADDED, STOPPED, front_of, search_id
from orchestrator.report.table import table_of
from orchestrator.search.halving import goes_on
from orchestrator.spec.loader import load_experiment

ACCURACY = "eval/vqa/accuracy"
SCHEDULER = "  scheduler: {rungs: [1/4, 1/2]}\n"
TRIALS = 16


@pytest.fixture
def new_search(search_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a search for accuracy alone, with a scheduler, into a folder."""

    def make(lines: str = "", scheduler: str = SCHEDULER, name: str = "a", **given) -> Searched:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        text = search_text.replace(", cost/train_tflops: min", "").replace("num_trials: 4", f"num_trials: {TRIALS}")
        (folder / "search.yaml").write_text(text + scheduler + lines)
        return Searched(folder / "search.yaml", **given)

    return make


@pytest.mark.parametrize(
    ("value", "others", "way", "factor", "expected"),
    [
        (0.1, [], "max", 2, True),  # nobody was there: it goes on
        (0.1, [0.2], "max", 2, False),
        (0.1, [0.2], "min", 2, True),
        (0.3, [0.2], "max", 2, True),
        (0.2, [0.2], "max", 2, True),  # equal ones go on together
        (0.2, [0.3, 0.1], "max", 2, False),  # of three one
        (0.2, [0.3, 0.1, 0.1], "max", 2, True),  # of four two
        (0.2, [0.3, 0.1, 0.1, 0.1, 0.1], "max", 3, True),
        (0.2, [0.3, 0.4, 0.1, 0.1, 0.1], "max", 3, False),
    ],
)
def test_a_trial_goes_on_among_the_best_of_those_that_were_at_the_rung(value, others, way, factor, expected):
    assert goes_on(value, others, way, factor) == expected


def test_every_trial_is_compared_with_those_before_it_and_trained_no_further_than_it_goes(new_search):
    search = new_search()
    walk = search.run()
    trials = search.trials()
    assert len(trials) == TRIALS and {trial.state for trial in trials} == {"finished", "stopped"}
    # Once more in the test's own words: of the sorted values at a rung the first half goes on.
    for rung in ("1/4 under full", "1/2 under full"):
        seen: list[float] = []
        for trial in trials:
            if rung in trial.rungs:
                seen = sorted([*seen, trial.rungs[rung]], reverse=True)
                place = seen.index(trial.rungs[rung]) + 1
                ended_here = trial.state == "stopped" and list(trial.rungs)[-1] == rung
                assert ended_here == (place > max(1, len(seen) // 2)), (trial.number, rung)
    for trial in trials:
        (cell,) = walk.cells_of(trial)
        steps = sum(walk.tree.stage_runs[run].last_step - walk.tree.stage_runs[run].first_step
                    for run in walk.tree.path_of[cell.id])  # fmt: skip
        assert steps == {0: 8, 1: 2, 2: 4}[0 if trial.state == "finished" else len(trial.rungs)]
        assert len(trial.rungs) == 2 or trial.state == "stopped"
    assert set(search.done.values()) == {1} and set(search.done) >= walk.tree.stage_runs.keys()
    assert {job for job in search.done if job in walk.tree.evaluations} == walk.tree.evaluations.keys()


def test_a_value_at_a_rung_is_that_of_the_state_there_and_the_mean_over_seeds(new_search):
    search = new_search("matrix: {seed: [0, 1, 2]}\n", "  scheduler: {rungs: [1/4], under: light}\n")
    walk = search.run()
    (trial, *_) = (one for one in search.trials() if one.state == "stopped")
    loaded = load_experiment(search.file)
    whole = plan_trials(loaded, walk.ledger, [trial], to_the_end=True)  # it is stopped: still no further
    cells = whole.cells_of(trial)
    assert len(cells) == 3 and len({cell.state for cell in cells}) == 3
    assert all(cell.phases[-1].last_step == 2 and cell.phases[-1].state_at(2) == cell.state for cell in cells)
    tests = [each.job for cell in cells for each in cell.along]
    assert [(job.name, job.under) for job in tests] == [("vqa", "light")] * 3
    assert list(trial.rungs) == ["1/4 under light"]
    assert trial.rungs["1/4 under light"] == pytest.approx(sum(map(by_state, tests)) / 3)


@pytest.mark.parametrize("seeds", ["", pytest.param("matrix: {seed: [0, 1]}\n", marks=pytest.mark.slow)])
def test_a_search_killed_anywhere_reaches_the_same_decisions_and_does_nothing_twice(seeds, new_search):
    undisturbed = new_search(seeds, name="whole")
    undisturbed.run()
    whole = undisturbed.trials()
    killed = new_search(seeds, name="killed")
    drivers = 0
    while len(killed.trials()) < TRIALS or any(trial.state == "proposed" for trial in killed.trials()):
        killed.run(most_jobs=5)
        drivers += 1
    assert drivers > 5 and killed.trials() == whole
    assert set(killed.done.values()) == {1}


def test_what_was_stopped_is_shown_so_and_never_on_the_front(new_search):
    search = new_search()
    walk = search.run()
    stopped = {f"trial-{trial.number:03d}": trial for trial in search.trials() if trial.state == "stopped"}
    walk = search.walk()  # as `table` and `status` find it
    rows = {row.name: row for row in table_of([walk]).rows}
    for name, trial in stopped.items():
        (rung, value) = list(trial.rungs.items())[-1]
        assert rows[name].status == "stopped" and rows[name].marks == (f"at {rung}: {value:.4g}",)
        assert ACCURACY not in rows[name].values and rows[name].values[ADDED] == trial.added_train_tflops
        record = walk.record(walk.find(name))
        assert record.tags["pareto"] == "false" and record.tags[STOPPED] == f"at {rung}: {value:.4g}"
    on_front = front_of(search.trials(), walk.loaded.spec.search)
    assert on_front and not on_front & {identity for trial in stopped.values() for identity in trial.cells}
    passed = next(trial for trial in search.trials() if trial.state == "finished")
    assert walk.record(walk.cells_of(passed)[0]).tags[STOPPED] == "no"
    states = {cell["name"]: cell["state"] for cell in status_document(walk)["cells"]}
    assert {name for name, state in states.items() if state == "stopped"} == stopped.keys()
    document = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger)
    assert {cell["name"] for cell in document["cells"] if cell["state"] == "stopped"} == stopped.keys()
    assert any(line.startswith("stopped trial-") and "is not among the best" in line for line in search.said)


@pytest.mark.slow
def test_a_trial_at_a_rung_is_not_stopped_before_it_was_compared(new_search):
    """A driver was killed between the evaluation and the decision."""
    search = new_search()
    jobs = 0
    while not any(trial.state == "stopped" for trial in search.trials()):
        jobs += 1
        search = new_search(name=f"try-{jobs}")
        search.run(most_jobs=jobs)
    earlier = new_search(name=f"try-{jobs - 1}")  # one job less: the last one was written, and nothing noted of it
    walk = earlier.walk()
    (open_trial,) = (trial for trial in walk.trials if trial.state == "proposed")
    (cell,) = walk.cells_of(open_trial)
    missing = [job for job in walk.tree.work(walk.ledger) if job.id in walk.jobs_of(cell)]
    for job in missing:
        walk.ledger.write_evaluation(job.id, {"metrics": {"accuracy": by_state(job)}, "seconds": 1.0})
    assert len(missing) == 1 and walk.status(cell) == "interrupted"
    states = [each["state"] for each in status_document(walk)["cells"] if each["name"] == cell.name]
    assert states == ["interrupted"] and STOPPED not in walk.record(cell).tags


@pytest.mark.slow
def test_without_the_scheduler_stopped_trials_are_taken_up_and_nothing_is_done_twice(new_search):
    search = new_search()
    search.run()
    stopped = [trial for trial in search.trials() if trial.state == "stopped"]
    before = search.done.copy()
    same = new_search(scheduler="")
    assert search_id(load_experiment(same.file)) == search_id(search.walk().loaded)
    search.run()
    after = search.trials()
    assert {trial.state for trial in after} == {"finished"} and len(after) == TRIALS
    assert set(search.done.values()) == {1} and len(search.done) > len(before)
    assert [after[trial.number].params for trial in stopped] == [trial.params for trial in stopped]
    # What they add is counted as it comes.
    walk = search.walk()
    totals = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger)["totals"]
    assert sum(trial.added_train_tflops for trial in after) == pytest.approx(totals["train_tflops_shared"])


@pytest.mark.slow
def test_under_another_variant_trials_are_compared_anew_where_they_are(new_search):
    search = new_search(scheduler="  scheduler: {rungs: [1/4]}\n")
    search.run()
    first = search.trials()
    trained = {job for job in search.done if job in search.walk().tree.stage_runs}
    new_search(scheduler="  scheduler: {rungs: [1/4], under: heavy}\n")
    search.run()
    for trial, before in zip(search.trials(), first, strict=True):
        assert trial.params == before.params
        assert ("1/4 under heavy" in trial.rungs) == (before.state == "stopped")
    assert set(search.done.values()) == {1}
    assert trained <= search.done.keys()


def test_a_trial_that_is_the_same_as_a_stopped_one_ends_with_it(new_search):
    lines = SCHEDULER.replace("1/4, 1/2", "1/4")
    search = new_search(scheduler=lines)
    text = search.file.read_text().replace("num_stages: [1, 2, 3]", "num_stages: [2]")
    search.file.write_text(text.replace("variants: [full, light, heavy, wide]", "variants: [heavy, wide]"))
    search.run()
    trials = search.trials()
    assert len(trials) == TRIALS > len({trial.cells for trial in trials}) == 6
    fate: dict[tuple[str, ...], tuple] = {}
    for trial in trials:
        value = trial.rungs if trial.state == "stopped" else None
        assert fate.setdefault(trial.cells, (trial.state, value)) == (trial.state, value)
    assert {state for state, _ in fate.values()} == {"finished", "stopped"}
    later = [trial for n, trial in enumerate(trials) if trial.cells in [other.cells for other in trials[:n]]]
    assert {trial.added_train_tflops for trial in later} == {0.0}


def test_what_stopped_trials_spent_is_counted_and_no_more(new_search):
    search = new_search()
    walk = search.run()
    trials = search.trials()
    totals = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger)["totals"]
    spent = sum(trial.added_train_tflops for trial in trials)
    assert spent == pytest.approx(totals["train_tflops_shared"])
    unstopped = [replace(trial, state="proposed", rungs={}) for trial in trials]
    whole = plan_trials(load_experiment(new_search(scheduler="").file), walk.ledger, unstopped)
    full = plan_document(whole.loaded, whole.cells, whole.tree, whole.ledger)["totals"]["train_tflops_shared"]
    assert spent < 0.9 * full


@pytest.mark.parametrize("part", [0.3, *(pytest.param(part, marks=pytest.mark.slow) for part in (0.5, 0.8))])
def test_a_budget_is_kept_though_trials_may_go_on(part, new_search):
    whole = sum(trial.added_train_tflops for trial in _ran(new_search(name="whole")).trials())
    limit = part * whole
    search = _ran(new_search(f"  budget: {{train_tflops: {limit!r}}}\n", name="limited"))
    trials = search.trials()
    spent = sum(trial.added_train_tflops for trial in trials)
    assert spent <= limit * (1 + 1e-9) and 0 < len(trials) < TRIALS
    assert {trial.state for trial in trials} <= {"finished", "stopped"}
    assert any("the search stops: trial-" in line for line in search.said)


def _ran(search: Searched) -> Searched:
    search.run()
    return search


def test_an_objective_that_is_not_measured_at_a_rung_ends_the_search(new_search):
    search = new_search(score=lambda job: None)
    search.run()
    (trial,) = search.trials()
    assert trial.state == "failed" and trial.error == f"the objective {ACCURACY} was not measured at 1/4 under full"
    assert len([job for job in search.done if job in search.walk().tree.stage_runs]) == 1
    (row,) = table_of([search.walk()]).rows
    assert row.status == "failed"


RUNGS = "scheduler: {rungs: [1/4, 1/2]}"
SEVERAL = "{eval/vqa/accuracy: max, cost/train_tflops: min}"
WRONG = [
    (RUNGS, "scheduler: {rungs: [1/2, 1/4]}", "scheduler.rungs", "comes after the one"),
    (RUNGS, "scheduler: {rungs: [1/4, 25%]}", "scheduler.rungs", "comes after the one"),
    (RUNGS, "scheduler: {rungs: [1/2, 1]}", "scheduler.rungs", "a rung lies before it"),
    (RUNGS, "scheduler: {rungs: []}", "scheduler.rungs", "at least 1"),
    (RUNGS, "scheduler: {kind: asha}", "scheduler", "rungs"),
    (RUNGS, "scheduler: {rungs: [1/2], under: hevy}", "scheduler.under", "did you mean heavy"),
    (RUNGS, "scheduler: {rungs: [1/2], reduction_factor: 1}", "reduction_factor", "at least 2"),
    ("{eval/vqa/accuracy: max}", SEVERAL, "search.scheduler", "stopped by one objective, and there are 2"),
    ("{eval/vqa/accuracy: max}", "{cost/train_seconds: min}", "search.scheduler", "no evaluation measures"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "path", "message"), WRONG)
def test_validate_tells_where_trials_could_not_be_compared(old, new, path, message, new_search):
    file = new_search().file
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(SpecError) as caught:
        load_experiment(file)
    told = [fault for fault in caught.value.errors if path in fault.path and message in str(fault)]
    assert told and all(fault.line is not None for fault in told), str(caught.value)


def test_steps_that_have_no_room_for_the_rungs_are_refused(new_search):
    file = new_search(scheduler="  scheduler: {rungs: [1/64, 1/2]}\n").file
    with pytest.raises(UsageError, match=r"search.scheduler.rungs: the 8 steps of a trial have no room for 1/64, 1/2"):
        prepare(file)


@pytest.mark.slow
def test_a_rung_in_the_first_of_two_phases_leaves_the_second_out(new_search):
    search = new_search(scheduler="  scheduler: {rungs: [1/4, 3/4]}\n")
    text = search.file.read_text()
    phase = text[text.index("  finetune:\n") : text.index("evaluate:")]
    text = text.replace("phases.finetune.schedule", "phases.pretrain.schedule")
    search.file.write_text(text.replace(phase, phase.replace("finetune", "pretrain") + phase))
    walk = search.run()
    (one, *_) = (trial for trial in search.trials() if trial.state == "stopped" and len(trial.rungs) == 1)
    (cell,) = walk.cells_of(one)
    assert [(plan.name, plan.last_step, plan.total_steps) for plan in cell.phases] == [("pretrain", 4, 8)]
    assert cell.rung == Fraction(1, 4)
