"""LoRA through peft, on the language model only, and weights with the adapters merged for everyone else."""

from __future__ import annotations

import re

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from orchestrator.errors import UsageError
from orchestrator.models.parts import LANGUAGE_MODEL, part_module, plain_name
from orchestrator.spec.phase import LoraSpec


def add_lora(model: PreTrainedModel, lora: LoraSpec, seed: int) -> None:
    """Add adapters in place to the named linear layers inside the language model; the model's class stays.

    Args:
        model: Plain model in float32.
        lora: Rank, alpha, dropout and module names.
        seed: The adapters' init is drawn from it alone.

    Raises:
        UsageError: a name in `target_modules` matches no linear layer of the language model.
    """
    config = lora_config(model, lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def lora_config(model: PreTrainedModel, lora: LoraSpec) -> LoraConfig:
    """Return peft's settings of adapters inside the language model.

    Raises:
        UsageError: a name in `target_modules` matches no linear layer of the language model.
    """
    prefix, language_model = part_module(model, LANGUAGE_MODEL)
    linear = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UsageError(f"lora.target_modules: {target!r} is no linear layer there; known are {', '.join(known)}")
    names = "|".join(re.escape(target) for target in lora.target_modules)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"{re.escape(prefix)}\.(?:.*\.)?(?:{names})",
    )


def has_lora(model: nn.Module) -> bool:
    """Return whether the model carries adapters."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def merged_weights(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the plain model's weights from those of a model with adapters, as peft's own merge computes them.

    Args:
        model: The model with adapters, of which only names and scalings are read.
        tensors: All weights by name, in float32 (under ZeRO-3 gathered by the caller).
    """
    merged = {plain_name(name): tensor for name, tensor in tensors.items() if "lora_" not in name}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            down_RI = tensors[f"{name}.lora_A.{adapter}.weight"].float()
            up_OR = tensors[f"{name}.lora_B.{adapter}.weight"].float()
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + (up_OR @ down_RI) * module.scaling[adapter]
    return merged
