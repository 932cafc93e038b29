"""Draws from a space: every one valid at once, sorted where the order matters, and nothing that could not be drawn."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import ClassVar

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orchestrator_plugins.schedules.stages import StagesSpec

from orchestrator import registry
from orchestrator.errors import SpecError
from orchestrator.spec.loader import load_experiment
from orchestrator.spec.search import SearchSpec
from orchestrator.spec.search_space import (
    GridTooLargeError,
    draw,
    grid,
    inner_boundaries,
    stages,
    summary,
    variant_layer_tokens,
)

TOKENS = {
    "heavy": Fraction(22),
    "wide": Fraction(40),
    "light": Fraction(48),
    "twin": Fraction(40),
    "full": Fraction(64),
}
PATH = "phases.finetune.schedule"


class FromHypothesis:
    """Draws with Hypothesis; refuses a parameter whose range changes from draw to draw, as TPE does."""

    ranges: ClassVar[dict[str, tuple]] = {}

    def __init__(self, data: st.DataObject, space: object) -> None:
        self.data, self.space = data, space

    def suggest_categorical(self, name, choices):
        return self.data.draw(st.sampled_from(list(choices)), name)

    def suggest_int(self, name, low, high):
        assert self.ranges.setdefault(f"{self.space}/{name}", (low, high)) == (low, high)
        return self.data.draw(st.integers(low, high), name)

    def suggest_float(self, name, low, high, *, log=False):
        return self.data.draw(st.floats(low, high), name)


@st.composite
def spaces(draw_from) -> SearchSpec:
    denominator = draw_from(st.integers(2, 9))
    names = st.lists(st.sampled_from(sorted(TOKENS)), min_size=1, max_size=5, unique=True)
    entry = {
        "kind": "staged_space",
        "num_stages": draw_from(st.lists(st.integers(1, min(4, denominator)), min_size=1, max_size=3, unique=True)),
        "variants": draw_from(names),
        "heavy_to_light": draw_from(st.booleans()),
        "last": draw_from(st.sampled_from([None, "full"])),
        "boundaries": f"1/{denominator}",
    }
    return SearchSpec.model_validate({"objectives": {"eval/vqa/accuracy": "max"}, "space": {PATH: entry}})


@settings(max_examples=300, deadline=None)
@given(spaces(), st.data())
def test_every_draw_is_a_valid_schedule(search, data):
    entry = search.space[PATH]
    value = draw(FromHypothesis(data, search), search, TOKENS)[PATH]
    spec = StagesSpec.model_validate(value)
    found = [stage.compressor for stage in spec.stages]
    ends = list(itertools.accumulate(stage.share for stage in spec.stages))
    assert ends[-1] == 1
    assert all((end / entry.boundaries).denominator == 1 for end in ends[:-1])
    assert len(found) <= max(entry.num_stages)
    assert set(found) <= {*entry.variants, entry.last}
    assert all(a != b for a, b in itertools.pairwise(found)), "equal neighbours are one stage"
    if entry.heavy_to_light:
        assert [TOKENS[name] for name in found] == sorted(TOKENS[name] for name in found)
    if entry.last is not None:
        assert found[-1] == entry.last
    table = spec.compile(720, 8)
    assert table.actions[-1][1] == 720
    assert summary(value).count(",") == len(found) - 1


def test_every_cut_can_be_drawn():
    entry = {
        "kind": "staged_space",
        "num_stages": [3],
        "variants": ["heavy", "wide"],
        "last": "full",
        "boundaries": "1/5",
    }
    search = SearchSpec.model_validate({"objectives": {"a": "max"}, "space": {PATH: entry}})
    assert inner_boundaries(search.space[PATH]) == 4
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(400):
        value = draw(study.ask(), search, TOKENS)[PATH]
        if len(value["stages"]) == 3:
            seen.add(tuple(stage["share"] for stage in value["stages"][:2]))
    assert seen == {(f"{Fraction(a, 5)}", f"{Fraction(b - a, 5)}") for a, b in itertools.combinations(range(1, 5), 2)}


def test_neighbours_that_are_equal_become_one_stage():
    value = stages(["heavy", "heavy", "full"], [Fraction(1, 8), Fraction(3, 8)])
    assert value["stages"] == [{"share": "3/8", "compressor": "heavy"}, {"share": "5/8", "compressor": "full"}]
    assert summary(value) == "heavy 3/8, full"


def test_compression_is_compared_by_what_the_model_keeps(loaded):
    assert variant_layer_tokens(loaded.spec) == {"heavy": 22, "wide": 40, "light": 48, "full": 64}


def order_of(spec, **variants):
    kind = registry.spec_class(registry.COMPRESSORS, "average_pool")
    points = {name: (kind.model_validate({"kind": "average_pool", **fields}),) for name, fields in variants.items()}
    found = variant_layer_tokens(spec.model_copy(update={"compressors": spec.compressors | points}))
    return sorted(found, key=found.__getitem__)


def test_where_images_vary_in_size_the_order_is_one_that_holds_at_every_size(loaded, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    spec = loaded.spec.model_copy(
        update={"model": loaded.spec.model.model_copy(update={"model_name_or_path": str(tmp_path)})}
    )
    shares = {"heavy": {"layer": 1, "stride": 8}, "wide": {"layer": 1, "stride": 4}}
    assert order_of(spec, **shares, light={"layer": 40, "keep_ratio": "1/2"}) == ["heavy", "wide", "light", "full"]
    kept = {"layer": 1, "keep_tokens": 64}  # an eighth of 512 tokens
    with pytest.raises(ValueError, match="compresses more depends on the size of an image"):
        order_of(spec, heavy={"layer": 1, "stride": 8}, wide=kept, light={"layer": 40, "keep_ratio": "1/2"})


RATE, STEPS, SEED = "phases.finetune.learning_rate", "phases.finetune.max_steps", "phases.finetune.seed"
WARMUP, TRAIN = "phases.finetune.warmup_ratio", "phases.finetune.train"


def drawn_from(space: dict, count: int = 200) -> list[dict]:
    search = SearchSpec.model_validate({"objectives": {"a": "max"}, "space": space})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [draw(study.ask(), search, {}) for _ in range(count)]


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ({"kind": "uniform", "low": 0, "high": 0.3, "step": 0.1}, {0.0, 0.1, 0.2, 0.3}),
        ({"kind": "uniform", "low": -1.5, "high": 0, "step": 0.5}, {-1.5, -1.0, -0.5, 0.0}),
        ({"kind": "int_uniform", "low": 2, "high": 5}, {2, 3, 4, 5}),
        ({"kind": "int_uniform", "low": -4, "high": 8, "step": 4}, {-4, 0, 4, 8}),
        ({"kind": "log_int_uniform", "low": 1, "high": 3}, {1, 2, 3}),
        ({"kind": "choice", "values": [1, 1.5, True, "one"]}, {1, 1.5, "one"}),
    ],
)
def test_every_value_of_a_domain_is_drawn_as_a_file_would_write_it(entry, values):
    found = {draw[RATE] for draw in drawn_from({RATE: entry})}
    assert found == values and {type(each) for each in found} == {type(each) for each in values}


def test_numbers_between_bounds_and_choices_of_lists():
    logs = [draw[RATE] for draw in drawn_from({RATE: {"kind": "log_uniform", "low": 1e-5, "high": 1e-3}})]
    assert all(1e-5 <= rate <= 1e-3 for rate in logs) and 60 < sum(rate < 1e-4 for rate in logs) < 140
    lists = [["projector"], ["projector", "language_model"]]
    found = [draw[TRAIN] for draw in drawn_from({TRAIN: {"kind": "choice", "values": lists}})]
    assert all(each in lists for each in found) and all(each in found for each in lists)


CONDITIONAL = {
    "phases.finetune.lr_scheduler_type": {"kind": "choice", "values": ["constant", "cosine", "linear"]},
    WARMUP: {
        "kind": "choice", "values": [0.0, 0.1], "when": {"phases.finetune.lr_scheduler_type": ["cosine", "linear"]},
    },
    SEED: {"kind": "int_uniform", "low": 0, "high": 3, "when": {WARMUP: 0.1}},
}  # fmt: skip


def test_an_entry_is_drawn_only_where_its_condition_holds():
    found = drawn_from(CONDITIONAL)
    assert all((WARMUP in draw) == (draw["phases.finetune.lr_scheduler_type"] != "constant") for draw in found)
    assert all((SEED in draw) == (draw.get(WARMUP) == 0.1) for draw in found)
    assert {len(draw) for draw in found} == {1, 2, 3}


def test_a_grid_of_a_conditional_space_has_each_recipe_once():
    search = SearchSpec.model_validate({"objectives": {"a": "max"}, "space": CONDITIONAL})
    found = list(grid(search, {}))
    assert [len(values) for _, values in found] == [1, *([2] + [3] * 4) * 2]
    assert all(draw(optuna.trial.FixedTrial(params), search, {}) == values for params, values in found)
    with pytest.raises(GridTooLargeError):
        list(grid(search, {}, most=10))
    assert len(list(grid(search, {}, most=11))) == 11


SPACE = "  space:\n"
NUM = "num_trials: 4"
LAST = "variants: [full, light, heavy, wide]\n      last: full"
WRONG = [
    ("num_stages: [1, 2, 3]", "num_stages: [5]", "num_stages", "5 stages do not fit"),
    (LAST, "variants: [full]\n      last: heavy", "variants", "at least as much as the last stage"),
    ("eval/vqa/accuracy: max", "eval/vqb/accuracy: max", "eval/vqb/accuracy", "no trial would have this metric"),
    ("eval/vqa/accuracy: max", "eval/vqa/acuracy: max", "eval/vqa/acuracy", "did you mean eval/vqa/accuracy?"),
    ("eval/vqa/accuracy: max", "eval/vqa/under_heavy/accuracy: max", "under_heavy", "no trial would have this metric"),
    ("cost/train_tflops: min", "cost/pretrain/train_seconds: min", "cost/pretrain", "no trial would have this"),
    ("cost/train_tflops: min", "cost/train_tflop: min", "cost/train_tflop", "did you mean cost/train_tflops"),
    ("boundaries: 1/4", "boundaries: 1/16", "schedule", "never starts"),
    ("search:", "matrix: {phases.finetune.schedule: [full]}\nsearch:", "matrix", "only `seed`"),
    ("search:", "controls: [stride]\nsearch:", "controls", "proposed one by one"),
    (SPACE, "cluster.lanes: {kind: choice, values: [1]}", "lanes", "no part of a cell"),
    (SPACE, "phases.finetune.max_steps: {kind: uniform, low: 1.5, high: 9.0}", "max_steps", "a whole number"),
    (SPACE, "phases.finetune.learning_rate: {kind: uniform, low: 2.0, high: 1.0}", "low", "more than `high`"),
    (SPACE, f"{RATE}: {{kind: log_uniform, low: 0, high: 1.0}}", "low", "a logarithm needs"),
    (SPACE, f"{RATE}: {{kind: uniform, low: 0.1, high: 1.0, step: 0.4}}", "step", "never reach 1.0"),
    (SPACE, f"{STEPS}: {{kind: log_int_uniform, low: 4, high: 8, step: 2}}", "step", "has no steps"),
    (SPACE, f"{STEPS}: {{kind: int_uniform, low: 0, high: 8}}", "max_steps", "must be at least 1"),
    (SPACE, f"{RATE}: {{kind: choice, values: [1.0e-3], when: {{{SEED}: 1}}}}", f"when.{SEED}", "no choice of plain"),
    (
        SPACE,
        f"{SEED}: {{kind: choice, values: [1]}}\n    {RATE}: {{kind: choice, values: [1.0], when: {{{SEED}: 2}}}}",
        f"when.{SEED}",
        "is never 2",
    ),
    # Only with the second value of the first entry is the mistake in the second one met.
    (
        SPACE,
        f"{SEED}: {{kind: choice, values: [1, 2]}}\n    {STEPS}: {{kind: choice, values: [4, 8, -1], "
        f"when: {{{SEED}: 2}}}}",
        "max_steps",
        "-1",
    ),
    (NUM, "num_trials: 40\n  algorithm: {sampler: nsga2}", "population_size", "random first generation, which has 50"),
    (NUM, "num_trials: 4\n  algorithm: {population_size: 3}", "population_size", "only `sampler: nsga2`"),
    (NUM, "num_trials: 4\n  algorithm: {kind: grid, prefer_shared: true}", "prefer_shared", "a grid has every recipe"),
    (NUM, "num_trials: 4\n  algorithm: {kind: random, sampler: tpe}", "algorithm.sampler", "has no sampler"),
]


@pytest.mark.parametrize(("old", "new", "path", "message"), WRONG, ids=[case[1].strip()[:24] for case in WRONG])
def test_validate_tells_what_no_trial_could_be_and_where(old, new, path, message, search_text, tmp_path):
    file = tmp_path / "wrong.yaml"
    text = search_text.replace(old, f"{SPACE}    {new}\n" if old == SPACE else new, 1)
    assert text != search_text
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_experiment(file)
    told = [fault for fault in caught.value.errors if path in fault.path and message in str(fault)]
    assert told, str(caught.value)
    assert all(fault.line is not None for fault in told)


def test_an_objective_on_a_test_split_is_flagged(search_text, tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text(search_text)
    (note,) = load_experiment(file).notices
    assert note.startswith("search.objectives.eval/vqa/accuracy: it is measured on data.test, a test split")
    assert load_experiment(file, ["data.test.split=train"]).notices == ()
    assert load_experiment(file, ["search.objectives={cost/train_tflops: min}"]).notices == ()


def test_paths_to_choose_from_are_relative_to_the_file_and_checked(search_text, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "other.json").write_text("{}")
    file = tmp_path / "sub" / "search.yaml"
    choice = "    phases.finetune.deepspeed: {kind: choice, values: [zero0, ../other.json]}\n"
    file.write_text(search_text.replace(SPACE, SPACE + choice, 1))
    loaded = load_experiment(file)
    assert loaded.spec.search.space["phases.finetune.deepspeed"].values == ("zero0", str(tmp_path / "other.json"))
    assert str(tmp_path / "other.json") in {each.path for each in loaded.named}  # so it travels with `submit`
    file.write_text(file.read_text().replace("other.json", "othr.json"))
    with pytest.raises(SpecError, match=r"there is no file at .*othr\.json"):
        load_experiment(file)
