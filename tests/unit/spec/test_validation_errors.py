"""Wrong files: each error with its line, column, path, value, and the nearest known name."""

# ruff: noqa: E501 (a table is read by its columns)
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import ErrorDetail, SpecError
from orchestrator.spec.loader import MAX_ERRORS, load_experiment


def errors_of(path: Path, *overrides: str) -> tuple[ErrorDetail, ...]:
    with pytest.raises(SpecError) as caught:
        load_experiment(path, overrides)
    return caught.value.errors


# (what is replaced in the small experiment, by what, position, path, part of the message, part of the hint or allowed)
WRONG = [
    ("name: small", "nam: small", (1, 1), "nam", "unknown key `nam`", "did you mean name?"),
    ("name: small\n", "", (1, 1), "name", "the key `name` is missing", None),
    ("name: small", "name: a b", (1, 7), "name", "a name is made of", None),
    ("name: small", "name: 5", (1, 7), "name", "expected text, got a number", None),
    ("name: small", "name: small\nschema_version: 2", (2, 17), "schema_version", "not one of the values", "1"),
    ("model_name_or_path: tiny", "model_name_or_path: tinny", (2, 29), "model.model_name_or_path", "no model folder", "tiny"),
    ("weights: random", "weights: randm", (2, 44), "model.weights", "not one of the values", "random"),
    ("weights: random", "weights: {vision: x/y}", (2, 45), "model.weights.vision", "unknown key `vision`", "vision_tower"),
    ("weights: random", "weights: {projector: ./x.bin}", (2, 56), "model.weights.projector", "no folder or weight file", None),
    ("weights: random", "dtype: float23", (2, 42), "model.dtype", "not one of the values", "float32"),
    ("model: {", "model: [{", None, "", "not valid YAML", None),
    ("model: {model_name_or_path: tiny, weights: random}", "model: [tiny]", (2, 8), "model", "expected a mapping of keys, got a list", None),
    ("model: {model_name_or_path: tiny, weights: random}", "model: {weights: random}", (2, 1), "model.model_name_or_path", "is missing", None),
    ("kind: easy_vqa, split: train", "kind: easy_vq, split: train", (4, 17), "data.train.kind", "unknown kind `easy_vq`", "easy_vqa"),
    ("kind: easy_vqa, split: train", "kind: my_own_rows, split: train", (4, 17), "data.train.kind", "unknown kind `my_own_rows`", "needs its file under plugins"),
    ("kind: easy_vqa, split: train", "split: train", (4, 3), "data.train.kind", "the key `kind` is missing", "easy_vqa"),
    ("split: train", "split: training", (4, 34), "data.train.split", "not one of the values", "train"),
    ("{kind: easy_vqa, split: train}", "easy_vqa", (4, 10), "data.train", "expected a mapping with a `kind`, got text", None),
    ("stride: 8", "strid: 8", (7, 41), "compressors.heavy.strid", "unknown key `strid`", "stride"),
    ("stride: 8", "stride: 0", (7, 49), "compressors.heavy.stride", "must be at least 1", None),
    ("stride: 8", "stride: 2.5", (7, 49), "compressors.heavy.stride", "expected a whole number, got a number", None),
    ("stride: 8", "stride: true", (7, 49), "compressors.heavy.stride", "expected a whole number, got true or false", None),
    ("stride: 8", "stride: 8, keep_tokens: 4", (7, 10), "compressors.heavy", "exactly one of stride", None),
    (", stride: 8", "", (7, 10), "compressors.heavy", "exactly one of stride", None),
    ("stride: 8", "stride: 65", (7, 49), "compressors.heavy.stride", "more than the 64 visual tokens", "1 to 64"),
    ("stride: 8", "keep_tokens: 65", (7, 54), "compressors.heavy.keep_tokens", "more than the image's 64", None),
    ("layer: 2, stride: 8", "layer: 4, stride: 8", (7, 38), "compressors.heavy.layer", "4 decoder layers, 0 to 3", "0 to 3"),
    ("layer: 2, stride: 8", "layer: -1, stride: 8", (7, 38), "compressors.heavy.layer", "counted from 0", None),
    ("layer: 2, stride: 8", "layer: 100%, stride: 8", (7, 38), "compressors.heavy.layer", "less than 100%", None),
    ("layer: 2, stride: 8", "layer: middle, stride: 8", (7, 38), "compressors.heavy.layer", "whole number, a share", None),
    ("average_pool, layer: 2", "fastv, layer: projector", (7, 31), "compressors.heavy.layer", "does not act at the projector", None),
    ("average_pool, layer: 2, stride: 8", "fourier, layer: 2, keep_tokens: 62", (7, 49), "compressors.heavy.keep_tokens", "nearest possible is 56 or 64", None),
    ("heavy: {", "full: {", (7, 3), "compressors.full", "reserved name", None),
    ("heavy: {", "final: {", (7, 3), "compressors.final", "reserved name", None),
    ("heavy: {", "two: {", (10, 3), "schedules.two", "both a schedule and a variant (line 7)", "rename"),
    ("heavy: {", "'a b': {", (7, 3), "compressors.a b", "this name cannot be used", "letters"),
    (
        "heavy: {kind: average_pool, layer: 2, stride: 8}",
        "heavy: [{kind: average_pool, layer: 2, stride: 8}, {kind: average_pool, layer: 2, stride: 2}]",
        (7, 82),
        "compressors.heavy.1.layer",
        "not after the point before it at layer 2",
        "more than 2",
    ),
    (  # of one row of 16 tokens 10 could be kept; the first point leaves 4 x 4
        "heavy: {kind: average_pool, layer: 2, stride: 8}",
        "heavy: [{kind: fourier, layer: 1, stride: 4}, {kind: fourier, layer: 2, keep_tokens: 10}]",
        (7, 88),
        "compressors.heavy.1.keep_tokens",
        "nearest possible is 9 or 12",
        None,
    ),
    ("compressor: heavy", "compressor: hevy", (12, 39), "schedules.two.stages.0.compressor", "no variant `hevy`", "heavy"),
    ("share: 1/2", "share: 1/3, steps: 3", (12, 14), "schedules.two.stages.0", "one of share, steps", None),
    ("share: 1/2", "share: 2", (12, 22), "schedules.two.stages.0.share", "at most 1", None),
    ("share: 1/2", "share: 1/1000", (10, 3), "schedules.two", "stage 1 (heavy) never starts", "100 steps"),
    ("}, {}]", "}]", (10, 3), "schedules.two", "leaves a gap", None),
    ("}, {}]", "}, {}, {}]", (10, 3), "schedules.two", "at most one stage", None),
    ("stages: [{share: 1/2, compressor: heavy}, {}]", "stages: {a: 1}", (12, 13), "schedules.two.stages", "expected a list, got a mapping", None),
    ("kind: stages", "kind: stage", (11, 11), "schedules.two.kind", "unknown kind `stage`", "stages"),
    ("finetune:", "finetun:", (14, 3), "phases.finetun", "unknown key", "finetune"),
    ("data: train\n", "data: trian\n", (15, 11), "phases.finetune.data", "no data set `trian`", "train"),
    ("data: train\n", "data: {train: 1.0, extra: 0.5}\n", (15, 24), "phases.finetune.data.extra", "no data set `extra`", None),
    ("data: train\n", "data: {train: -1.0}\n", (15, 19), "phases.finetune.data.train", "must be more than 0", None),
    ("data: train\n", "data: 3\n", (15, 11), "phases.finetune.data", "expected text or a mapping of keys, got a number", None),
    ("    data: train\n", "", (14, 3), "phases.finetune.data", "the key `data` is missing", None),
    ("schedule: two", "schedule: tow", (16, 15), "phases.finetune.schedule", "no schedule or variant `tow`", "two"),
    ("schedule: two", "schedule: {kind: constant, compressor: x}", (16, 44), "phases.finetune.schedule.compressor", "no variant `x`", None),
    ("max_steps: 100", "max_steps: -5", (17, 16), "phases.finetune.max_steps", "must be at least 1", None),
    ("max_steps: 100", "max_steps: ten", (17, 16), "phases.finetune.max_steps", "expected a whole number, got text", None),
    ("max_steps: 100", "max_stepps: 100", (17, 5), "phases.finetune.max_stepps", "unknown key", "max_steps"),
    ("    max_steps: 100\n", "", (14, 3), "phases.finetune", "no length", "max_steps"),
    ("max_steps: 100", "max_steps: 100\n    num_train_epochs: 1", (18, 23), "phases.finetune.num_train_epochs", "one length", "max_steps"),
    ("learning_rate: 1e-3", "learning_rate: -1e-3", (18, 20), "phases.finetune.learning_rate", "must be more than 0", None),
    ("learning_rate: 1e-3", "learning_rate: .inf", (18, 20), "phases.finetune.learning_rate", "finite", None),
    ("learning_rate: 1e-3", "learning_rate: {language_model: 1e-3, projector: 1e-3, vision_tower: 1e-3}", (18, 74), "phases.finetune.learning_rate.vision_tower", "has a learning rate but does not train", "vision_tower"),
    ("learning_rate: 1e-3", "learning_rate: {projector: 1e-3}", (18, 20), "phases.finetune.learning_rate", "language_model trains without", None),
    ("learning_rate: 1e-3", "train: [projector, language_modl]", (18, 24), "phases.finetune.train.1", "not one of the values", "language_model"),
    ("learning_rate: 1e-3", "train: []", (18, 12), "phases.finetune.train", "nothing trains", None),
    ("learning_rate: 1e-3", "global_batch_size: 100", (18, 24), "phases.finetune.global_batch_size", "does not divide into micro-batches of 16 on 1 worker", "20 fits"),
    ("learning_rate: 1e-3", "warmup_ratio: '0.1'", (18, 19), "phases.finetune.warmup_ratio", "expected a number, got text", None),
    ("learning_rate: 1e-3", "deepspeed: zero5", (18, 16), "phases.finetune.deepspeed", "unknown DeepSpeed setting", "zero"),
    ("learning_rate: 1e-3", "deepspeed: conf/ds.json", (18, 16), "phases.finetune.deepspeed", "there is no file at", None),
    ("learning_rate: 1e-3", f"start_from: {'x' * 300}", (18, 17), "phases.finetune.start_from", "no file can be named so", None),
    ("learning_rate: 1e-3", "start_from: old", (18, 17), "phases.finetune.start_from", "there is no folder at", None),
    ("learning_rate: 1e-3", "train: [projector]\n    lora: {r: 8}", (19, 11), "phases.finetune.lora", "does not train", "language_model"),
    ("data: test}", "data: test, cells: full}", (20, 47), "evaluate.vqa.cells", "expected a mapping of keys, got text", None),
    ("data: test}", "data: tset}", (20, 34), "evaluate.vqa.data", "no data set `tset`", "test"),
    ("data: test}", "data: test, under: [final, wid]}", (20, 55), "evaluate.vqa.under.1", "no variant `wid` to test under", "wide"),
    ("data: test}", "data: test, under: {layer: [1, 2]}}", (20, 47), "evaluate.vqa.under", "needs the key `kind`", None),
    ("data: test}", "data: test}\ncluster: {num_worker: 2}", (21, 11), "cluster.num_worker", "unknown key", "num_workers"),
    ("data: test}", "data: test}\ncluster: {keep: {leaf: ful}}", (21, 24), "cluster.keep.leaf", "not one of", "full"),
    ("data: test}", "data: test}\nreport: {baseline: {seed: 3}}", (21, 20), "report.baseline", "no cell of the grid is", None),
    ("data: test}", "data: test}\nreport: {mean_over: [sed]}", (21, 22), "report.mean_over.0", "`sed` is not known", "seed"),
    ("data: test}", "data: test}\nplugins: [nope.py]", (21, 11), "plugins.0", "is not a file", None),
    ("data: test}", "data: test}\nplugins: [no_such_module_here]", (21, 11), "plugins.0", "no module", None),
    ("data: test}", "data: test}\nplugins: x.py", (21, 10), "plugins", "expected a list, got text", None),
    ("data: test}", "data: test}\nmatrix: {sed: [1]}", (21, 10), "matrix.sed", "`sed` is not known", "seed"),
    ("data: test}", "data: test}\nmatrix: {seed: 1}", (21, 16), "matrix.seed", "expected a list, got a number", None),
    ("data: test}", "data: test}\nmatrix: {seed: []}", (21, 16), "matrix.seed", "at least 1 entry", None),
    ("data: test}", "data: test}\nmatrix: [seed]", (21, 9), "matrix", "expected a mapping of keys, got a list", None),
    ("data: test}", "data: test}\nextends: nowhere.yaml", (21, 10), "extends", "no such file", None),
    ("data: test}", "data: test}\nextends: {a: b}", (21, 10), "extends", "extends names files", None),
    (
        "data: test}",
        "data: test}\nsearch: {objectives: {a: max}, space: {phases.finetune.lrr: {kind: uniform, low: 1, high: 2}}}",
        (21, 40),
        "search.space.phases.finetune.lrr",
        "`lrr` is not known under phases.finetune",
        None,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[f"{case[3] or 'yaml'}-{number}" for number, case in enumerate(WRONG)])
def test_wrong_files(case: tuple, small: str, write: Callable[..., Path]) -> None:
    old, new, place, path, message, more = case
    assert old in small
    file = write(small.replace(old, new, 1))
    errors = errors_of(file)
    matching = [error for error in errors if error.path == path and message in f"{error.message} {error.allowed}"]
    assert matching, "\n".join(map(str, errors))
    error = matching[0]
    assert error.file == str(file)
    if place is not None:
        assert (error.line, error.column) == place, str(error)
    if more is not None:
        assert more in str(error), str(error)
    for error in errors:
        assert "pydantic" not in str(error).lower()
        assert "Input should" not in str(error)


def test_one_mistake_is_reported_once(small: str, write: Callable[..., Path]) -> None:
    errors = errors_of(write(small.replace("max_steps: 100", "max_stepps: 100")))
    assert [error.path for error in errors] == ["phases.finetune.max_stepps"]


def test_all_errors_are_reported_at_once(small: str, write: Callable[..., Path]) -> None:
    text = (
        small.replace("weights: random", "weights: random, dtype: float23")
        .replace("stride: 8", "stride: 65")
        .replace("compressor: heavy", "compressor: hevy")
        .replace("learning_rate: 1e-3", "learning_rate: fast")
        .replace("data: test}", "data: tset}")
        + "matrix: {seed: [0, x], sed: [1]}\ncluster: {lanes: 0}\n"
    )
    paths = {error.path for error in errors_of(write(text), "modle.dtype=float32")}
    assert paths >= {
        "model.dtype",
        "compressors.heavy.stride",
        "schedules.two.stages.0.compressor",
        "phases.finetune.learning_rate",
        "evaluate.vqa.data",
        "seed",
        "matrix.sed",
        "cluster.lanes",
        "modle.dtype",
    }


def test_errors_that_are_left_out_are_counted(small: str, write: Callable[..., Path]) -> None:
    text = small + "".join(f"unknown{number}: x\n" for number in range(MAX_ERRORS + 5))
    *_, last, left_out = errors = errors_of(write(text))
    assert len(errors) == MAX_ERRORS + 1 and f"`unknown{MAX_ERRORS - 1}`" in last.message
    assert left_out.message == "and 5 more errors"


def test_errors_of_a_lower_file_name_that_file(small: str, write: Callable[..., Path]) -> None:
    base = write(small.replace("stride: 8", "strid: 8"), "base.yaml")
    errors = errors_of(write("extends: base.yaml\nname: child\n"))
    assert (errors[0].file, errors[0].line, errors[0].column) == (str(base), 7, 41)


def test_broken_model_config_is_an_error(small: str, write: Callable[..., Path]) -> None:
    write("{", "tiny/config.json")
    error = errors_of(write(small))[0]
    assert error.path == "model.model_name_or_path"
    assert "cannot be read as JSON" in error.message


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    assert "no such file" in errors_of(tmp_path / "none.yaml")[0].message
    assert "a folder" in errors_of(tmp_path)[0].message


def test_a_value_is_shown_as_written(small: str, write: Callable[..., Path]) -> None:
    error = errors_of(write(small.replace("1e-3", "-1e-3")))[0]
    assert error.value == "-1e-3"


def test_a_plugin_that_cannot_be_imported_says_why(small: str, write: Callable[..., Path]) -> None:
    write("import nothing_of_that_name\n", "broken.py")
    error = errors_of(write(small + "plugins: [broken.py]\n"))[0]
    assert "nothing_of_that_name" in error.message


ABOUT = [
    ("stride: 8", "stride: 2.5", "stride: Amount as windows: every `stride` visual tokens become one"),  # wrong type
    ("weights: random", "dtype: float23", "dtype: Compute type of forward and backward passes;"),  # wrong value
    ("max_steps: 100", "max_steps: 0", "max_steps: Length of the phase in optimizer steps."),  # out of range
    ("learning_rate: 1e-3", "learning_rate: {projector: -1}", "learning_rate: Peak learning rate of AdamW"),
    ("model: {model_name_or_path: tiny, weights: random}", "model: {}", "model_name_or_path: Folder or hub id"),
    ("split: train", "split: training", "split: The package's own split"),  # a component's key
]


@pytest.mark.parametrize(("old", "new", "about"), ABOUT)
def test_an_error_of_a_value_says_what_its_key_is(
    old: str, new: str, about: str, small: str, write: Callable[..., Path]
) -> None:
    assert old in small
    error = errors_of(write(small.replace(old, new, 1)))[0]
    assert error.about is not None and error.about.startswith(about)
    assert f"\n    {about}" in str(error)
    assert "\n" not in error.about


def test_an_unknown_key_is_not_described(small: str, write: Callable[..., Path]) -> None:
    assert errors_of(write(small.replace("stride: 8", "strid: 8")))[0].about is None
