"""A search whose trials are means over seeds, some of which diverge; stopped by Ctrl-C; beside another driver."""

from __future__ import annotations

import json
import signal
from statistics import mean

import pytest
from program import wait_until
from search_program import Search

SPACE = "    phases.finetune.learning_rate: {kind: choice, values: [1.0e-3, 1.0e+30]}\n"


@pytest.mark.slow
def test_a_trial_that_diverges_fails_alone_and_is_taken_up_again(search_text, tmp_path):
    text = (
        search_text[: search_text.index("    phases.finetune.schedule:\n      kind")]
        + SPACE
        + "matrix: {seed: [0, 1]}\n"
    )
    search = Search(tmp_path, text)
    code, output, errors = search.run("--json")
    assert code == 1, output + errors
    trials = search.trials()
    failed = {f"trial-{trial['number']:03d}" for trial in trials if trial["state"] == "failed"}
    assert [trial["state"] == "failed" for trial in trials] == [
        trial["values"]["phases.finetune.learning_rate"] == 1e30 for trial in trials
    ]
    assert 0 < len(failed) < 4 and set(json.loads(output)["failed"]) == failed
    assert all("diverged" in trial["error"] for trial in trials if trial["state"] == "failed")
    assert "NaN" not in errors and "Traceback" not in errors
    runs = search.runs()
    for trial in trials:
        assert len(trial["cells"]) == 2
        if trial["state"] == "finished":
            accuracies = [runs[cell].data.metrics["eval/vqa/accuracy"] for cell in trial["cells"]]
            assert trial["objectives"]["eval/vqa/accuracy"] == pytest.approx(mean(accuracies))
        else:
            assert "FAILED" in {runs[cell].info.status for cell in trial["cells"]}
    code, _, _ = search.run()
    assert code == 1 and search.trials() == trials, "what failed is not tried again unasked"
    code, output, _ = search.run("--retry-failed")
    assert code == 1 and all(f"proposed {name}" in output and f"failed {name}" in output for name in failed)
    assert [trial["state"] for trial in search.trials()] == [trial["state"] for trial in trials]


@pytest.mark.slow
def test_control_c_stops_in_order_and_a_second_driver_is_turned_away(search_text, tmp_path):
    search = Search(tmp_path, search_text)
    process = search.start()
    wait_until(lambda: search.training() or process.poll() is not None, seconds=300)
    code, _, errors = search.run()
    assert code == 2 and f"process {process.pid}" in errors
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, output + errors
    assert "Traceback" not in errors and not search.alive()
    before = search.trials()
    assert [trial["state"] for trial in before] == ["finished", "proposed"]
    code, output, errors = search.run()
    assert code == 0, errors
    assert [trial["state"] for trial in search.trials()] == ["finished"] * 4
    assert search.trials()[0] == before[0] and search.trials()[1]["params"] == before[1]["params"]
    assert all(set(counts.values()) <= {1} for counts in search.steps().values())
