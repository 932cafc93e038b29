"""`llavolta search` as a user starts it, with real Ray Tune, lanes and MLflow; killed in the middle, started again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from program import wait_until
from search_program import Search

TRIALS = 4


@pytest.fixture(scope="module")
def killed(tmp_path_factory, search_text):
    """A search whose driver was killed while its second trial trained, and what it had noted by then."""
    search = Search(tmp_path_factory.mktemp("search"), search_text)
    process = search.start()
    wait_until(lambda: search.training() or process.poll() is not None, seconds=300)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = search.trials()
    assert [trial["state"] for trial in before] == ["finished", "proposed"]
    wait_until(lambda: not search.alive(), seconds=300)
    finished = {path.parent.name: path.stat().st_mtime_ns for path in search.storage.glob("stage_runs/*/job.json")}
    return search, before, finished, search.run()


@pytest.mark.slow
def test_a_killed_search_started_again_loses_no_trial_and_trains_none_twice(killed):
    search, before, finished, (code, output, errors) = killed
    assert code == 0, output + errors
    trials = search.trials()
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    assert {trial["state"] for trial in trials} == {"finished"}
    assert trials[0] == before[0]
    assert {key: trials[1][key] for key in ("params", "values", "cells")} == {
        key: before[1][key] for key in ("params", "values", "cells")
    }
    for name, written in finished.items():
        assert (search.storage / "stage_runs" / name / "job.json").stat().st_mtime_ns == written
    # What trained when the driver died has no checkpoint yet, so its few steps may be there twice; nothing else.
    steps = search.steps()
    repeated = {name for name, counts in steps.items() if max(counts.values(), default=1) > 1}
    assert len(repeated) <= 1 and not repeated & set(finished)
    assert sum(len(counts) for counts in steps.values()) >= 8
    _, planned, _ = search.run("--json", verb="plan")
    added = sum(trial["added_train_tflops"] for trial in trials)
    assert added == pytest.approx(json.loads(planned)["totals"]["train_tflops_shared"])
    assert not search.alive() and "Traceback" not in errors and "WARNING" not in errors, errors
    assert not list((search.storage / "ray").glob("search-*"))


@pytest.mark.slow
def test_the_front_in_mlflow_is_the_one_of_the_ledger(killed):
    search, *_ = killed
    points = {
        trial["cells"][0]: (-trial["objectives"]["eval/vqa/accuracy"], trial["objectives"]["cost/train_tflops"])
        for trial in search.trials()
    }
    front = {
        cell for cell, own in points.items()
        if not any(all(a <= b for a, b in zip(o, own, strict=True)) and o != own for o in points.values())
    }  # fmt: skip
    runs = search.runs()
    assert set(runs) == set(points) and front
    assert {cell for cell, run in runs.items() if run.data.tags["pareto"] == "true"} == front
    assert {run.data.tags["pareto"] for run in runs.values()} <= {"true", "false"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for trial in search.trials():
        measured = runs[trial["cells"][0]].data.metrics
        assert {name: measured[name] for name in trial["objectives"]} == trial["objectives"]
        assert measured["cost/added_train_tflops"] == trial["added_train_tflops"]


@pytest.mark.slow
def test_a_finished_search_has_nothing_to_do_and_shows_its_front(killed):
    search, *_, (_, output, _) = killed
    begun = list((search.storage / "stage_runs").iterdir())
    code, again, errors = search.run()
    assert code == 0 and "nothing to do" in again, again + errors
    assert list((search.storage / "stage_runs").iterdir()) == begun
    shown = [line for line in again.splitlines() if line.startswith(("trial-", "front:"))]
    assert shown == [line for line in output.splitlines() if line.startswith(("trial-0", "front:"))]
    code, table, _ = search.run("--format", "json", verb="table")
    rows = json.loads(table)["rows"]
    assert {row["name"] for row in rows} <= {f"trial-{number:03d}" for number in range(TRIALS)}
    assert "full" in rows[0]["axes"]["phases.finetune.schedule"]
    code, status, _ = search.run("--json", verb="status")
    assert {cell["state"] for cell in json.loads(status)["cells"]} == {"finished"}
    code, weights, errors = search.run("--cell", "trial-000", verb="path")
    assert code == 0 and (Path(weights.strip()) / "model.safetensors").is_file(), errors


@pytest.mark.slow
def test_more_trials_go_on_where_it_stopped(killed):
    search, *_ = killed
    before = search.trials()
    code, output, errors = search.run("--set", f"search.num_trials={TRIALS + 1}", "--json")
    assert code == 0, errors
    trials = search.trials()
    assert trials[:-1] == before and trials[-1]["state"] == "finished" and len(trials) == TRIALS + 1
    told = json.loads(output)
    assert told["front"] and not told["failed"] and not told["waiting"]


LETTERS = """
from typing import ClassVar, Literal

from orchestrator import plugin


class LettersSpec(plugin.EvaluationSpec):
    \"\"\"Mean length of the answers; its metrics are not named beforehand.\"\"\"

    kind: Literal["letters"] = "letters"
    implementation: ClassVar[str] = f"{__name__}:Letters"


