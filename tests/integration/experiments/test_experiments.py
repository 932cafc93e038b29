"""Every experiment file validates and plans offline, and the paper's recipes are the paper's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import orchestrator as llv
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.documents import variant_documents
from orchestrator.plan.tree import build_stage_tree
from orchestrator.spec.loader import load_experiment

EXPERIMENTS = ROOT / "experiments"
FILES = sorted([*EXPERIMENTS.rglob("*.yaml"), *EXPERIMENTS.rglob("*.yml")])
SEVEN_B = EXPERIMENTS / "llava15_7b"
CELLS = {
    "quickstart.yaml": 3,
    "redundancy.yaml": 1,
    "redundancy_easy_vqa.yaml": 3,
    "digit_grid.yaml": 33,
    "redundancy_digit_grid.yaml": 3,
    "easy_vqa.yaml": 33,
    "moving_shapes.yaml": 1,
    "bench.yaml": 1,
    "equal_cost.yaml": 15,
    "search_easy_vqa.yaml": 1,  # the base of its trials
    "base/tiny_llava.yaml": 1,
    "smollm2/redundancy.yaml": 1,
    "llava15_7b/base.yaml": 1,
    "llava15_7b/schedules.yaml": 7,
    "llava15_7b/fixed.yaml": 7,
    "llava15_7b/hidrop.yaml": 3,
    "llava15_7b/compressors.yaml": 5,
    "llava15_7b/learned.yaml": 3,
    "llava15_7b/depth.yaml": 3,
    "llava15_7b/shares.yaml": 6,
    "llava15_7b/redundancy.yaml": 1,
    "llava15_7b/13b.yaml": 2,
    "llava15_7b/video.yaml": 6,
}
AS_IT_COMES = {"redundancy.yaml", "llava15_7b/redundancy.yaml"}  # nothing is trained
# LLaVolta, Table 1: layer/stride of each stage; None is full tokens.
SCHEMES = {
    "full": [None],
    "two": [(2, 8), None],
    "three_deeper": [(2, 8), (16, 8), None],
    "three_wider": [(2, 8), (2, 2), None],
    "four_wider_deeper": [(2, 8), (2, 2), (16, 2), None],
    "four_deeper_wider": [(2, 8), (16, 8), (16, 2), None],
    "last_stage_compression": [(2, 16), (16, 16), (16, 4)],
}
# 665,298 rows in batches of 128 are 5,197 optimizer steps; boundaries are rounded cumulative shares.
BOUNDARIES = {1: [5198], 2: [2599, 5198], 3: [1733, 3465, 5198], 4: [1300, 2599, 3899, 5198]}


def relative(path: Path) -> str:
    return str(path.relative_to(EXPERIMENTS))


def by_schedule(file: Path) -> dict:
    """Schedule's name -> plan of the finetuning."""
    cells = expand_cells(load_experiment(file))
    return {cell.axes["phases.finetune.schedule"]: cell.phases[-1] for cell in cells}


def places(phase) -> list:
    """(layer, stride) of each action, None where there is no compressor."""
    points = [action.points for action in phase.table]
    return [(point[0]["layer"], point[0]["stride"]) if point else None for point in points]


def test_llava_15_pads_in_finetuning_and_tests_alone():
    """As scripts/v1_5/{pretrain,finetune}.sh of LLaVA do, and its evaluations by the model's config."""
    data = load_experiment(SEVEN_B / "base.yaml").spec.data
    assert {name: spec.image_aspect_ratio for name, spec in data.items()} == {
        "blip558k": None,
        "mix665k": "pad",
    }


def test_llava_15_is_tested_on_the_papers_benchmarks_as_it_was_trained():
    pytest.importorskip("lmms_eval")
    others = AS_IT_COMES | {"llava15_7b/video.yaml"}
    for file in sorted(file for file in SEVEN_B.glob("*.yaml") if relative(file) not in others):
        for cell in expand_cells(load_experiment(file)):
            tests = [job for job in cell.evaluations if job.name == "bench"]
            parts = {job.part for job in tests}
            assert len(parts) == 13 and {"gqa", "mme", "mmbench_cn_dev", "mmmu_val"} <= parts
            for job in tests:
                spec = job.spec
                assert (spec["conversation_template"], spec["image_aspect_ratio"]) == ("vicuna_v1", "pad")
                assert job.model_max_length == 2048
                assert job.points == (() if job.under == "full" else cell.phases[-1].table[-1].points)


