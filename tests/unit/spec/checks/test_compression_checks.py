"""Points that do not fit one another or the model are reported by `validate`, each once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import ErrorDetail, SpecError
from orchestrator.spec.loader import load_experiment

Write = Callable[..., Path]
PROJECTED = "{kind: average_pool, layer: projector, stride: 2}"
POOLED = "{kind: average_pool, layer: 1, stride: 2}"


def errors_of(path: Path) -> tuple[ErrorDetail, ...]:
    with pytest.raises(SpecError) as caught:
        load_experiment(path)
    return tuple(caught.value.errors)


def with_variant(small: str, points: str) -> str:
    assert "compressors:\n" in small
    return small.replace("compressors:\n", f"compressors:\n  v: {points}\n")


@pytest.mark.parametrize(
    ("points", "key", "message"),
    [
        (f"[{POOLED}, {PROJECTED}]", "1.layer", "acts at the projector, not after the point before it at layer 1"),
        (f"[{POOLED}, {POOLED}]", "1.layer", "acts at layer 1, not after the point before it at layer 1"),
        ("{kind: fastv, layer: projector, keep_tokens: 8}", "layer", "fastv does not act at the projector"),
        ("{kind: fastv, layer: 0, keep_tokens: 8}", "layer", "looks at the queries of the layer before it"),
        (
            "[{kind: downsample, layer: projector, keep_tokens: 16}, {kind: visionzip, layer: 2, keep_tokens: 8}]",
            "1.kind",
            "a tower that sees the whole image",
        ),
        (
            "[{kind: tome, layer: 1, stride: 2}, {kind: stride, layer: 2, stride: 2, keys_only: true}]",
            "1.keys_only",
            "tome before it has attention weigh tokens by size (size_bias)",
        ),
        (
            "[{kind: q_former, layer: projector, keep_tokens: 8}, {kind: q_former, layer: projector, keep_tokens: 8}]",
            "1.layer",
            "would share one learned module",
        ),
    ],
)
def test_points_that_do_not_fit_are_reported_once(
    points: str, key: str, message: str, small: str, write: Write
) -> None:
    (error,) = errors_of(write(with_variant(small, points)))
    assert error.path == f"compressors.v.{key}"
    assert message in error.message


@pytest.mark.parametrize("points", [PROJECTED, f"[{PROJECTED}, {PROJECTED}]", f"[{PROJECTED}, {POOLED}]"])
def test_a_projector_point_is_valid_whether_or_not_the_model_is_known(points: str, small: str, write: Write) -> None:
    path = write(with_variant(small, points))
    load_experiment(path)
    (path.parent / "tiny" / "config.json").write_text(json.dumps({"model_type": "not_known_here"}))
    load_experiment(path)


@pytest.mark.parametrize(
    ("points", "key", "message"),
    [
        ("{kind: average_pool, layer: tower:3, stride: 2}", "layer", "the model takes what layer 2 gives"),
        ("{kind: average_pool, layer: tower:99%, stride: 2}", "layer", "tower:99% is layer 3 of 4"),
        ("{kind: tome, layer: 'tower:0', stride: 2}", "layer", "keys of the tower layer before it"),
        ("{kind: divprune, layer: 'tower:1', stride: 2}", "layer", "divprune does not act at the vision tower"),
        (
            f"[{PROJECTED}, {{kind: tome, layer: 'tower:1', stride: 2}}]",
            "1.layer",
            "not after the point before it at the p",
        ),
        (
            "[{kind: tome, layer: 'tower:2', stride: 2}, {kind: stride, layer: 'tower:2', stride: 2}]",
            "1.layer",
            "tower layer 2, not",
        ),
        (
            "[{kind: tome, layer: 'tower:1', stride: 2}, {kind: visionzip, layer: 2, keep_tokens: 8}]",
            "1.kind",
            "tome acts inside the vision tower, and visionzip needs the CLS attention",
        ),
        ("{kind: laco, layer: 'tower:1', stride: 9}", "stride", "windows of 3 x 3 (stride 9) do not fill 8 x 8 tokens"),
        ("{kind: laco, layer: 'tower:1', stride: 2}", "", "give stride, a square number"),
        ("{kind: average_pool, layer: 'tower:x', stride: 2}", "layer", "tower:12"),
        ("{kind: average_pool, layer: 'tower:100%', stride: 2}", "layer", "less than 100%"),
    ],
)
def test_points_in_the_vision_tower_that_do_not_fit(
    points: str, key: str, message: str, small: str, write: Write
) -> None:
    path = write(with_variant(small, points))
    config = path.parent / "tiny" / "config.json"
    values = json.loads(config.read_text())
    values["vision_config"]["num_hidden_layers"] = 4
    config.write_text(json.dumps(values))
    (error,) = errors_of(path)
    assert error.path == f"compressors.v.{key}".rstrip(".")
    assert message in error.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "internvl"}, "this internvl: between it and the decoder the model merges"),
        ({"model_type": "gemma3"}, "this gemma3"),
        ({"vision_feature_select_strategy": "full"}, "not its patches one to one"),
        (
            {"vision_config": {"model_type": "pixtral", "image_size": 32, "patch_size": 4}},
            "it is a pixtral, not one of",
        ),
    ],
)
def test_models_without_points_in_the_tower_say_why(
    changes: dict[str, object], message: str, small: str, write: Write
) -> None:
    path = write(with_variant(small, "{kind: average_pool, layer: 'tower:0', stride: 2}"))
    load_experiment(path)
    config = path.parent / "tiny" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    errors = [error for error in errors_of(path) if error.path == "compressors.v.layer"]
    assert message in errors[0].message and "no compressor acts inside the vision tower" in errors[0].message


def test_deepstack_forbids_a_method_that_adds_tokens(small: str, write: Write) -> None:
    path = write(
        with_variant(small, "{kind: registers, layer: 3, keep_tokens: 4}").replace(
            "layer: 2, stride", "layer: 3, stride"
        )
    )
    load_experiment(path)
    (path.parent / "tiny" / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    (error,) = errors_of(path)
    assert error.path == "compressors.v.kind"
    assert "DeepStack" in error.message


def test_what_a_schedule_refuses_does_not_ask_for_text(small: str, write: Write) -> None:
    same = "schedule: {kind: interleaved, compressor: heavy, other: heavy, full_share: 1/4}"
    (error,) = errors_of(write(small.replace("schedule: two", same)))
    assert "name two variants" in error.message
    assert error.allowed is None


@pytest.mark.parametrize("kind", ["q_former", "registers"])
def test_a_ramp_does_not_move_what_shapes_a_learned_module(kind: str, small: str, write: Write) -> None:
    ramp = "schedule: {kind: ramp, compressor: v, key: keep_tokens, start: 32, end: 8}"
    small = small.replace("schedule: two", ramp)
    (error,) = errors_of(write(with_variant(small, f"{{kind: {kind}, layer: 2, keep_tokens: 16}}")))
    assert "would begin a new module at each move" in error.message
    load_experiment(write(with_variant(small, "{kind: q_former, layer: 2, keep_tokens: 16, max_queries: 32}")))


def test_a_learned_variant_that_no_phase_uses_cannot_be_tested(small: str, write: Write) -> None:
    small = with_variant(small, "{kind: q_former, layer: 2, keep_tokens: 16}")
    tested = small.replace("data: test}", "data: test, under: [final, v]}")
    (error,) = errors_of(write(tested))
    assert error.path == "evaluate.vqa.under.1"
    assert "no phase uses it" in error.message
    load_experiment(write(tested.replace("schedule: two", "schedule: v")))
    load_experiment(write(tested.replace("weights: random", "weights: pretrained")))


def test_a_plugin_that_fails_on_a_grid_is_reported_by_name(small: str, write: Write, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "from typing import ClassVar, Literal\n"
        "from orchestrator.spec.components import CompressorSpec\n\n\n"
        "class FailingSpec(CompressorSpec):\n"
        "    kind: Literal['failing'] = 'failing'\n"
        "    implementation: ClassVar[str] = __name__ + ':FailingSpec'\n\n"
        "    def kept_tokens(self, grid):\n"
        "        return grid.tokens // 0\n"
    )
    text = with_variant(small, "{kind: failing, layer: 2, keep_tokens: 16}") + f"plugins: [{tmp_path / 'failing.py'}]\n"
    (error,) = errors_of(write(text))
    assert error.path == "compressors.v.kind"
    assert "8 x 8" in error.message and "ZeroDivisionError" in error.message


def test_the_paths_of_a_plugin_become_absolute_with_and_without_a_list(
    small: str, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "table.py").write_text(
        "from typing import ClassVar, Literal\n"
        "from orchestrator.spec.components import CompressorSpec\n\n\n"
        "class TableSpec(CompressorSpec):\n"
        "    kind: Literal['table'] = 'table'\n"
        "    implementation: ClassVar[str] = __name__ + ':Table'\n"
        "    path_fields: ClassVar[tuple[str, ...]] = ('table',)\n"
        "    table: str\n\n\n"
        "class Table:\n"
        "    def compress(self): ...\n"
    )
    point = "{kind: table, layer: 2, keep_tokens: 16, table: scores.json}"
    text = with_variant(small, point).replace("  v:", f"  w: [{point}]\n  v:")
    variants = load_experiment(write(text + f"plugins: [{tmp_path / 'table.py'}]\n")).spec.compressors
    assert [variants[name][0].table for name in "vw"] == [str(tmp_path / "scores.json")] * 2


def test_registers_stand_first_in_a_variant(small: str, write: Write) -> None:
    points = "[{kind: average_pool, layer: 1, stride: 2}, {kind: registers, layer: 2, keep_tokens: 4}]"
    text = small.replace("{kind: average_pool, layer: 2, stride: 8}", points)
    with pytest.raises(SpecError, match="which the points before it would mix or drop"):
        load_experiment(write(text))


def test_an_isolator_stands_last_in_a_variant(small: str, write: Write) -> None:
    points = "[{kind: divprune, layer: projector, keep_tokens: 4}, {kind: isolator}]"
    assert load_experiment(write(small.replace("{kind: average_pool, layer: 2, stride: 8}", points))).cells
    text = small.replace(
        "{kind: average_pool, layer: 2, stride: 8}", points[:-1] + ", {kind: stride, layer: 1, stride: 2}]"
    )
    with pytest.raises(SpecError, match="would mix or drop the tokens that a point before it adds for good"):
        load_experiment(write(text))


@pytest.mark.parametrize(
    ("points", "key", "message"),
    [
        ("[{kind: late_injection, layer: 2}, {kind: fastv, layer: 3, keep_tokens: 8}]", None, ""),
        ("[{kind: average_pool, layer: projector, stride: 2}, {kind: late_injection, layer: 50%}]", None, ""),
        ("[{kind: late_injection, layer: 1}, {kind: average_pool, layer: 2, layer_average_tokens: 20}]", None, ""),
        (f"[{POOLED}, {{kind: late_injection, layer: 2}}]", "0.kind", "average_pool acts before it"),
        ("[{kind: late_injection, layer: 2}, {kind: early_exit, layer: 50%}]", "1.layer", "not after the point before"),
        (
            "[{kind: early_exit, layer: 2}, {kind: fastv, layer: 3, keep_tokens: 8}]",
            "1.kind",
            "fastv after it has none",
        ),
        ("[{kind: early_exit, layer: 0%}]", "0.kind", "no layer would see the image"),
        (
            "[{kind: stride, layer: 1, stride: 2}, {kind: average_pool, layer: 2, layer_average_tokens: 20}]",
            "1.layer_average_tokens",
            "is for a variant of one amount",
        ),
    ],
)
def test_layers_of_text_alone(points: str, key: str | None, message: str, small: str, write: Write) -> None:
    path = write(with_variant(small, points))
    if key is None:
        assert load_experiment(path).cells
        return
    errors = errors_of(path)
    assert [error.path for error in errors][:1] == [f"compressors.v.{key}"] and message in errors[0].message


def test_deepstack_forbids_late_injection(small: str, write: Write) -> None:
    text = with_variant(small, "{kind: late_injection, layer: 3}").replace("layer: 2, stride", "layer: 3, stride")
    path = write(text)
    load_experiment(path)
    (path.parent / "tiny" / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    (error,) = errors_of(path)
    assert error.path == "compressors.v.kind" and "keeps images out of the first layers" in error.message


def test_a_phase_that_trains_compressors_alone_has_one_that_learns(small: str, write: Write) -> None:
    nothing = small.replace("max_steps: 100", "max_steps: 100\n    train: [compressor]")
    with pytest.raises(SpecError, match="nothing trains: no variant of the phase's schedule learns") as error:
        load_experiment(write(nothing))
    assert [each.path for each in error.value.errors] == ["phases.finetune.train"]
    learned = nothing.replace("kind: average_pool, layer: 2, stride: 8", "kind: registers, layer: 2, keep_tokens: 4")
    assert load_experiment(write(learned)).cells
    drawn = learned.replace("train: [compressor]", "train: [projector]")
    notices = load_experiment(write(drawn)).notices
    assert any("heavy learns, but `compressor` does not train" in notice for notice in notices)
