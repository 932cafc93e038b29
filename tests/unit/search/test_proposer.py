"""The Optuna study built again from notes: a search that was stopped goes on as though it had not been."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from ray.tune.search import Searcher

from orchestrator.plan.documents import plan_document
from orchestrator.plan.experiment_plan import plan_trials
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.backends import open_backend
from orchestrator.plan.trials import Trial, TrialNotes, front_of, search_id
from orchestrator.search.budget import most_trials
from orchestrator.search.shared_work import SharedWork
from orchestrator.search.trial_mailbox import PROPOSAL
from orchestrator.search.tuning import CANDIDATES, Proposer
from orchestrator.spec.loader import load_experiment


def score(values) -> dict[str, float]:
    """A made-up landscape: more full tokens are better and dearer."""
    schedule = values["phases.finetune.schedule"]["stages"]
    return {"eval/vqa/accuracy": 1 / len(schedule), "cost/train_tflops": float(len(str(schedule)))}


def search_on(loaded, notes: TrialNotes, count: int, die_at: int | None = None) -> list[Trial]:
    """What a driver does, one trial after the other; it may be killed between a proposal and its end."""
    shared = SharedWork(loaded) if loaded.spec.search.algorithm.prefer_shared else None
    proposer = Proposer(loaded.spec, notes.read(), mailbox=None, shared=shared)
    known = {trial.number: trial for trial in notes.read()}
    for number in range(count):
        if number in known and known[number].state != "proposed":
            continue
        config = proposer.suggest(str(number))
        trial = Trial(**{key: config[key] for key in PROPOSAL})
        assert trial.number == number
        notes.write(trial)
        if number == die_at:
            return notes.read()
        if number == 2:
            notes.write(trial.failed("diverged"))
            proposer.on_trial_complete(str(number), {"failed": "diverged"})
        else:
            ended = {"state": "finished", "cells": (str(number),), "objectives": score(trial.values)}
            notes.write(replace(trial, **ended))
            proposer.on_trial_complete(str(number), score(trial.values))
    return notes.read()


ALGORITHMS = [
    "{sampler: tpe}",
    "{sampler: tpe, prefer_shared: true}",
    "{sampler: random}",
    "{sampler: nsga2, population_size: 4}",
    "{kind: grid}",
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "die_at", [pytest.param(0, marks=pytest.mark.slow), 5, pytest.param(13, marks=pytest.mark.slow)]
)
def test_a_killed_search_proposes_what_an_undisturbed_one_does(die_at, algorithm, search_text, tmp_path):
    # 14 trials: beyond the ten that TPE draws at random.
    file = tmp_path / "search.yaml"
    file.write_text(search_text.replace("num_trials: 4", "num_trials: 14") + f"  algorithm: {algorithm}\n")
    loaded = load_experiment(file)
    whole = search_on(loaded, TrialNotes(open_backend(tmp_path / "a"), "s"), 14)
    notes = TrialNotes(open_backend(tmp_path / "b"), "s")
    search_on(loaded, notes, 14, die_at)
    assert search_on(loaded, notes, 14) == whole
    assert len({str(trial.values) for trial in whole}) == 14, "a recipe is not proposed twice"


def test_generations_outlive_a_driver_that_had_several_trials_under_way(search_text, tmp_path):
    file = tmp_path / "search.yaml"
    text = search_text.replace("num_trials: 4", "num_trials: 99").replace("boundaries: 1/4", "boundaries: 1/8")
    file.write_text(text + "  algorithm: {sampler: nsga2, population_size: 4}\n")
    spec = load_experiment(file).spec
    proposer, trials = Proposer(spec, (), None), []

    def generations(one: Proposer) -> list[int]:
        return [next(iter(trial.sampler_state.values())) for trial in trials[: one._ot_study.trials[-1].number + 1]]

    def take(one: Proposer) -> None:
        config = one.suggest(str(len(trials)))
        trials.append(Trial(**{key: config[key] for key in PROPOSAL}))

    def end(one: Proposer, number: int) -> None:
        one.on_trial_complete(str(number), score(trials[number].values))
        trials[number] = replace(
            trials[number], state="finished", cells=("x",), objectives=score(trials[number].values)
        )

    for number in range(20):  # two trials side by side, of which the younger ends first
        take(proposer)
        if number % 2:
            end(proposer, number)
            end(proposer, number - 1)
    assert (
        generations(proposer)[0] == 0
        and generations(proposer)[-1] >= 3
        and generations(proposer) == sorted(generations(proposer))
    )
    take(proposer), take(proposer)
    end(proposer, 21)
    resumed = Proposer(spec, trials, None)  # trial 20 was proposed and not ended
    again = resumed.suggest("20")
    assert {key: again[key] for key in PROPOSAL} == {key: getattr(trials[20], key) for key in PROPOSAL}
    seen = [dict(trial.system_attrs) for trial in resumed._ot_study.trials]
    assert [next(v for k, v in one.items() if k.endswith("generation")) for one in seen] == generations(resumed)
    end(proposer, 20)
    end_of_both = {"values": trials[20].objectives}
    resumed.on_trial_complete("20", end_of_both["values"])
    assert resumed._drawn() == proposer._drawn()


def test_a_grid_has_every_recipe_once_and_ends(search_text, tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text(search_text.replace("num_trials: 4", "num_trials: 999") + "  algorithm: {kind: grid}\n")
    spec = load_experiment(file).spec
    proposer, found = Proposer(spec, (), None), []
    while (config := proposer.suggest(str(len(found)))) != Searcher.FINISHED:
        found.append(str(config["values"]))
    # full; three ends of one heavier stage of three; three pairs of ends of three pairs of two different ones.
    assert len(found) == len(set(found)) == most_trials(spec) == 1 + 3 * 3 + 3 * 3
    assert found != sorted(found), "in no order, so that the first of them are spread over the space"


def test_a_number_without_a_note_is_drawn_anew_and_first(loaded, tmp_path):
    notes = TrialNotes(open_backend(tmp_path / "a"), "s")
    whole = search_on(loaded, notes, 4)
    proposer = Proposer(loaded.spec, [whole[0], whole[2]], mailbox=None)
    assert [proposer.suggest(name)["number"] for name in "abc"] == [1, 3, 4]


def test_a_space_that_is_used_up_proposes_again_what_it_has(search_text, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(search_text.replace("[1, 2, 3]", "[2]").replace("[full, light, heavy, wide]", "[heavy]"))
    trials = search_on(load_experiment(file), TrialNotes(open_backend(tmp_path / "a"), "s"), 5)
    assert len({str(trial.values) for trial in trials[:3]}) == len({str(trial.values) for trial in trials}) == 3


def test_seeds_draw_differently(search_text, tmp_path):
    found = []
    for seed in (0, 1):
        file = tmp_path / f"{seed}.yaml"
        file.write_text(search_text + f"seed: {seed}\n")
        found.append(search_on(load_experiment(file), TrialNotes(open_backend(tmp_path / str(seed)), "s"), 6))
    assert [trial.params for trial in found[0]] != [trial.params for trial in found[1]]


def test_a_search_is_the_same_one_with_more_trials_and_another_one_with_another_space(search_text, tmp_path):
    def identity(text: str) -> str:
        file = tmp_path / "search.yaml"
        file.write_text(text)
        return search_id(load_experiment(file))

    first = identity(search_text)
    assert identity(search_text.replace("num_trials: 4", "num_trials: 9")) == first
    for old, new in [
        ("num_stages: [1, 2, 3]", "num_stages: [1, 2]"), ("train_tflops: min", "train_tflops: max"),
        ("learning_rate: 1.0e-3", "learning_rate: 2.0e-3"), ("num_trials: 4", "algorithm: {sampler: random}"),
    ]:  # fmt: skip
        assert old in search_text and identity(search_text.replace(old, new)) != first


def test_the_front_holds_the_cells_of_the_best_trials(loaded):
    search = loaded.spec.search
    trials = [
        Trial(n, {}, {}, "finished", (f"{n}a", f"{n}b"), {"eval/vqa/accuracy": a, "cost/train_tflops": c})
        for n, (a, c) in enumerate([(0.5, 2.0), (0.4, 1.0), (0.4, 3.0)])
    ]
    assert front_of([*trials, Trial(3, {}, {}), Trial(4, {}, {}).failed("no")], search) == {"0a", "0b", "1a", "1b"}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_of_the_recipes_drawn_the_one_that_adds_least_is_proposed(sampler, search_text, tmp_path):
    file = tmp_path / "search.yaml"
    text = search_text.replace("num_trials: 4", "num_trials: 14").replace("boundaries: 1/4", "boundaries: 1/8")
    file.write_text(f"{text}  algorithm: {{sampler: {sampler}, prefer_shared: true}}\n")
    loaded = load_experiment(file)
    trials = search_on(loaded, TrialNotes(open_backend(tmp_path / "a"), "s"), 14)
    ledger = Ledger(tmp_path / "runs")

    def tflops(some: list[Trial]) -> float:
        plan = plan_trials(loaded, ledger, some)
        return plan_document(loaded, plan.cells, plan.tree, ledger)["totals"]["train_tflops_shared"]

    for number in (4, 13):
        before = trials[:number]
        proposer = Proposer(loaded.spec, before, None, SharedWork(loaded))
        drawn = [proposer._draw(candidate) for candidate in range(CANDIDATES)]
        there = [trial for trial in before if trial.state == "finished"]
        values = [json.loads(recipe) for *_, recipe in drawn]
        costs = [tflops([*there, Trial(number, {}, value)]) for value in values]
        assert len(set(costs)) > 1
        assert tflops([*there, trials[number]]) == pytest.approx(min(costs))
        assert trials[number].values not in [trial.values for trial in before]
    plain = load_experiment(file, ["search.algorithm.prefer_shared=false"])
    others = search_on(plain, TrialNotes(open_backend(tmp_path / "b"), "s"), 14)
    assert tflops(trials) < tflops(others)


def test_a_search_is_another_one_with_another_algorithm_or_seed(search_text, tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text(search_text)
    found = [search_id(load_experiment(file, [f"search.algorithm={{{given}}}"])) for given in (
        "", "prefer_shared: false, seed: null", "prefer_shared: true", "seed: 0", "seed: 1")]  # fmt: skip
    assert found[0] == found[1] and len(set(found)) == 4


@pytest.mark.parametrize("algorithm", ["kind: optuna", "kind: random", "kind: grid"])
def test_the_algorithms_seed_stands_in_for_the_files_in_what_is_drawn_only(algorithm, search_text, tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text(search_text)

    def drawn(*overrides: str) -> list[str]:
        loaded = load_experiment(file, [f"search.algorithm={{{algorithm}}}", *overrides])
        proposer = Proposer(loaded.spec, (), None)
        return [str(proposer.suggest(name)["values"]) for name in "abcd"]

    assert drawn("search.algorithm.seed=5") == drawn("seed=5") != drawn()


def test_what_diverged_is_told_as_failed_and_what_was_stopped_as_pruned(search_text, tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(search_text.replace(", cost/train_tflops: min", ""))
    proposer = Proposer(load_experiment(file).spec, (), None)
    for name in "abc":
        proposer.suggest(name)
    proposer.on_trial_complete("a", {"failed": "diverged: the loss of step 3 is nan"})
    proposer.on_trial_complete("b", {"rung:2500": 0.25, "rung:5000": 0.5})
    proposer.on_trial_complete("c", {"eval/vqa/accuracy": 0.75})
    states = [(trial.state.name, trial.values, trial.intermediate_values) for trial in proposer._ot_study.trials]
    assert states == [("FAIL", None, {}), ("PRUNED", [0.5], {2500: 0.25, 5000: 0.5}), ("COMPLETE", [0.75], {})]
