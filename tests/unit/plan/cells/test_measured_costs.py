"""Costs of models whose images vary in size are means over the rows of the data, not of a mean row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from family_folders import write_folder
from sized_rows import SIZED, SIZES_HW, sized_rows

from orchestrator.errors import UsageError
from orchestrator.plan import cost
from orchestrator.plan.cells.sample_lengths import measure_rows
from orchestrator.plan.cost import MeasuredRow, MeasuredRows, Sample
from orchestrator.plan.documents import plan_document
from orchestrator.plan.experiment_plan import prepare
from orchestrator.spec.components import Grid
from orchestrator.spec.image_units import ImageUnits
from orchestrator.spec.model_facts import rule_of_images

TEXT = f"""{SIZED}    max_steps: 20
    global_batch_size: 4
    model_max_length: 2048
    PHASE
matrix:
  phases.finetune.schedule: [full, half]
"""
HALF = "{kind: average_pool, layer: 1, keep_ratio: 0.5}"


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    write_folder("qwen2_5_vl", tmp_path / "model")
    sized_rows(tmp_path)

    def plan(phase: str = "", text_tokens: float | None = None, half: str = HALF) -> tuple[Any, dict[str, Any]]:
        file = tmp_path / "sized.yaml"
        file.write_text(TEXT.replace("    PHASE\n", f"    {phase}\n" if phase else "").replace(HALF, half))
        walk = prepare(file)
        return walk, plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger, text_tokens)

    return plan


def test_a_phase_costs_the_sum_of_its_rows(planned: Any, tmp_path: Path) -> None:
    walk, document = planned()
    rows = measure_rows(walk.loaded.spec.data["train"], "rows", tmp_path / "model", 2048)
    assert isinstance(rows, MeasuredRows) and len({row.images for row in rows.rows}) > 3
    for cell, shown in zip(walk.cells, document["cells"], strict=True):
        (plan,) = cell.phases
        points, recipe = plan.table[0].points, plan.recipe.model_dump()
        each = [row.share * cost.train_tflops_per_sample(cell.facts, points, _alone(row), recipe) for row in rows.rows]
        assert shown["cost"]["train_tflops"] == pytest.approx(20 * 4 * sum(each))
    full, half = (cell["cost"] for cell in document["cells"])
    assert full["compression_ratio"] == pytest.approx(1) and half["compression_ratio"] > 1.4
    assert full["visual_layer_tokens"] == pytest.approx(walk.cells[0].facts.num_layers * rows.image_tokens)
    (notice,) = [text for text in document["notices"] if "means over up to 2,000 rows" in text]
    tokens = sorted(image.tokens for _, image in rows.images)
    assert f"images of {tokens[0]} to {tokens[-1]} visual tokens (mean {rows.image_tokens:.1f})" in notice


def _alone(row: MeasuredRow) -> Sample:
    one = MeasuredRow(1.0, row.text_tokens, row.label_tokens, row.images)
    return Sample(row.text_tokens, row.label_tokens, len(row.images), MeasuredRows((one,)))


def test_the_mean_of_squares_is_more_than_the_square_of_the_mean(planned: Any) -> None:
    walk, _ = planned()
    facts = walk.cells[0].facts

    def row(share: float, side: int) -> MeasuredRow:
        return MeasuredRow(share, 8, 4, (ImageUnits((Grid(side, side),), (4 * side * side,), side * side),))

    mixed = MeasuredRows((row(0.5, 10), row(0.5, 100)))
    mean = 5050  # visual tokens
    found = cost.forward_tflops(facts, [], Sample(8, 4, 1, mixed))["decoder"]
    heads, linear = facts.num_attention_heads * facts.head_dim, cost.linear_weights_per_layer(facts)
    exact = 2 * linear * (mean + 8) + 2 * heads * (0.5 * 108**2 + 0.5 * 10008**2)
    assert found == pytest.approx(facts.num_layers * exact / 1e12)
    assert found > 1.5 * facts.num_layers * (2 * linear * (mean + 8) + 2 * heads * (mean + 8) ** 2) / 1e12


def test_text_tokens_take_the_place_of_each_rows_text(planned: Any) -> None:
    shorter, longer = (planned(text_tokens=number)[1]["cells"][0]["cost"] for number in (10, 100))
    assert longer["train_tflops"] > shorter["train_tflops"]
    assert longer["visual_layer_tokens"] == shorter["visual_layer_tokens"]


def test_equal_cost_and_a_budget(planned: Any) -> None:
    walk, document = planned("match_train_tflops: full")
    steps = [cell.phases[0].total_steps for cell in walk.cells]
    full, half = (cell["cost"]["train_tflops"] for cell in document["cells"])
    assert steps[0] == 20 < steps[1] and abs(full - half) <= half / steps[1]


def test_what_cannot_be_measured_is_told_and_costs_nothing(planned: Any, tmp_path: Path) -> None:
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    (tmp_path / "model" / "processor_config.json").write_text("{}")
    _, document = planned()
    assert [cell["cost"]["train_tflops"] for cell in document["cells"]] == [None, None]
    assert any("nor the cost of finetune: an image of qwen2_5_vl becomes" in text for text in document["notices"])
    with pytest.raises(UsageError, match=r"the cost of a step is not known here \(an image of qwen2_5_vl"):
        planned("match_train_tflops: full")


def test_a_mean_over_layers_is_solved_over_the_images_of_the_data(planned: Any, tmp_path: Path) -> None:
    walk, document = planned(half="{kind: average_pool, layer: 1, layer_average_tokens: 7}")
    (variant,) = document["variants"]
    assert variant["layer_average_tokens"] == pytest.approx(7, rel=0.02)
    (point,) = walk.cells[1].phases[0].table[0].points
    assert point["keep_tokens"] is None and point["layer_average_tokens"] is None
    layers, tokens = walk.cells[1].facts.num_layers, document["cells"][1]["cost"]["visual_layer_tokens"]
    assert tokens / layers == pytest.approx(7, rel=0.02)
    written = f"{{kind: average_pool, layer: 1, keep_ratio: {point['keep_ratio']}}}"
    assert planned(half=written)[0].cells[1].id == walk.cells[1].id  # what counts is the share itself
    with pytest.raises(UsageError, match="layer_average_tokens 4000 cannot be reached at layer 1"):
        planned(half="{kind: average_pool, layer: 1, layer_average_tokens: 4000}")
    (tmp_path / "rows.json").unlink()
    with pytest.raises(UsageError, match="needs images of one size, or data whose images are measured here"):
        planned(half="{kind: average_pool, layer: 1, layer_average_tokens: 7}")


def test_a_method_that_takes_tokens_alone_is_solved_for_them(planned: Any) -> None:
    walk, document = planned(half="{kind: registers, layer: 2, layer_average_tokens: 14}")
    (point,) = walk.cells[1].phases[0].table[0].points
    assert point["keep_tokens"] >= 1 and point["keep_ratio"] is None
    assert document["variants"][0]["layer_average_tokens"] == pytest.approx(14, rel=0.02)


def test_an_amount_that_some_image_cannot_give_is_refused(planned: Any, tmp_path: Path) -> None:
    rule, small, rows = rule_of_images(tmp_path / "model"), 0, []
    for number in range(18):
        shown = [SIZES_HW[(number + i) % len(SIZES_HW)] for i in range((0, 1, 1, 2)[number % 4])]
        few = [hw for hw in shown if rule(*hw, len(shown) == 1).tokens < 12]
        small, rows = small + len(few), rows + [number] * bool(few)
    tokens, (height, width) = min((rule(*hw, True).tokens, hw) for hw in SIZES_HW)
    assert 5 < len(rows) <= small < 17 and tokens < 12
    some = ", ".join(map(str, rows[:5]))
    expected = (
        f"phases.finetune.schedule: half does not fit the images of data.train: keep_tokens 12 is more than the "
        f"image's {tokens} tokens: so it is for {small} of 17 images, in {len(rows)} rows (row {some}, ...); the "
        f"smallest has {height} x {width} pixels; give keep_ratio or stride"
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        planned(half="{kind: average_pool, layer: 1, keep_tokens: 12}")
    walk, document = planned(half=f"{{kind: average_pool, layer: 1, keep_tokens: {tokens}}}")
    assert len(walk.cells) == 2 and document["cells"][1]["cost"]["train_tflops"] is not None


def test_the_amount_of_a_second_point_is_held_against_what_the_first_leaves(planned: Any) -> None:
    half = "[{kind: average_pool, layer: 1, stride: 2}, {kind: random_drop, layer: 2, keep_tokens: 5}]"
    with pytest.raises(UsageError, match=r"half does not fit the images of data.train: keep_tokens 5 is more than"):
        planned(half=half)


TAUGHT = "{kind: ramp, compressor: less, key: keep_ratio, start: 0.5, end: 0.2, moves: 2, distill: {teacher: half}}"


@pytest.mark.parametrize(
    ("schedules", "more", "where"),
    [
        (f"[full, {TAUGHT}]", "", "phases.finetune.schedule"),
        ("[full]", "evaluate: {vqa: {kind: exact_match, data: train, under: [half]}}\n", "evaluate.vqa.under"),
    ],
    ids=["teacher", "test"],
)
def test_every_pass_is_held_against_the_images(
    schedules: str, more: str, where: str, planned: Any, tmp_path: Path
) -> None:
    text = TEXT.replace("    PHASE\n", "").replace("[full, half]", schedules)
    text = text.replace(HALF, f"{{kind: average_pool, layer: 1, keep_tokens: 12}}\n  less: {HALF}")
    (tmp_path / "passes.yaml").write_text(text + more)
    with pytest.raises(UsageError, match=f"{where}: half does not fit the images of data.train: keep_tokens 12"):
        prepare(tmp_path / "passes.yaml")


def test_validate_reads_no_data_and_what_is_not_here_is_not_refused(planned: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.json").unlink()
    walk, document = planned(half="{kind: average_pool, layer: 1, keep_tokens: 20}")
    assert [cell["cost"]["train_tflops"] for cell in document["cells"]] == [None, None]
    assert any("cannot be read here" in text for text in document["notices"])
    assert len(walk.loaded.cells) == 2


def test_lengths_by_cost_end_where_a_variant_has_no_amount_or_no_cost(planned: Any) -> None:
    with pytest.raises(UsageError, match=r"compressors\.half: layer_average_tokens 4000 cannot be reached"):
        planned("match_train_tflops: full", half="{kind: average_pool, layer: 1, layer_average_tokens: 4000}")
    with pytest.raises(UsageError, match="the cost of a step is not known here: keep_tokens 20 is more than"):
        planned("match_train_tflops: full", half="{kind: average_pool, layer: 1, keep_tokens: 20}")