def test_videos_have_the_six_schemes_of_table_8_each_frame_alone():
    file = SEVEN_B / "video.yaml"
    expected = {name: stages for name, stages in SCHEMES.items() if name != "last_stage_compression"}
    assert {name: places(phase) for name, phase in by_schedule(file).items()} == expected
    cell, *_ = expand_cells(load_experiment(file))
    assert {job.name for job in cell.evaluations} == {"msvd", "msrvtt", "activitynet"}
    assert {job.spec["kind"] for job in cell.evaluations} == {"judge"}
    assert not any(type(point).across_frames for points in cell.spec.compressors.values() for point in points)


def test_a_video_is_not_costed_as_an_image():
    document = llv.load(SEVEN_B / "video.yaml").plan()
    assert document["totals"]["train_tflops_alone"] is None
    assert any("nor the cost of finetune" in text for text in document["notices"])


def test_all_files_are_known():
    assert {relative(file) for file in FILES} == set(CELLS)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_validates_and_plans(file):
    loaded = load_experiment(file)
    cells = expand_cells(loaded)
    tree = build_stage_tree(cells)
    assert len(cells) == len({cell.id for cell in cells}) == CELLS[relative(file)]
    assert len({cell.name for cell in cells}) == len(cells)
    assert set(tree.path_of) == {cell.id for cell in cells}
    assert not [notice for notice in loaded.notices if "alias" in notice]
    for cell in cells:
        assert tree.path_of[cell.id] or relative(file) in AS_IT_COMES
        assert cell.evaluations or relative(file) == "bench.yaml"  # which trains nothing


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_opens_with_how_to_use_it(file):
    comment = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line)
    text = "\n".join(comment)
    verb = {"bench.yaml": "bench", "search_easy_vqa.yaml": "search"}.get(relative(file), "run")
    assert f"llavolta {verb} experiments/{relative(file)}" in text
    assert "Costs:" in text
    assert f"`{relative(file)}`" in (EXPERIMENTS / "README.md").read_text()


def test_easy_vqa_has_the_seven_schemes_at_shares_of_the_depth():
    phases = by_schedule(EXPERIMENTS / "easy_vqa.yaml")
    at_tiny_depth = {2: 1, 16: 2}
    expected = {
        name: [place and (at_tiny_depth[place[0]], place[1]) for place in stages] for name, stages in SCHEMES.items()
    }
    assert {name: places(phases[name]) for name in SCHEMES} == expected
    assert phases.keys() - SCHEMES.keys() == {"early_8", "last_tenth_full", "four_random", "four_stride"}


def test_a_patch_is_a_digit_and_an_answer_about_digits_a_single_token():
    """Else two tokens averaged would not be two digits mixed, and an answer would be learned in parts."""
    from transformers import AutoConfig, AutoProcessor

    spec = load_experiment(EXPERIMENTS / "redundancy_digit_grid.yaml").spec
    vision = AutoConfig.from_pretrained(spec.model.model_name_or_path).vision_config
    tokenizer = AutoProcessor.from_pretrained(spec.model.model_name_or_path).tokenizer
    assert {name: data.split for name, data in spec.data.items()} == {
        "places": "train",
        "train": "train",
        "test": "test",
    }
    for data in spec.data.values():
        assert (data.cell_pixels, data.size * data.cell_pixels) == (vision.patch_size, vision.image_size)
    for answer in (*range(10), "yes", "no"):
        assert len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) == 1


def test_quickstart_compares_full_compressed_and_staged():
    phases = by_schedule(EXPERIMENTS / "quickstart.yaml")
    assert places(phases["full"]) == [None]
    assert places(phases["heavy"]) == [(1, 8)]
    assert places(phases["four_stage"]) == [(1, 8), (1, 2), (2, 2), None]


