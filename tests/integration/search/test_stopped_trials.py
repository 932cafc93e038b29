"""A search that stops trials at rungs, with real Ray Tune, lanes and MLflow: killed, finished, and taken up again."""

from __future__ import annotations

import json
import signal

import pytest
from program import wait_until
from search_program import Search

TRIALS = 5


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, search_text):
    """A search by loss, killed once a trial had passed a rung, and started again."""
    text = search_text.replace("kind: exact_match, ", "kind: loss, ").replace("last: full", "last: null")
    text = text.replace("{eval/vqa/accuracy: max, cost/train_tflops: min}", "{eval/vqa/loss: min}")
    text = text.replace("num_trials: 4", f"num_trials: {TRIALS}") + "  scheduler: {rungs: [1/4, 1/2], under: full}\n"
    search = Search(tmp_path_factory.mktemp("stopped"), text)
    process = search.start()
    wait_until(lambda: any(trial["rungs"] for trial in search.trials()) or process.poll() is not None, seconds=300)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = search.trials()
    wait_until(lambda: not search.alive(), seconds=300)
    return search, before, search.run()


@pytest.mark.slow
def test_a_killed_search_goes_on_with_its_decisions_and_stops_the_worse_trials(stopped):
    search, before, (code, output, errors) = stopped
    assert code == 0, output + errors
    trials = search.trials()
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    assert {trial["state"] for trial in trials} == {"finished", "stopped"}
    for was, now in zip(before, trials, strict=False):
        assert was["params"] == now["params"] and was["rungs"].items() <= now["rungs"].items()
    for rung in ("1/4 under full", "1/2 under full"):
        seen: list[float] = []
        for trial in trials:
            if rung in trial["rungs"]:
                seen = sorted([*seen, trial["rungs"][rung]])
                is_last = trial["state"] == "stopped" and list(trial["rungs"])[-1] == rung
                assert is_last == (trial["rungs"][rung] > seen[max(1, len(seen) // 2) - 1])
    assert "Traceback" not in errors and not search.alive()


@pytest.mark.slow
def test_mlflow_shows_what_was_stopped_and_at_which_value(stopped):
    search, *_ = stopped
    runs, best = search.runs(), []
    for trial in search.trials():
        run = runs[trial["cells"][0]]
        rung, value = list(trial["rungs"].items())[-1]
        curve = run.data.metrics["eval/vqa/under_full/loss"]
        if trial["state"] == "stopped":
            assert run.info.status == "KILLED" and run.data.tags["stopped"] == f"at {rung}: {value:.4g}"
            assert run.data.tags["pareto"] == "false" and "eval/vqa/loss" not in run.data.metrics
            assert curve == value
        else:
            assert run.info.status == "FINISHED" and run.data.tags["stopped"] == "no"
            best.append((trial["objectives"]["eval/vqa/loss"], trial["cells"][0]))
    assert {cell for cell, run in runs.items() if run.data.tags["pareto"] == "true"} == {min(best)[1]}


@pytest.mark.slow
def test_without_a_scheduler_the_stopped_ones_are_trained_on_from_their_rungs(stopped):
    search, *_ = stopped
    stopped_ones = [trial["number"] for trial in search.trials() if trial["state"] == "stopped"]
    steps = search.steps()
    code, output, errors = search.run("--local", "--json", "--set", "search.scheduler=null")
    assert code == 0 and stopped_ones, errors
    told, trials = json.loads(output), search.trials()
    assert {trial["state"] for trial in trials} == {"finished"} and len(trials) == TRIALS
    assert {row["status"] for row in told["rows"]} == {"finished"}
    after = search.steps()
    assert steps.items() < after.items(), "nothing that was trained is trained again"
    assert all(max(counts.values()) == 1 for name, counts in after.items() if name not in steps)
    runs = search.runs()
    for number in stopped_ones:
        run = runs[trials[number]["cells"][0]]
        assert run.info.status == "FINISHED" and run.data.tags["stopped"] == "no"
