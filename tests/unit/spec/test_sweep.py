"""Sweeps under an evaluation: their variants, and what is refused with its place in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import ErrorDetail, SpecError
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.tree import build_stage_tree
from orchestrator.smoke import layers_in_use
from orchestrator.spec.loader import load_experiment

Write = Callable[..., Path]


def with_under(small: str, under: str) -> str:
    return small.replace("data: test}", f"data: test, under: {under}}}")


def errors_of(path: Path) -> list[ErrorDetail]:
    with pytest.raises(SpecError) as caught:
        load_experiment(path)
    return list(caught.value.errors)


def names_in(path: Path) -> list[str]:
    return list(load_experiment(path).spec.evaluate["vqa"].tested_variants)


@pytest.mark.parametrize(
    ("under", "names"),
    [
        (
            "{kind: [average_pool, fastv], layer: [1, 2], stride: 4}",
            [
                "average_pool_layer1_stride4", "average_pool_layer2_stride4", "fastv_layer1_stride4",
                "fastv_layer2_stride4",
            ],
        ),
        (
            "[final, {layer: 50%, kind: fastv, keep_ratio: [25%, 1/3, 0.5]}]",
            [
                "final", "fastv_layer50pct_keep_ratio0.25", "fastv_layer50pct_keep_ratio1of3",
                "fastv_layer50pct_keep_ratio0.5",
            ],
        ),
        (
            "[{kind: average_pool, layer: [projector, 'tower:0'], keep_tokens: 16}, full]",
            ["average_pool_layer_projector_keep_tokens16", "average_pool_layer_tower-0_keep_tokens16", "full"],
        ),
        ("{kind: fastv, layer: 2, keep_tokens: 8, keys_only: [true, false]}",
         ["fastv_layer2_keep_tokens8_keys_only_true", "fastv_layer2_keep_tokens8_keys_only_false"]),
        ("{kind: early_exit, layer: [2, 3]}", ["early_exit_layer2", "early_exit_layer3"]),
        ("{kind: average_pool, layer: 1, layer_average_tokens: [24, 32]}",
         ["average_pool_layer1_layer_average_tokens24", "average_pool_layer1_layer_average_tokens32"]),
    ],
)  # fmt: skip
def test_every_combination_is_a_variant(under: str, names: list[str], small: str, write: Write) -> None:
    assert names_in(write(with_under(small, under))) == names


@pytest.mark.parametrize(
    ("under", "path", "at", "message"),
    [
        ("{kind: [average_pool, fastv], layer: [0, 1], stride: 2}", "layer.0", "0, 1", "fastv looks at the queries"),
        ("{kind: average_pool, layer: [1, 9], stride: 2}", "layer.1", "9]", "the model has 4 decoder layers"),
        ("{kind: average_pool, layer: 1, stride: [2, 99]}", "stride.1", "99", "more than the 64 visual tokens"),
        ("{kind: average_pool, layer: 1, stride: [2, x]}", "stride.1", "x]", "expected a whole number, got text"),
        ("{kind: average_pool, layer: 1, stride: []}", "stride", "[]", "at least one value is needed"),
        ("{kind: average_pool, layer: 1}", "", "{", "average_pool: the amount is exactly one of"),
        ("{kind: average_pool, layer: 1, stride: 2, keep_tokens: [8]}", "", "{", "the amount is exactly one of"),
        ("{kind: [fastv, fasv], layer: 1, stride: 2}", "kind.1", "fasv", "unknown kind `fasv`; did you mean fastv?"),
        (
            "{kind: fastv, layer: 1, stride: 2, pos: [a, b]}",
            "pos.0",
            "a, b",
            "fastv has no parameter `pos`; it has layer,",
        ),
        (
            "{kind: [fastv, q_former], layer: 1, keep_tokens: 4}",
            "kind.1",
            "q_former",
            "q_former learns: it has weights only",
        ),
        ("{layer: 1, stride: 2}", "", "{", "a sweep needs the key `kind`"),
        ("{kind: fastv, stride: 2}", "layer", "{", "the key `layer` is missing"),
        ("{kind: fastv, layer: 1, stride: [2, 2]}", "", "{", "`fastv_layer1_stride2` is tested twice"),
        (
            "[{kind: fastv, layer: 1, stride: 2}, {kind: fastv, layer: 1, stride: 2}]",
            "1",
            "{kind: fastv, layer: 1, stride: 2}]",
            "is tested twice",
        ),
        ("{kind: fastv, layer: 3, stride: 2}", "", "{", "is also a variant under `compressors`"),
    ],
)
def test_what_cannot_be_tested_is_refused_at_its_place(
    under: str, path: str, at: str, message: str, small: str, write: Write
) -> None:
    named = "compressors:\n  fastv_layer3_stride2: {kind: fastv, layer: 2, stride: 2}\n"
    (error,) = errors_of(write(with_under(small, under).replace("compressors:\n", named)))
    assert error.path == ".".join(filter(None, ("evaluate.vqa.under", path)))
    assert message in error.message
    is_missing = "is missing" in message  # told at the key that lacks it
    assert (error.line, error.column) == (21, 40 if is_missing else 47 + under.index(at))


def test_the_model_need_not_be_known(small: str, write: Write) -> None:
    path = write(with_under(small, "{kind: fastv, layer: [1, 90], stride: 2}"))
    (path.parent / "tiny" / "config.json").write_text(json.dumps({"model_type": "not_known_here"}))
    assert names_in(path) == ["fastv_layer1_stride2", "fastv_layer90_stride2"]


def test_a_swept_variant_is_the_evaluation_of_a_named_one_and_changes_no_cell(small: str, write: Write) -> None:
    named = load_experiment(write(with_under(small, "[final, heavy]")))
    swept = load_experiment(write(with_under(small, "[final, {kind: average_pool, layer: [1, 50%], stride: 8}]")))
    (before,), (after,) = expand_cells(named), expand_cells(swept)
    assert before.id == after.id
    ids = {test.under: test.id for test in after.evaluations}
    assert ids["final"] == before.evaluations[0].id
    assert ids["average_pool_layer50pct_stride8"] == before.evaluations[1].id != ids["average_pool_layer1_stride8"]
    assert after.evaluations[2].points == before.evaluations[1].points
    tree = build_stage_tree((after,))
    assert len(tree.evaluations) == 3 and tree.stage_runs.keys() == build_stage_tree((before,)).stage_runs.keys()


def test_a_variant_of_a_sweep_can_be_an_objective_and_is_an_axis_like_others(small: str, write: Write) -> None:
    text = with_under(small, "{kind: fastv, layer: 2, stride: [2, 4]}")
    objective = "eval/vqa/under_fastv_layer2_stride4/accuracy"
    search = f"search: {{objectives: {{{objective}: max}}, space: {{seed: {{kind: choice, values: [1]}}}}}}\n"
    assert load_experiment(write(text + search)).spec.search is not None
    (error,) = errors_of(write(text + search.replace("stride4", "stride8")))
    assert error.path == f"search.objectives.{objective.replace('stride4', 'stride8')}"
    cells = load_experiment(
        write(small + "matrix: {evaluate.vqa.under: [[final], {kind: fastv, layer: 2, stride: 2}]}\n")
    )
    assert [list(cell.spec.evaluate["vqa"].tested_variants) for cell in cells.cells] == [
        ["final"],
        ["fastv_layer2_stride2"],
    ]


def test_a_sweep_survives_its_dump(small: str, write: Write) -> None:
    spec = load_experiment(write(with_under(small, "[full, {kind: fastv, layer: 2, stride: [2, 4]}]"))).spec
    again = type(spec).model_validate(spec.model_dump(mode="json"))
    assert again.evaluate["vqa"].tested_variants == spec.evaluate["vqa"].tested_variants
    assert layers_in_use(spec, 4) == {2}
