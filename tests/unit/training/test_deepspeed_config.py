"""DeepSpeed configurations agree with the recipe, or say what contradicts it; rates as in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from orchestrator.errors import UsageError
from orchestrator.spec.deepspeed import zero_stage
from orchestrator.spec.phase import PhaseSpec
from orchestrator.spec.yaml.file_paths import DEEPSPEED_PRESETS
from orchestrator.training.batches import deal
from orchestrator.training.deepspeed_config import deepspeed_config
from orchestrator.training.step import rate_factor


def _config(deepspeed: object, dtype: str = "float32", **recipe: object) -> dict:
    spec = PhaseSpec(data="train", deepspeed=deepspeed, **recipe)
    return deepspeed_config(spec, dtype, micro_batch_size=4, accumulation_steps=2, world_size=2, on_gpu=False)


@pytest.mark.parametrize("preset", DEEPSPEED_PRESETS)
def test_presets(preset: str) -> None:
    config = _config(preset, "bfloat16", max_grad_norm=0.5)
    assert zero_stage(config) == max(1, int(preset[4])), "rounded weights need an optimizer that keeps the exact ones"
    assert zero_stage(_config(preset)) == int(preset[4])
    assert ("offload_optimizer" in config["zero_optimization"]) == preset.endswith("_offload")
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 2)
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]


def test_a_hugging_face_file_with_auto(tmp_path: Path) -> None:
    path = tmp_path / "zero3.json"
    path.write_text(
        json.dumps(
            {
                "bf16": {"enabled": "auto"},
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_clipping": "auto",
                "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
                "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": 1e9},
            }
        )
    )
    config = _config(str(path))
    assert "auto" not in json.dumps(config)
    assert config["zero_optimization"] == {"stage": 3, "sub_group_size": 1e9}
    assert "scheduler" not in config


@pytest.mark.parametrize(
    ("given_config", "named"),
    [
        ({"train_batch_size": 99}, "train_batch_size: 99"),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps: 7"),
        ({"gradient_clipping": 3.0}, "gradient_clipping"),
        ({"bf16": {"enabled": True}}, "model.dtype"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "optimizer"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "scheduler"),
        ("zero9", "zero9"),
        ("/nowhere/zero.json", "/nowhere/zero.json"),
    ],
)
def test_contradictions_are_named(given_config: object, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        _config(given_config)


@given(
    kind=st.sampled_from(["cosine", "linear"]),
    total_steps=st.integers(1, 60),
    warmup_ratio=st.sampled_from([0.0, 0.03, 0.1, 0.5]),
)
def test_rates_are_those_of_transformers(kind: str, total_steps: int, warmup_ratio: float) -> None:
    import math

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, math.ceil(warmup_ratio * total_steps), total_steps)
    for step in range(total_steps):
        assert rate_factor(kind, step, total_steps, warmup_ratio) == pytest.approx(
            scheduler.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        scheduler.step()


@given(count=st.integers(8, 70), micro=st.integers(1, 9), world_size=st.integers(1, 4))
def test_every_sample_is_dealt_once_and_ranks_work_alike(count: int, micro: int, world_size: int) -> None:
    try:
        shares = [deal(range(count), micro, rank, world_size) for rank in range(world_size)]
    except UsageError:
        assert -(-count // (micro * world_size)) * world_size > count
        return
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    sizes = [len(batch) for share in shares for batch in share]
    assert max(sizes) <= micro
    assert max(sizes) - min(sizes) <= 1
