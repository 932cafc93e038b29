"""`run --smoke` as a transform: what of an experiment shrinks, what stays, and that every family can be made small."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from orchestrator_plugins.data.llava_json import LlavaJsonSpec
from PIL import Image
from repository import MODELS
from transformers import AutoConfig, AutoModelForImageTextToText

from orchestrator.compression import attach
from orchestrator.compression.testing.families import TINY
from orchestrator.data.rows import open_data_set
from orchestrator.errors import DataError, UsageError
from orchestrator.models.shrink import shrunk_config
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.smoke import (
    ROWS,
    Machine,
    SmallModel,
    changed_for,
    layers_in_use,
    map_layers,
    map_tower_layers,
    prepare_smoke,
    smoke_spec,
    tower_layers_in_use,
)
from orchestrator.spec.loader import load_experiment
from orchestrator.spec.model_facts import model_facts

LAPTOP = Machine(2, 0, frozenset({"eager", "sdpa"}), frozenset({"float32", "bfloat16"}))
TEXT = f"""
schema_version: 1
name: large
model: {{model_name_or_path: {MODELS / "llava-1.5-7b"}, weights: random, dtype: float16,
         attn_implementation: flash_attention_2}}
data:
  train: {{kind: easy_vqa}}
  test: {{kind: easy_vqa, split: test, max_samples: 20}}
compressors:
  heavy: [{{kind: average_pool, layer: 2, stride: 8}}, {{kind: average_pool, layer: 50%, stride: 2}}]
  late: {{kind: average_pool, layer: 30, keep_tokens: 144}}
  mean: {{kind: average_pool, layer: 3, layer_average_tokens: 100}}
schedules:
  counted:
    kind: stages
    stages: [{{steps: 10, compressor: heavy}}, {{samples: 12800, compressor: late}}, {{steps: 890}}]
  shares:
    kind: stages
    stages: [{{share: 1/20, compressor: heavy}}, {{compressor: mean}}]
phases:
  finetune:
    data: train
    schedule: full
    max_steps: 1000
    global_batch_size: 128
    per_device_train_batch_size: 4
    gradient_checkpointing: true
    deepspeed: zero3
    lora: {{r: 8}}
evaluate:
  vqa: {{kind: exact_match, data: test, under: [final, full]}}
matrix:
  phases.finetune.schedule: [full, counted, shares]
cluster: {{num_workers: 8, lanes: auto, use_gpu: true, resources_per_worker: {{CPU: 4, GPU: 1}}, address: auto}}
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "large.yaml"
    path.write_text(TEXT)
    return expand_cells(load_experiment(path))


@pytest.fixture
def small(cells, tmp_path):
    """The cells made small, by schedule."""
    layers = map_layers(32, {layer for cell in cells for layer in layers_in_use(cell.spec, 32)})
    model = SmallModel(MODELS / "tiny-llava", layers)
    specs = [smoke_spec(cell, model, LAPTOP, str(tmp_path), tmp_path) for cell in cells]
    return dict(zip(("full", "counted", "shares"), specs, strict=True))


@pytest.mark.parametrize("used", [[2, 16], [0, 1], [31], [], [2, 3, 16, 30], list(range(10)), [29, 30, 31]])
def test_layers_keep_their_order_and_stay_apart(used):
    layers = map_layers(32, used)
    places = [layers.at[layer] for layer in sorted(used)]
    assert places == sorted(set(places)) and all(0 <= place < layers.small_depth for place in places)
    assert all((layer == 0) == (place == 0) for layer, place in layers.at.items())
    assert 4 <= layers.small_depth <= max(4, len(used) + 1)


def test_a_shallow_model_keeps_its_layers_and_a_sweep_over_all_of_them_stays_small():
    assert map_layers(4, {1, 2, 3}).at == {1: 1, 2: 2, 3: 3}
    sweep = map_layers(80, range(80))
    assert sweep.small_depth == 16 and list(sweep.at.values()) == sorted(sweep.at.values())


def test_every_stage_is_there_with_its_variant_and_its_amounts(cells, small):
    for name, spec in small.items():
        assert spec.compressors["heavy"][0].stride == 8 and spec.compressors["late"][0].keep_tokens == 144
        assert [point.layer for point in spec.compressors["heavy"]] == [1, 3]
        assert spec.compressors["mean"][0].layer == 2 and spec.compressors["late"][0].layer == 4
        (full_size,) = next(cell for cell in cells if name in cell.name).phases
        phase = spec.phases.finetune
        if name != "full":
            table = phase.schedule.compile(phase.max_steps, phase.global_batch_size)
            assert [variant for _, _, variant in table.actions] == [a.variant for a in full_size.table]
    assert small["full"].phases.finetune.max_steps == 8
    # 10 of 1,000 steps and 100 more: as many steps are taken as the first of them needs.
    assert small["counted"].phases.finetune.max_steps == 50 and small["shares"].phases.finetune.max_steps == 10


def test_the_mean_over_layers_is_solved_for_the_full_size_model(cells, small):
    (action,) = [a for a in cells[2].phases[0].table if a.variant == "mean"]
    assert small["shares"].compressors["mean"][0].keep_tokens == action.points[0]["keep_tokens"]


def test_batches_data_and_places_shrink_and_settings_stay(cells, small, tmp_path):
    spec = small["counted"]
    phase = spec.phases.finetune
    assert (phase.deepspeed, phase.gradient_checkpointing, phase.lora.r) == ("zero3", True, 8)
    assert (phase.global_batch_size, phase.per_device_train_batch_size) == (8, 2)  # two workers, two accumulated
    assert (spec.data["train"].max_samples, spec.data["test"].max_samples) == (ROWS, 20)
    assert spec.cluster.address is None and (spec.cluster.num_workers, spec.cluster.lanes) == (2, 1)
    assert (
        spec.cluster.storage_path == str(tmp_path) and spec.tracking.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    )
    text = "\n".join(changed_for(cells[0].spec, spec))
    assert "flash_attention_2 is not possible here, sdpa" in text and "float16 is not possible here" in text
    assert "num_workers: 8 is not possible here, 2" in text and "use_gpu" in text