class Letters:
    def __init__(self, spec):
        pass

    def run(self, model, data, workers):
        answers = plugin.greedy_answers(model, data.rows, data, 64, 4)
        return plugin.Outcome({"letters": sum(map(len, answers)) / len(answers)}, len(answers))
"""


@pytest.mark.slow
def test_a_search_stops_after_the_first_trial_that_lacks_an_objective(search_text, tmp_path):
    (tmp_path / "letters.py").write_text(LETTERS)
    text = search_text.replace("vqa: {kind: exact_match, ", "vqa: {kind: letters, ")
    text = text.replace("eval/vqa/accuracy", "eval/vqa/leters") + "plugins: [letters.py]\n"
    search = Search(tmp_path, text)
    for _ in range(2):  # the second finds the trial as it was left, and trains nothing
        code, _, errors = search.run()
        assert code == 1 and "the objective eval/vqa/leters was not measured" in errors, errors
        assert "did you mean eval/vqa/letters?" in errors
        assert [trial["state"] for trial in search.trials()] == ["failed"]
    _, output, _ = search.run("--json", verb="table")
    assert [row["status"] for row in json.loads(output)["rows"]] == ["failed"]
    (run,) = search.runs().values()
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_a_local_search_proposes_the_same_and_goes_on_without_ray(killed, search_text, tmp_path):
    search = Search(tmp_path, search_text)
    code, output, errors = search.run("--local", "--set", "search.num_trials=1")
    assert code == 0 and "front: trial-000" in output, output + errors
    budget = 2.2 * killed[1][0]["objectives"]["cost/train_tflops"]
    code, output, errors = search.run("--local", "--set", f"search.budget={{train_tflops: {budget}}}")
    assert code == 0 and "the search stops: trial-00" in output + errors, output + errors
    trials, others = search.trials(), killed[0].trials()
    assert 1 < len(trials) < TRIALS and {trial["state"] for trial in trials} == {"finished"}
    assert sum(trial["added_train_tflops"] for trial in trials) <= budget
    assert [trial["params"] for trial in trials] == [trial["params"] for trial in others[: len(trials)]]
    assert not (search.storage / "ray").exists()


@pytest.mark.slow
def test_trials_are_judged_by_what_they_are_compared_with(search_text, tmp_path):
    lines = "  constraints: {eval/vqa/accuracy: '>= full - 1', cost/train_tflops: '<= full - 1.0e-6'}\n"
    search = Search(tmp_path, search_text + lines)
    code, output, errors = search.run("--local", "--json", "--set", "search.num_trials=2")
    assert code == 0, errors
    told, trials, runs = json.loads(output), search.trials(), search.runs()
    full = next(run for run in runs.values() if run.info.run_name == "full")
    assert len(runs) == len({full.data.tags["cell_id"], *(cell for trial in trials for cell in trial["cells"])})
    for trial in trials:  # the first is full tokens itself: the same cell, which does not cost less than itself
        cost = trial["objectives"]["cost/train_tflops"]
        assert trial["excess"]["cost/train_tflops"] == pytest.approx(
            cost - (full.data.metrics["cost/train_tflops"] - 1e-6)
        )
        assert trial["excess"]["eval/vqa/accuracy"] <= 0
    assert [trial["excess"]["cost/train_tflops"] > 0 for trial in trials] == [True, False]
    assert told["front"] == ["trial-001"]
    assert runs[trials[0]["cells"][0]].data.tags["violates"] == "cost/train_tflops"
    marks = {row["name"]: row["marks"] for row in told["rows"]}
    assert "violates cost/train_tflops" in marks["full"] and "pareto" in marks["trial-001"]


@pytest.mark.slow
def test_the_best_trials_are_run_again_once_all_have_ended(search_text, tmp_path):
    lines = "  promote: {top: 1, seeds: [0, 7], set: {phases.finetune.weight_decay: 0.1}}\n"
    search = Search(tmp_path, search_text.replace("num_trials: 4", "num_trials: 2") + lines)
    process = search.start("--local")
    wait_until(lambda: any(trial["promoted"] for trial in search.trials()) or process.poll() is not None, seconds=300)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [trial["state"] for trial in search.trials()] == ["finished"] * 2
    code, output, errors = search.run("--local", "--json")
    assert code == 0, output + errors
    told, trials = json.loads(output), search.trials()
    (best,) = (trial for trial in trials if trial["promoted"])
    rows = {row["name"]: row for row in told["rows"]}
    row = rows[f"promoted-{best['number']:03d}"]
    assert set(rows) == {"trial-000", "trial-001", row["name"]} and "promoted" in row["marks"]
    assert row["status"] == "finished" and [name.partition(",")[2] for name in row["cells"]] == ["seed=0", "seed=7"]
    runs = search.runs()
    again = [run for run in runs.values() if run.data.params.get("promoted") == f"trial-{best['number']:03d}"]
    assert len(runs) == 4 and {run.info.status for run in again} == {"FINISHED"} and len(again) == 2
    assert row["metrics"]["eval/vqa/accuracy"] == pytest.approx(
        sum(run.data.metrics["eval/vqa/accuracy"] for run in again) / 2
    )
    code, output, errors = search.run("--local", "--json")
    assert code == 0 and json.loads(output)["executed"] == 0, errors