def test_7b_schemes_and_their_table_of_steps():
    phases = by_schedule(SEVEN_B / "schedules.yaml")
    assert {name: places(phase) for name, phase in phases.items()} == SCHEMES
    for name, phase in phases.items():
        assert phase.total_steps == 5198
        ends = [action.last_step for action in phase.table]
        assert ends == BOUNDARIES[len(SCHEMES[name])], name
        assert [action.first_step for action in phase.table] == [0, *ends[:-1]]


def test_7b_schemes_share_one_uncompressed_pretraining():
    cells = expand_cells(load_experiment(SEVEN_B / "schedules.yaml"))
    tree = build_stage_tree(cells)
    pretraining = [run for run in tree.stage_runs.values() if run.phase == "pretrain"]
    assert [(run.last_step, run.table[0].points) for run in pretraining] == [(2181, ())]
    assert len(tree.cells_of[pretraining[0].id]) == 7


def test_7b_fixed_compresses_both_phases_alike():
    cells = expand_cells(load_experiment(SEVEN_B / "fixed.yaml"))
    pairs = [(places(cell.phases[0]), places(cell.phases[1])) for cell in cells]
    assert all(first == second for first, second in pairs)
    assert [first[0] for first, _ in pairs] == [None, (16, 2), (16, 4), (16, 8), (2, 2), (2, 4), (2, 8)]


def test_7b_hidrop_has_the_published_means_over_the_layers():
    """2 * 576 + 4 * 87 + 2 * 10 + 2 * 5 + 6 * 1 = 1536 = 32 * 48; with 215 instead of 87 it is 32 * 64."""
    cells = expand_cells(load_experiment(SEVEN_B / "hidrop.yaml"))
    documents = variant_documents(cells)
    assert {one["name"]: one["layer_average_tokens"] for one in documents} == {"hidrop_48": 48.0, "hidrop_64": 64.0}
    assert [one["compression_ratio"] for one in documents] == [12.0, 9.0]
    assert [one["kept_tokens"] for one in documents[0]["points"]] == [576, 87, 10, 5, 1, 0]


def test_7b_compressors_leave_as_many_tokens_in_training_and_at_test_time():
    """LLaVolta, Table 3: 3,312 visual tokens over the layers, 556 %."""
    cells = {
        cell.axes["phases.finetune.schedule"]: cell
        for cell in expand_cells(load_experiment(SEVEN_B / "compressors.yaml"))
    }
    documents = variant_documents(list(cells.values()))
    assert {one["name"]: 32 * one["layer_average_tokens"] for one in documents} == dict.fromkeys(
        ("random_drop", "k_means", "fastv", "average_pool"), 3312
    )
    tested = {name: {job.under for job in cell.evaluations if job.name == "test_only"} for name, cell in cells.items()}
    assert tested.pop("full") == {"random_drop", "k_means", "fastv", "average_pool"} and not any(tested.values())


def test_7b_learned_and_depth_have_the_papers_tokens():
    """LLaVolta, Tables 4 and 7; of `one` the paper prints 266 %, which is not layer 8 and stride 8."""
    tokens = {"q_former": 1024, "k1_s64": 855, "one": 6336, "several": 6912}
    found = {}
    for file in ("learned.yaml", "depth.yaml"):
        documents = variant_documents(expand_cells(load_experiment(SEVEN_B / file)))
        found |= {one["name"]: 32 * one["layer_average_tokens"] for one in documents}
    assert found == tokens


