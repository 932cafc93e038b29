"""`llavolta bench` times every variant in turns and sets it beside the cost formula."""

from __future__ import annotations

import json
from statistics import median

import pytest
from family_folders import write_folder
from repository import ROOT
from sized_rows import SIZED, SIZES_HW, sized_rows

from orchestrator.plan import cost
from orchestrator.plan.cost import MeasuredRow, MeasuredRows, Sample
from orchestrator.plan.experiment_plan import prepare
from orchestrator.spec.model_facts import rule_of_images


@pytest.fixture
def spec(tmp_path, tiny_text):
    text = tiny_text.replace("compressors:\n", "compressors:\n  choose: {kind: fastv, layer: 1, keep_tokens: 8}\n", 1)
    (tmp_path / "mine.yaml").write_text(text)
    return tmp_path / "mine.yaml"


def test_every_variant_stands_beside_the_formula(spec, llavolta, tmp_path):
    done = llavolta("bench", "mine.yaml", "--json", "--rows", "2", "--text-tokens", "16", "-o", "chart.png")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = {row["name"]: row for row in document["variants"]}
    assert {"plain transformers", "full", "heavy", "choose"} <= set(rows)
    assert all(len(row["all_seconds"]) == 7 and min(row["all_seconds"]) > 0 for row in rows.values())
    cell = prepare(spec).cells[0]
    what = cell.spec.phases.finetune.model_dump()
    per_sample = cost.train_tflops_per_sample(cell.facts, rows["heavy"]["points"], Sample(16, 16), what)
    assert rows["heavy"]["train_tflops"] == pytest.approx(2 * per_sample)
    unread = cost.unread_tflops_per_sample(cell.facts, rows["heavy"]["points"], Sample(16, 16), what)
    # The tiny model's tower has one layer, whose output is used.
    assert cost.unused_tower_tflops_per_sample(cell.facts, (), Sample(16, 16)) == 0
    assert rows["heavy"]["run_tflops"] == pytest.approx(2 * (per_sample - unread)) and unread > 0
    assert rows["plain transformers"]["run_tflops"] == rows["plain transformers"]["train_tflops"]
    assert rows["heavy"]["speedup_predicted"] == pytest.approx(rows["full"]["run_tflops"] / rows["heavy"]["run_tflops"])
    assert rows["plain transformers"]["train_tflops"] > rows["full"]["train_tflops"]  # it makes every token's logits
    for row in rows.values():
        assert row["step_seconds"] == median(row["all_seconds"])
        rounds = zip(rows["full"]["all_seconds"], row["all_seconds"], strict=True)
        assert row["speedup_measured"] == pytest.approx(median(full / own for full, own in rounds))
        assert row["ratio"] == pytest.approx(row["speedup_measured"] / row["speedup_predicted"])
    # Choosing is measured against dropping as many tokens by position; a variant that does just that has no overhead.
    assert rows["choose"]["overhead"] is not None and rows["full"]["overhead"] is None
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    (stored,) = tmp_path.rglob("bench/*.json")
    assert json.loads(stored.read_text()) == document


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused(spec, llavolta):
    few = llavolta("bench", "mine.yaml", "--repeats", "3")
    assert few.returncode == 2 and "greater than or equal to 7" in few.stderr
    without = llavolta("bench", "mine.yaml", "--set", "matrix=null", "--set", "phases=null")
    assert without.returncode == 2 and "there is none" in without.stderr + without.stdout
    unsure = "compressors.choose={kind: divt, layer: projector, keep_tokens: 8}"
    adaptive = llavolta("bench", "mine.yaml", "--set", unsure)
    assert adaptive.returncode == 2 and "bench makes its images up" in adaptive.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "idefics3"])
def test_where_images_vary_in_size_an_image_of_the_data_is_timed(family, llavolta, tmp_path):
    (tmp_path / "model").mkdir()
    write_folder(family, tmp_path / "model")
    sized_rows(tmp_path)
    (tmp_path / "sized.yaml").write_text(f"{SIZED}    max_steps: 2\n    global_batch_size: 2\n    schedule: half\n")
    done = llavolta("bench", "sized.yaml", "--json", "--text-tokens", "16")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rule = rule_of_images(tmp_path / "model")
    units = rule(*document["image_size"], True)
    tokens = sorted(rule(height, width, True).tokens for height, width in SIZES_HW)
    assert document["visual_tokens"] == units.tokens == tokens[len(tokens) // 2]
    rows = {row["name"]: row for row in document["variants"]}
    cell = prepare(tmp_path / "sized.yaml").cells[0]
    text = 16 + units.markers
    measured = MeasuredRows((MeasuredRow(1.0, text, 16, (units,)),))
    what = cell.spec.phases.finetune.model_dump()
    for name, points in (("full", []), ("half", rows["half"]["points"])):
        each = cost.train_tflops_per_sample(cell.facts, points, Sample(text, 16, 1, measured), what)
        assert rows[name]["train_tflops"] == pytest.approx(2 * each)
    assert rows["half"]["visual_layer_tokens"] < rows["full"]["visual_layer_tokens"]
    assert all(len(row["all_seconds"]) == 7 and min(row["all_seconds"]) > 0 for row in rows.values())


@pytest.mark.slow
def test_where_the_data_has_videos_one_of_them_is_timed(llavolta):
    """Four frames of four tokens and the newline; what acts across frames has no plain method at its budget."""
    few = ["--set", "data.train.num_clips=6", "--set", "data.test.num_clips=2"]
    done = llavolta(
        "bench", ROOT / "experiments" / "moving_shapes.yaml", "--json", "--rows", "2", "--text-tokens", "8", *few
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["visual_tokens"], document["frames"], document["image_size"]) == (4 * 4 + 1, 4, [64, 64])
    rows = {row["name"]: row for row in document["variants"]}
    controls = {name for name in rows if name.startswith("stride")}
    assert controls == {"stride at the budget of pooled"} and rows["pooled"]["overhead"] is not None
    assert rows["changed"]["overhead"] is None and rows["still"]["overhead"] is None
    layer_tokens = {name: rows[name]["visual_layer_tokens"] for name in ("full", "pooled", "changed", "still")}
    assert layer_tokens == {"full": 4 * 17, "pooled": 17 + 3 * 9, "changed": 4 * 9, "still": 4 * 5}


@pytest.mark.slow
def test_models_whose_images_vary_are_told_without_their_processor(spec, llavolta, tmp_path):
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    done = llavolta("bench", "mine.yaml", "--set", "model.model_name_or_path=qwen")
    assert done.returncode == 2 and "no fixed number of visual tokens" in done.stderr
    assert "its processor" in done.stderr
