"""A DeepSpeed configuration may say how a phase is computed; what could change the numbers is refused by `validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from repository import TINY_LLAVA

from orchestrator.errors import SpecError
from orchestrator.spec.checks.deepspeed import config_findings
from orchestrator.spec.loader import load_experiment
from orchestrator.spec.phase import PhaseSpec

HUGGING_FACE = {  # LLaVA's own scripts/zero3.json
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_clipping": "auto",
    "steps_per_print": 1e5,
    "wall_clock_breakdown": False,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
}  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"compression_training": {"weight_quantization": {}}}, "compression_training"),
    ({"data_efficiency": {"enabled": True}}, "data_efficiency"),
    ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
    ({"progressive_layer_drop": {"enabled": True}}, "progressive_layer_drop"),
    ({"eigenvalue": {"enabled": True}}, "eigenvalue"),
    ({"quantize_training": {"enabled": True}}, "quantize_training"),
    ({"communication_data_type": "fp16"}, "communication_data_type"),
    ({"prescale_gradients": True}, "prescale_gradients"),
    ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
    ({"sparse_gradients": True}, "sparse_gradients"),
    ({"amp": {"enabled": True}}, "amp"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
    ({"data_types": {"buffer_dtype": "bf16"}}, "data_types.buffer_dtype"),
    ({"bf16": {"enabled": True}}, "bf16.enabled"),
    ({"fp16": {"enabled": True}}, "fp16.enabled"),
    ({"gradient_clipping": 3.0}, "gradient_clipping"),
    ({"train_batch_size": 99}, "train_batch_size"),
    ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps"),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "optimizer.params.lr"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "scheduler.params.warmup_num_steps"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights"),
    ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_optimization.zero_quantized_gradients"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
     "zero_optimization.offload_optimizer.ratio"),
    ({"something_new": 1}, "something_new"),
    ({"something_new": "auto"}, "something_new"),
]  # fmt: skip


def experiment(folder: Path, deepspeed: str) -> Path:
    file = folder / "x.yaml"
    file.write_text(
        f"""schema_version: 1
name: x
model: {{model_name_or_path: {TINY_LLAVA}, weights: random, dtype: float32}}
data: {{train: {{kind: easy_vqa, split: train}}}}
phases:
  finetune:
    data: train
    max_steps: 2
    global_batch_size: 4
    per_device_train_batch_size: 4
    deepspeed: {deepspeed}
evaluate: {{}}
cluster: {{num_workers: 1, storage_path: ./store}}
"""
    )
    return file


@pytest.mark.parametrize(("config", "path"), REFUSED)
def test_what_could_change_numbers_is_refused_inline_and_in_a_file(
    tmp_path: Path, config: dict[str, Any], path: str
) -> None:
    with pytest.raises(SpecError) as inline:
        load_experiment(experiment(tmp_path, json.dumps(config)))
    (error,) = inline.value.errors
    assert error.path == f"phases.finetune.deepspeed.{path}" and error.line == 11 and error.allowed
    (tmp_path / "ds.json").write_text("{\n" + json.dumps(config, indent=1)[2:])
    with pytest.raises(SpecError) as in_file:
        load_experiment(experiment(tmp_path, "./ds.json"))
    (error,) = in_file.value.errors
    lines = (tmp_path / "ds.json").read_text().splitlines()
    number = 1 + next(i for i, line in enumerate(lines) if f'"{path.rpartition(".")[2]}"' in line)
    assert f"ds.json:{number}: " in error.message and error.line == 11 and error.allowed


def test_hugging_face_files_are_taken(tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text(json.dumps(HUGGING_FACE))
    load_experiment(experiment(tmp_path, "./zero3.json"))
    load_experiment(experiment(tmp_path, json.dumps(HUGGING_FACE)))
    finding = next(iter(config_findings([1], PhaseSpec(data="train"), "auto", None)))
    assert finding.allowed == "a mapping of keys"


def test_dropout_inside_attention_is_refused(tmp_path: Path) -> None:
    config = json.loads((TINY_LLAVA / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    file = experiment(tmp_path, "zero2")
    file.write_text(file.read_text().replace(str(TINY_LLAVA), "./model"))
    with pytest.raises(SpecError) as caught:
        load_experiment(file)
    (error,) = caught.value.errors
    assert "text_config.attention_dropout is 0.1" in error.message and error.line == 3


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("lfm2_vl", "once for each image"), ("step3p7", "local views"), ("idefics2", "no adapter of its own")],
)
@pytest.mark.parametrize("deepspeed", ["zero3", "zero3_offload", "{zero_optimization: {stage: 3}}", "./ds.json"])
def test_workers_that_would_wait_for_one_another_are_refused(
    tmp_path: Path, model_type: str, reason: str, deepspeed: str
) -> None:
    file = experiment(tmp_path, deepspeed)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    one = file.read_text().replace(str(TINY_LLAVA), "./model").replace("train_batch_size: 4", "train_batch_size: 2")
    several = one.replace("num_workers: 1", "num_workers: 2")
    file.write_text(several)
    with pytest.raises(SpecError) as caught:
        load_experiment(file)
    (error,) = caught.value.errors
    assert error.path == "phases.finetune.deepspeed" and error.line == 11 and "zero2" in (error.allowed or "")
    assert "under ZeRO-3 all workers call the same modules" in error.message and reason in error.message
    for allowed in (one, several.replace(f"deepspeed: {deepspeed}", "deepspeed: zero2")):
        file.write_text(allowed)
        load_experiment(file)
