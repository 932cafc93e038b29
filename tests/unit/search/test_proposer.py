"""The Optuna study built again from notes: a search that was stopped goes on as though it had not been."""

from __future__ import annotations

import pytest

from orchestrator.plan.ledger.backends import open_backend
from orchestrator.plan.trials import Trial, TrialNotes, front_of, search_id
from orchestrator.search.tuning import Proposer
from orchestrator.spec.loader import load_experiment


def score(values) -> dict[str, float]:
    """A made-up landscape: more full tokens are better and dearer."""
    schedule = values["phases.finetune.schedule"]["stages"]
    return {"eval/vqa/accuracy": 1 / len(schedule), "cost/train_tflops": float(len(str(schedule)))}


def search_on(loaded, notes: TrialNotes, count: int, die_at: int | None = None) -> list[Trial]:
    """What a driver does, one trial after the other; it may be killed between a proposal and its end."""
    proposer = Proposer(loaded.spec, notes.read(), mailbox=None)
    known = {trial.number: trial for trial in notes.read()}
    for number in range(count):
        if number in known and known[number].state != "proposed":
            continue
        config = proposer.suggest(str(number))
        trial = Trial(config["number"], config["params"], config["values"])
        assert trial.number == number
        notes.write(trial)
        if number == die_at:
            return notes.read()
        if number == 2:
            notes.write(trial.failed("diverged"))
            proposer.on_trial_complete(str(number), {"failed": "diverged"})
        else:
            notes.write(Trial(number, trial.params, trial.values, "finished", (str(number),), score(trial.values)))
            proposer.on_trial_complete(str(number), score(trial.values))
    return notes.read()


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("die_at", [0, 5, 13])
def test_a_killed_search_proposes_what_an_undisturbed_one_does(die_at, sampler, search_text, tmp_path):
    # 14 trials: beyond the ten that TPE draws at random.
    file = tmp_path / "search.yaml"
    file.write_text(search_text + f"  algorithm: {{sampler: {sampler}}}\n")
    loaded = load_experiment(file)
    whole = search_on(loaded, TrialNotes(open_backend(tmp_path / "a"), "s"), 14)
    notes = TrialNotes(open_backend(tmp_path / "b"), "s")
    search_on(loaded, notes, 14, die_at)
    assert search_on(loaded, notes, 14) == whole
    assert len({str(trial.values) for trial in whole}) == 14, "a recipe is not proposed twice"


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
