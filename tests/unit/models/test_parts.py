"""What trains and how fast: parts, parameter groups, LoRA on the language model only."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from repository import TINY_LLAVA

from orchestrator.errors import UsageError
from orchestrator.models.build import build_model, weight_tensors
from orchestrator.models.lora import add_lora, merged_weights
from orchestrator.models.parts import parameter_groups, part_of, set_trainable
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.phase import LoraSpec


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec(model_name_or_path=str(TINY_LLAVA)), None)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower"),
        ("model.multi_modal_projector.linear_1.weight", "projector"),
        ("lm_head.weight", "language_model"),
        ("model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight", "language_model"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision_tower"),
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.image_newline", "projector"),
        ("model.text_model.layers.0.mlp.up_proj.weight", "language_model"),
        ("llavolta_compressors.x.weight", "compressor"),
    ],
)
def test_part_of_a_parameter(name: str, part: str) -> None:
    assert part_of(name) == part


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(UsageError, match=r"model\.audio\.weight"):
        part_of("model.audio.weight")


def test_groups_hold_every_trained_parameter_once(model: torch.nn.Module) -> None:
    set_trainable(model, ("projector", "language_model"), lora=False)
    groups = parameter_groups(model, {"projector": 1e-3, "language_model": 2e-5}, weight_decay=0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for n, p in model.named_parameters() if "vision_tower" not in n}
    assert len(grouped) == len({id(p) for p in grouped})
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert found == {
        "projector": (1e-3, 0.1, 2),
        "projector.no_decay": (1e-3, 0.0, 2),
        "language_model": (2e-5, 0.1, 4 * 7 + 2),
        "language_model.no_decay": (2e-5, 0.0, 4 * 2 + 1),
    }


def test_a_part_that_trains_without_a_rate_is_named(model: torch.nn.Module) -> None:
    set_trainable(model, ("projector", "language_model"), lora=False)
    with pytest.raises(UsageError, match="language_model trains and has none"):
        parameter_groups(model, {"projector": 1e-3}, 0.0)


def test_lora_trains_adapters_of_the_language_model_only(model: torch.nn.Module) -> None:
    add_lora(model, LoraSpec(r=4, alpha=8, target_modules=("q_proj", "v_proj")), seed=0)
    set_trainable(model, ("projector", "language_model"), lora=True)
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(names) == 8 and all(name.startswith("model.language_model.") for name in names)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "multi_modal_projector" in name for name in trained)
    assert sum("lora_" in name for name in trained) == 16


def test_lora_on_a_module_that_is_not_there(model: torch.nn.Module) -> None:
    with pytest.raises(UsageError, match="'out_proj' is no linear layer there; known are"):
        add_lora(model, LoraSpec(target_modules=("q_proj", "out_proj")), seed=0)


def test_merged_weights_are_pefts_own_merge(model: torch.nn.Module) -> None:
    names = list(weight_tensors(model))
    add_lora(model, LoraSpec(r=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ours = merged_weights(model, weight_tensors(model))
    assert list(ours) == names
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            module.merge()
    theirs = {name.replace(".base_layer.", "."): tensor for name, tensor in weight_tensors(model).items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