def test_7b_shares_train_every_compressed_step_once():
    """LLaVolta, Table 9, with the author's pivots (1300, 2600, 3900, about 4600 of 5198)."""
    phases = by_schedule(SEVEN_B / "shares.yaml")
    ends = {name: phase.table[0].last_step for name, phase in phases.items()}
    assert ends == {"full": 5198, "share_25": 1300, "share_50": 2599, "share_75": 3899, "share_90": 4678, "k2_s8": 5198}
    cells = expand_cells(load_experiment(SEVEN_B / "shares.yaml"))
    runs = [run for run in build_stage_tree(cells).stage_runs.values() if run.phase == "finetune"]
    compressed = sorted((run.first_step, run.last_step) for run in runs if run.table[-1].points)
    assert compressed == [(0, 1300), (1300, 2599), (2599, 3899), (3899, 4678), (4678, 5198)]
    (always,) = (cell for cell in cells if cell.axes["phases.finetune.schedule"] == "k2_s8")
    assert {job.under for job in always.evaluations} == {"final", "full"}


def test_7b_redundancy_sweeps_the_papers_layers_and_strides():
    pytest.importorskip("lmms_eval")
    (cell,) = expand_cells(load_experiment(SEVEN_B / "redundancy.yaml"))
    found = {(job.part, *((p["layer"], p["stride"]) for p in job.points)) for job in cell.evaluations}
    places = [(layer, stride) for layer in (1, 2, 8, 16) for stride in (4, 8, 16, 64)]
    tasks = ("gqa", "scienceqa", "mmvet", "llava_in_the_wild")
    assert found == {(task, *place) for task in tasks for place in [(), *((one,) for one in places)]}


def test_7b_recipe_is_the_papers():
    spec = load_experiment(SEVEN_B / "base.yaml").spec
    pretrain, finetune = spec.phases.pretrain, spec.phases.finetune
    assert (pretrain.global_batch_size, pretrain.learning_rate, pretrain.train) == (256, 1e-3, ("projector",))
    assert (finetune.global_batch_size, finetune.learning_rate) == (128, 2e-5)
    assert finetune.train == ("projector", "language_model") and finetune.lora is None
    for phase in (pretrain, finetune):
        assert (phase.lr_scheduler_type, phase.warmup_ratio, phase.weight_decay) == ("cosine", 0.03, 0.0)
        assert (phase.model_max_length, phase.gradient_checkpointing) == (2048, True)
    assert (pretrain.deepspeed, finetune.deepspeed, spec.model.dtype) == ("zero2", "zero3", "bfloat16")


def test_7b_plan_gives_the_papers_figures(tmp_path):
    """LLaVolta, Table 5: TFLOPs and tokens, on the command line, without weights, data or network."""
    command = [sys.executable, "-m", "orchestrator", "plan", SEVEN_B / "fixed.yaml", "--json", "--text-tokens", "62"]
    env = {**os.environ, "LLAVOLTA_STORAGE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    found = {
        run["variant"]: (
            round(run["cost"]["forward_decoder_linear_tflops"], 2),
            run["cost"]["visual_layer_tokens"],
            round(100 * run["cost"]["compression_ratio"], 1),
        )
        for run in document["stage_runs"]
        if run["phase"] == "finetune"
    }
    assert found == {
        "full": (8.26, 18432, 100.0),
        "k16_s2": (6.40, 13824, 133.3),
        "k16_s4": (5.47, 11520, 160.0),
        "k16_s8": (5.00, 10368, 177.8),
        "k2_s2": (4.77, 9792, 188.2),
        "k2_s4": (3.02, 5472, 336.8),
        "k2_s8": (2.14, 3312, 556.5),
    }


@pytest.mark.parametrize(
    ("folder", "parameters"),
    [
        # Vicuna with 32,064 words, the vision tower, the projector.
        ("llava-1.5-7b", 6_738_939_904 + 303_507_456 + 20_979_712),
        ("llava-1.5-13b", 13_016_519_680 + 303_507_456 + 31_467_520),
    ],
)
def test_configs_are_those_of_llava_15(folder, parameters):
    """Built by transformers without memory."""
    import torch
    from transformers import AutoConfig, LlavaForConditionalGeneration

    config = AutoConfig.from_pretrained(EXPERIMENTS / "models" / folder)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (config.image_token_index, config.vision_feature_layer) == (32000, -2)
    assert config.vision_feature_select_strategy == "default"
