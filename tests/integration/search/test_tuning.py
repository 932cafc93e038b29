"""Ray Tune with trials that only wait, on a Ray whose CPUs are all taken: as on two cores with one lane."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from orchestrator.dispatch.ray.session import ray_session
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.trials import Trial
from orchestrator.search.tuning import run_tuning

SCORES = {"eval/vqa/accuracy": 0.5, "cost/train_tflops": 1.0}


@pytest.fixture(scope="module")
def busy_ray():
    """A Ray of our own; a lane holds every CPU."""
    with ray_session(None):
        import ray

        class Lane:
            def ready(self):
                return True

        lane = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Lane).remote()
        assert ray.get(lane.ready.remote())
        yield


def tune(walk, count, folder, stop_after=None):
    """Answers proposals as they come, and returns them by number: two may come in either order."""
    found = []
    with run_tuning(walk, count, 2, folder) as tuning:
        while not tuning.ended:
            for proposal in tuning.take():
                found.append(Trial(**proposal))
                if len(found) == stop_after:
                    return sorted(found, key=lambda trial: trial.number)
                tuning.answer(proposal["number"], {"failed": "diverged"} if proposal["number"] == 1 else SCORES)
    return sorted(found, key=lambda trial: trial.number)


def test_trials_wait_without_a_cpu_and_a_failed_one_does_not_end_the_search(busy_ray, search_file, tmp_path, capfd):
    folder, before = tmp_path / "tune", dict(os.environ)
    found = tune(prepare(search_file), 4, folder)
    assert [trial.number for trial in found] == [0, 1, 2, 3]
    assert all(trial.values["phases.finetune.schedule"]["kind"] == "stages" for trial in found)
    assert not folder.exists() and dict(os.environ) == before
    told = capfd.readouterr()
    assert told.out == "" and told.err == ""


@pytest.mark.slow
def test_what_was_proposed_before_is_proposed_again_first(busy_ray, search_file, tmp_path):
    walk = prepare(search_file)
    first = tune(walk, 4, tmp_path / "a", stop_after=3)
    ended = [replace(trial, state="finished", objectives=SCORES) for trial in first[:1]]
    again = tune(replace(walk, trials=(*ended, *first[1:])), 3, tmp_path / "b")
    assert {trial.number for trial in again} == {1, 2, 3}
    known = {trial.number: trial for trial in first}
    assert all(trial == known[trial.number] for trial in again if trial.number in known)
