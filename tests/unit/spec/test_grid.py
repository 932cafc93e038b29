"""The grid: product, zip groups, exclude, include, names, and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.spec.grid import safe, short_axes
from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.loader import load_experiment

Write = Callable[..., Path]


@pytest.fixture
def grid(small: str, write: Write) -> Callable[[str], LoadedExperiment]:
    return lambda text: load_experiment(write(small + text))


def errors(load: Callable[[], Any]) -> str:
    with pytest.raises(SpecError) as caught:
        load()
    return str(caught.value)


def axes(loaded: LoadedExperiment) -> list[tuple[Any, ...]]:
    return [tuple(cell.axes.values()) for cell in loaded.cells]


def test_without_axes_there_is_one_cell_named_after_the_experiment(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid("")
    assert [(cell.name, cell.axes) for cell in loaded.cells] == [("small", {})]
    assert loaded.cells[0].spec == loaded.spec


def test_matrix_is_a_product_in_order(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid("matrix:\n  phases.finetune.schedule: [full, two]\n  seed: [0, 1]\n")
    names = ["schedule=full,seed=0", "schedule=full,seed=1", "schedule=two,seed=0", "schedule=two,seed=1"]
    assert [cell.name for cell in loaded.cells] == names
    phases = [cell.spec.phases.finetune for cell in loaded.cells]
    assert [phase.schedule for phase in phases if phase is not None] == ["full", "full", "two", "two"]
    assert [cell.spec.seed for cell in loaded.cells] == [0, 1, 0, 1]
    assert loaded.spec.seed == 0


def test_zip_groups_move_together_and_multiply(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid(
        "matrix: {seed: [0, 1]}\nzip:\n"
        "  - {phases.finetune.max_steps: [10, 20], phases.finetune.learning_rate: [1e-3, 2e-3]}\n"
        "  - {compressors.heavy.stride: [2, 4, 8]}\n"
    )
    assert len(loaded.cells) == 2 * 2 * 3
    pairs = {(c.axes["phases.finetune.max_steps"], c.axes["phases.finetune.learning_rate"]) for c in loaded.cells}
    assert pairs == {(10, 1e-3), (20, 2e-3)}


def test_exclude_and_include(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid(
        "matrix:\n  phases.finetune.schedule: [full, heavy, two]\n  seed: [0, 1]\n"
        "exclude: [{phases.finetune.schedule: heavy}, {phases.finetune.schedule: two, seed: 1}]\n"
        "include: [{phases.finetune.schedule: wide, seed: 5}, {seed: 9}]\n"
    )
    assert [cell.name for cell in loaded.cells] == [
        "schedule=full,seed=0",
        "schedule=full,seed=1",
        "schedule=two,seed=0",
        "schedule=wide,seed=5",
        "seed=9",
    ]
    assert loaded.cells[-1].spec.phases.finetune == loaded.spec.phases.finetune


def test_a_file_that_only_includes_has_just_those_cells(grid: Callable[[str], LoadedExperiment]) -> None:
    assert axes(grid("include: [{seed: 3}, {seed: 4}]\n")) == [(3,), (4,)]


def test_parents_apply_before_children(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid(
        "matrix:\n  compressors.heavy.stride: [2, 4]\n"
        "  compressors.heavy: [{kind: average_pool, layer: 1, stride: 8}, {kind: average_pool, layer: 3, stride: 8}]\n"
    )
    found = [
        (cell.spec.compressors["heavy"][0].layer, cell.spec.compressors["heavy"][0].stride) for cell in loaded.cells
    ]
    assert found == [(1, 2), (3, 2), (1, 4), (3, 4)]


def test_an_axis_may_give_what_the_base_lacks(small: str, write: Write) -> None:
    text = small.replace("    data: train\n", "") + "matrix: {phases.finetune.data: [train, test]}\n"
    loaded = load_experiment(write(text))
    assert [cell.spec.phases.finetune.data for cell in loaded.cells if cell.spec.phases.finetune] == ["train", "test"]


def test_a_null_on_an_axis_is_the_default(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid("matrix: {phases.finetune.lora: [null, {r: 8}], phases.finetune.learning_rate: [null, 1e-3]}\n")
    found = [cell.spec.phases.finetune for cell in loaded.cells]
    assert [(p.lora is None, p.learning_rate) for p in found if p] == [
        (True, 2e-5),
        (True, 1e-3),
        (False, 2e-5),
        (False, 1e-3),
    ]
    assert loaded.cells[0].name == "lora=null,learning_rate=null"


def test_a_null_picks_the_cells_of_that_value(small: str, write: Write) -> None:
    """It is a value of the axis: left out, one of two axes would pick more cells without a word."""
    text = small.replace("data: test}", "data: test, cells: {phases.finetune.lora: null, seed: 1}}")
    text += "report: {baseline: {phases.finetune.lora: null, seed: 1}}\n"
    loaded = load_experiment(write(text + "matrix: {phases.finetune.lora: [null, {r: 8}], seed: [0, 1]}\n"))
    picked = {"phases.finetune.lora": None, "seed": 1}
    assert loaded.spec.report.baseline == picked
    assert [cell.axes for cell in loaded.cells if cell.spec.evaluate] == [picked]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "matrix: {phases.finetune.sede: [1]}",
            ":21:10: matrix.phases.finetune.sede: an axis must be a key path: `sede`",
        ),
        ("matrix: {phases.finetune.sede: [1]}", "did you mean seed?"),
        ("matrix: {seed: [0, x]}", ":21:20: seed: expected a whole number, got text"),
        ("matrix: {seed: [0, 0]}", ":21:20: matrix.seed.1: the axis seed has this value twice"),
        ("matrix: {phases.finetune.schedule: [full, tow]}", ":21:43: phases.finetune.schedule: there is no schedule"),
        ("matrix: {compressors.heavy.layer: [1, 9]}", ":21:39: compressors.heavy.layer: the model has 4 decoder"),
        ("matrix: {name: [a, b]}", "`name` cannot be an axis"),
        ("matrix: {cluster.lanes: [1, 2]}", "`cluster.lanes` cannot be an axis"),
        ("matrix: {seed: [0]}\nzip: [{seed: [1]}]", "the axis seed is written twice, also under matrix"),
        ("zip: [{seed: [1, 2], phases.finetune.max_steps: [10]}]", "equally many values: seed has 2"),
        ("matrix: {seed: [0, 1]}\nexclude: [{seed: 2}]", "the axis seed never has this value"),
        ("matrix: {seed: [0, 1]}\nexclude: [{phases.finetune.max_steps: 2}]", "an axis the grid does not have"),
        ("matrix: {seed: [0]}\nexclude: [{seed: 0}]", "exclude takes out every cell"),
        ("matrix: {seed: [0]}\nexclude: [{}]", "would take out every cell"),
        ("matrix: {seed: [0, 1]}\ncell_name: run", "two cells would be named run"),
        ("matrix: {seed: [0, 1]}\ncell_name: run", "let the template use {seed}"),
        ("matrix: {seed: [0, 1]}\ncell_name: '{sed}'", "cell_name uses {sed}"),
        ("matrix: {seed: [0, 1]}\ncell_name: 'x{seed'", "not closed"),
        ("include: [{sed: 1}]", "`sed` is not known"),
        ("matrix: {model.model_name_or_path: [tiny, ./gone]}", "there is no model folder"),
    ],
)
def test_wrong_grids(text: str, message: str, small: str, write: Write) -> None:
    assert message in errors(lambda: load_experiment(write(small + text + "\n")))


def test_a_wrong_axis_value_is_reported_once_however_large_the_grid(small: str, write: Write) -> None:
    seeds = ", ".join(map(str, range(100)))
    path = write(small + f"matrix: {{seed: [{seeds}], phases.finetune.max_steps: [10, -1]}}\n")
    with pytest.raises(SpecError) as caught:
        load_experiment(path)
    assert [each.path for each in caught.value.errors] == ["phases.finetune.max_steps"]


def test_equal_cells_are_merged_with_a_notice(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid("matrix: {seed: [0, 1]}\ninclude: [{seed: 1}]\n")
    assert len(loaded.cells) == 2
    assert any("are the same and become one" in notice for notice in loaded.notices)


def test_templates_take_short_and_full_names(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid(
        "matrix: {phases.finetune.schedule: [full, two], seed: [0, 1]}\n"
        "cell_name: '{schedule}-s{seed}-{phases.finetune.schedule}'\n"
    )
    assert [cell.name for cell in loaded.cells] == ["full-s0-full", "full-s1-full", "two-s0-two", "two-s1-two"]


def test_values_of_one_ending_get_numbers(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid("matrix: {model.revision: [a/x, b/x, c/x]}\n")
    assert [cell.name for cell in loaded.cells] == ["revision=x", "revision=x-2", "revision=x-3"]


def test_mapping_values_get_short_names(grid: Callable[[str], LoadedExperiment]) -> None:
    loaded = grid(
        "matrix: {compressors.heavy: [{kind: average_pool, layer: 1, stride: 8}, "
        "{kind: average_pool, layer: 50%, keep_ratio: 1/4}]}\n"
    )
    assert [cell.name for cell in loaded.cells] == [
        "heavy=average_pool,layer=1,stride=8",
        "heavy=average_pool,layer=50-,keep_ratio=1-4",
    ]


def test_short_names_are_the_shortest_ends_that_differ() -> None:
    assert short_axes(["phases.pretrain.learning_rate", "phases.finetune.learning_rate", "seed"]) == {
        "phases.pretrain.learning_rate": "pretrain.learning_rate",
        "phases.finetune.learning_rate": "finetune.learning_rate",
        "seed": "seed",
    }


@given(st.text(max_size=100), st.integers(8, 60))
def test_safe_names_are_safe(text: str, limit: int) -> None:
    name = safe(text, limit)
    assert 0 < len(name) <= limit
    assert "/" not in name
    assert not name.startswith(".")
    assert name.isascii()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["full", "two", "heavy"]), min_size=1, max_size=3, unique=True),
)
def test_cells_hold_their_axes_and_have_unique_names(
    small: str, write: Write, seeds: list[int], strides: list[int], schedules: list[str]
) -> None:
    text = f"matrix: {{seed: {seeds}, compressors.heavy.stride: {strides}, phases.finetune.schedule: {schedules}}}\n"
    loaded = load_experiment(write(small + text.replace("'", "")))
    assert len(loaded.cells) == len(seeds) * len(strides) * len(schedules)
    assert len({cell.name for cell in loaded.cells}) == len(loaded.cells)
    for cell in loaded.cells:
        assert cell.spec.seed == cell.axes["seed"]
        assert cell.spec.compressors["heavy"][0].stride == cell.axes["compressors.heavy.stride"]
        assert cell.spec.phases.finetune is not None
        assert cell.spec.phases.finetune.schedule == cell.axes["phases.finetune.schedule"]
        assert cell.spec.name == "small"


@pytest.mark.parametrize("axis", ["seed", "phases.finetune.max_steps"], ids=["few parts", "every cell its own phase"])
def test_ten_thousand_cells_take_ten_times_as_long_as_a_thousand(axis: str, small: str, write: Write) -> None:
    def seconds_of(count: int) -> float:
        rates = ", ".join(f"{number}e-6" for number in range(1, 101))
        values = ", ".join(map(str, range(100, 100 + count // 100)))
        path = write(f"{small}matrix:\n  {axis}: [{values}]\n  phases.finetune.learning_rate: [{rates}]\n")
        start = time.process_time()
        assert len(load_experiment(path).cells) == count
        return time.process_time() - start

    few = min(seconds_of(1_000) for _ in range(3))
    assert seconds_of(10_000) < 30 * few  # were it quadratic, 100


GRID = """\
matrix: {phases.finetune.schedule: [two, heavy], seed: [0, 1]}
exclude: [{phases.finetune.schedule: two, seed: 1}]
"""


@pytest.mark.parametrize(
    ("cells", "tested"),
    [
        ("{phases.finetune.schedule: heavy}", [False, True, True]),
        ("{phases.finetune.schedule: heavy, seed: 1}", [False, False, True]),
        ("null", [True, True, True]),
    ],
)
def test_only_the_cells_it_names_are_tested(cells: str, tested: list[bool], small: str, write: Write) -> None:
    text = small.replace("data: test}", f"data: test}}\n  more: {{kind: exact_match, data: test, cells: {cells}}}")
    found = load_experiment(write(text + GRID)).cells
    assert ["more" in cell.spec.evaluate for cell in found] == tested
    assert all("vqa" in cell.spec.evaluate for cell in found)


@pytest.mark.parametrize(
    ("cells", "path", "message"),
    [
        (
            "{phases.finetune.schedule: wide}",
            ".phases.finetune.schedule",
            "the axis phases.finetune.schedule never has",
        ),
        ("{phases.finetune.max_steps: 100}", ".phases.finetune.max_steps", "the grid has no such axis"),
        ("{phases.finetune.schedul: two}", ".phases.finetune.schedul", "`schedul` is not known under phases.finetune"),
        ("{phases.finetune.schedule: two, seed: 1}", "", "no cell of the grid has all of these values"),
        ("{}", "", "at least 1 entry is needed"),
    ],
)
def test_cells_that_are_not_there_cannot_be_tested(
    cells: str, path: str, message: str, small: str, write: Write
) -> None:
    with pytest.raises(SpecError) as caught:
        load_experiment(write(small.replace("data: test}", f"data: test, cells: {cells}}}") + GRID))
    (error,) = caught.value.errors
    assert error.path == f"evaluate.vqa.cells{path}" and message in error.message and error.line == 20


def test_beside_a_search_every_cell_is_tested(small: str, write: Write) -> None:
    text = small.replace("data: test}", "data: test, cells: {seed: 0}}")
    space = "{phases.finetune.learning_rate: {kind: choice, values: [1.0e-3]}}"
    search = f"search: {{objectives: {{eval/vqa/accuracy: max}}, space: {space}}}\n"
    with pytest.raises(SpecError, match="beside a search every cell is tested"):
        load_experiment(write(text + "matrix: {seed: [0, 1]}\n" + search))