def test_of_a_data_file_only_the_first_rows_and_their_images_are_needed(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "first.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "it"}]
    rows = [{"image": "first.png" if i < 3 else "missing.png", "conversations": turns} for i in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    spec = LlavaJsonSpec(data_path=str(tmp_path / "rows.json"), on_bad_row="drop", num_samples=10)
    few = spec.first_rows(3, tmp_path / "small")
    assert few.num_rows() == 3 and few.data_path.startswith(str(tmp_path / "small"))
    rows = open_data_set(few).rows()
    assert [row.images[0].path for row in rows] == [str(tmp_path / "first.png")] * 3
    with pytest.raises(DataError, match="cannot be read"):
        spec.model_copy(update={"data_path": str(tmp_path / "absent.json")}).first_rows(3, tmp_path)


@pytest.mark.parametrize("family", sorted({*TINY} - {"granite4_vision"}))  # its class has no usable defaults
def test_every_family_can_be_made_small_and_sees_as_many_visual_tokens(family, tmp_path):
    """The class's own defaults are a full-size model."""
    full = AutoConfig.for_model(family)
    full.save_pretrained(tmp_path / "full")
    small = shrunk_config(full, 6)
    small.save_pretrained(tmp_path / "small")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(small)
    assert sum(parameter.numel() for parameter in model.parameters()) < 20_000_000
    assert small.get_text_config().num_hidden_layers == 6
    before, after = model_facts(str(tmp_path / "full")), model_facts(str(tmp_path / "small"))
    if before is not None:  # a type outside the table has no facts
        same = ("visual_grid", "vision_tokens", "vocab_size", "has_cls", "tiled")
        assert all(getattr(before, name) == getattr(after, name) for name in same) and after.num_layers == 6


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_small_model_of_every_family_runs(family):
    tiny = TINY[family]
    config = shrunk_config(tiny.build("sdpa" if "sdpa" in tiny.attentions else "eager", 0).config, 3)
    model = AutoModelForImageTextToText.from_config(config)
    loss = model(**tiny.batch([[3, "image", 4]], "right", 0, 2)).loss
    assert torch.isfinite(loss)


def test_a_folder_that_is_not_its_own_is_never_emptied(tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text(TEXT)
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="no trial run wrote"):
        prepare_smoke(load_experiment(path, [f"cluster.storage_path={tmp_path}"]))
    assert (tmp_path / "smoke" / "mine.txt").read_text() == "mine"


def test_a_model_without_its_processor_is_reported_with_its_own_folder(tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text(TEXT)
    with pytest.raises(UsageError, match=r"no processor in .*llava-1\.5-7b"):
        prepare_smoke(load_experiment(path, [f"cluster.storage_path={tmp_path}"]))


@pytest.mark.parametrize("family", ["llava", "vipllava", "paligemma"])
def test_points_in_the_vision_tower_keep_their_order_in_a_small_one(family):
    """Layers 0, 1, and two near one another far down: 0, 1, 2, 3, all of which the small model has a place for."""
    tower = map_tower_layers({5, 1, 4})
    assert tower == {0: 0, 1: 1, 4: 2, 5: 3}
    config = TINY[family].build("eager", 0).config
    config.vision_config.num_hidden_layers = 24
    if family == "vipllava":
        config.vision_feature_layer = [-2, -5, 6]
    if family == "llava":
        config.vision_feature_layer = -2
    model = AutoModelForImageTextToText.from_config(shrunk_config(config, 4, tower_layers=len(tower)))
    attach(model, [{"kind": "average_pool", "layer": f"tower:{place}", "keep_tokens": 4} for place in tower.values()])


def test_a_point_in_the_vision_tower_has_its_place_in_the_small_one(tmp_path):
    path = tmp_path / "large.yaml"
    early = "  late: [{kind: average_pool_2d, layer: tower:25%, stride: 4}, {kind: laco, layer: tower:12, stride: 4}]"
    path.write_text(TEXT.replace("  late: {kind: average_pool, layer: 30, keep_tokens: 144}", early))
    cell = next(cell for cell in expand_cells(load_experiment(path)) if "counted" in cell.name)
    used = tower_layers_in_use(cell.spec, 24)
    assert used == {6, 12}
    layers = replace(map_layers(32, layers_in_use(cell.spec, 32)), tower_depth=24, tower=map_tower_layers(used))
    small = smoke_spec(cell, SmallModel(MODELS / "tiny-llava", layers), LAPTOP, str(tmp_path), tmp_path)
    assert [point.layer for point in small.compressors["late"]] == ["tower:1", "tower:2"]


def test_a_start_from_elsewhere_is_left_out_and_reported(cells, tmp_path):
    spec = cells[0].spec
    phase = spec.phases.finetune.model_copy(update={"start_from": str(MODELS)})
    spec = spec.model_copy(update={"phases": spec.phases.model_copy(update={"finetune": phase})})
    plan = replace(cells[0].phases[0], recipe=phase)
    model = SmallModel(MODELS / "tiny-llava", map_layers(32, layers_in_use(spec, 32)))
    small = smoke_spec(replace(cells[0], spec=spec, phases=(plan,)), model, LAPTOP, str(tmp_path), tmp_path)
    assert small.phases.finetune.start_from is None
    assert any("start_from" in note for note in changed_for(spec, small))
