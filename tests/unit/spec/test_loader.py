"""The loader as a whole: the design's example, sources, the resolved view, what `run` refuses, and no heavy import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from orchestrator.errors import SpecError, UsageError
from orchestrator.run import run_experiment
from orchestrator.spec.loaded import resolved_yaml
from orchestrator.spec.loader import load_experiment

Write = Callable[..., Path]
EXAMPLE = Path(__file__).with_name("design_example.yaml")
PLUGIN = """\
from typing import Literal
from orchestrator.spec.components import CompressorSpec

class Mine(CompressorSpec):
    kind: Literal["mine_of_the_example"] = "mine_of_the_example"
"""


@pytest.fixture
def example(write: Write) -> Path:
    write("description: overwritten\ncluster: {max_failures: 5, keep: {leaf: full}}\n", "base/tiny_llava.yaml")
    write(PLUGIN, "plugins/my_method.py")
    return write(EXAMPLE.read_text())


def test_the_example_of_the_design_is_valid(example: Path) -> None:
    loaded = load_experiment(example)
    assert len(loaded.cells) == 6
    assert loaded.cells[0].name == "schedule=full,seed=0"
    assert loaded.spec.cluster.max_failures == 3
    assert loaded.spec.phases.finetune is not None
    assert loaded.spec.phases.finetune.learning_rate == 3e-3
    assert loaded.spec.compressors["light"][0].layer == "50%"
    assert loaded.notices == ()


def test_every_value_has_a_source(example: Path) -> None:
    loaded = load_experiment(example, ["phases.finetune.max_steps=7"])
    assert loaded.sources["phases.finetune.max_steps"] == "--set"
    assert loaded.sources["name"] == f"{example}:2"
    assert loaded.sources["cluster.deterministic"] == "default"
    assert loaded.sources["schedules.four_stage.stages.0.share"].startswith(f"{example}:")


def test_the_resolved_view_loads_again_to_the_same(example: Path, write: Write) -> None:
    loaded = load_experiment(example)
    text = resolved_yaml(loaded)
    assert f"# {example}:2" in text
    assert "# default" in text
    again = load_experiment(write(text, "again.yaml"))
    assert again.spec == loaded.spec
    assert [cell.name for cell in again.cells] == [cell.name for cell in loaded.cells]
    assert "#" not in resolved_yaml(loaded, with_sources=False)
    assert yaml.safe_load(text)["name"] == "easy-vqa-schedules"


def test_a_number_of_workers_may_be_a_range(small: str, write: Write) -> None:
    loaded = load_experiment(write(small + "cluster: {num_workers: {min: 1, max: 3}}\n"))
    assert (loaded.spec.cluster.least_workers, loaded.spec.cluster.most_workers) == (1, 3)


@pytest.mark.parametrize(
    ("workers", "batch", "path", "told"),
    [
        ("{min: 3, max: 2}", "auto", "cluster.num_workers", "min is 3 and max is 2"),
        ("{min: 2, max: 3}", "1", "phases.finetune.per_device_train_batch_size", "cannot be dealt to 3 workers"),
        ("{min: 1, max: 900}", "auto", "phases.finetune.global_batch_size", "less than a sample for each of 900"),
    ],
)
def test_a_range_of_workers_that_cannot_be(
    small: str, write: Write, workers: str, batch: str, path: str, told: str
) -> None:
    sets = [f"cluster.num_workers={workers}", f"phases.finetune.per_device_train_batch_size={batch}"]
    with pytest.raises(SpecError) as caught:
        load_experiment(write(small), sets)
    (error,) = caught.value.errors
    assert error.path == path and told in error.message


def test_run_refuses_a_search_and_names_the_verb(small: str, write: Write) -> None:
    text = "search: {objectives: {eval/vqa/accuracy: max}, space: {seed: {kind: choice, values: [1]}}}\n"
    with pytest.raises(UsageError, match="`llavolta search` runs it, `run` does grids"):
        run_experiment(load_experiment(write(small + text)))


@pytest.mark.parametrize("point", ["average_pool, layer: projector, stride: 2", "q_former, layer: 1, keep_tokens: 2"])
def test_projector_points_and_learned_methods_are_not_refused(point: str, small: str, write: Write) -> None:
    text = small.replace("max_steps: 100", "max_steps: 100\n    train: [projector, compressor]")
    text = text.replace("compressors:", f"compressors:\n  v: {{kind: {point}}}")
    assert load_experiment(write(text)).cells


HIDDEN = [
    ("compressors", "  a: {kind: average_pool, layer: 1, keep_ratio: 1.5}", "a.keep_ratio",
     "  b: {kind: average_pool, layer: 7, stride: 2}", "b.layer"),
    ("compressors", "  a: {kind: averge_pool, layer: 1, stride: 2}", "a.kind",
     "  b: {kind: average_pool, layer: 1, stride: 100}", "b.stride"),
    ("compressors", "  a: {kind: average_pool, layer: 1}", "a",
     "  b: {kind: fastv, layer: projector, keep_tokens: 8}", "b.layer"),
    ("data", "  a: {kind: easy_vqa, split: trian}", "a.split",
     "  b: {kind: llava_json, data_path: rows.csv, image_folder: .}", "b.data_path"),
    ("phases", "  pretrain: {data: train, max_steps: 0, learning_rate: 1e-3, global_batch_size: 8}",
     "pretrain.max_steps",
     "    global_batch_size: 7\n    per_device_train_batch_size: 2", "finetune.global_batch_size"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "wrong", "path", "other", "other_path"), HIDDEN)
def test_the_errors_of_one_entry_do_not_hide_those_of_another(
    section: str, wrong: str, path: str, other: str, other_path: str, small: str, write: Write
) -> None:
    more = f"{section}:\n{wrong}\n"
    if section == "phases":
        text = small.replace("max_steps: 100", f"max_steps: 100\n{other}").replace("phases:\n", more)
    else:
        text = small.replace(f"{section}:\n", f"{more}{other}\n")
    with pytest.raises(SpecError) as caught:
        load_experiment(write(text))
    assert {error.path for error in caught.value.errors} == {f"{section}.{path}", f"{section}.{other_path}"}


def test_a_schedule_with_an_error_does_not_hide_that_a_stage_of_another_never_starts(small: str, write: Write) -> None:
    wrong = "schedules:\n  gap:\n    kind: stages\n    stages: [{share: 1/2}]\n"
    text = small.replace("schedules:\n", wrong).replace("share: 1/2, compressor", "share: 1/1000, compressor")
    with pytest.raises(SpecError) as caught:
        load_experiment(write(text))
    assert {error.path.partition(".stages")[0] for error in caught.value.errors} == {"schedules.gap", "schedules.two"}


def test_an_unknown_objective_does_not_hide_what_cannot_be_drawn(small: str, write: Write) -> None:
    space = "{phases.finetune.learning_rate: {kind: uniform, low: 2, high: 1}}"
    text = f"search:\n  objectives: {{eval/vqa/acuracy: max}}\n  space: {space}\n"
    with pytest.raises(SpecError) as caught:
        load_experiment(write(small + text))
    assert [error.path for error in caught.value.errors] == [
        "search.objectives.eval/vqa/acuracy", "search.space.phases.finetune.learning_rate.low"
    ]  # fmt: skip
