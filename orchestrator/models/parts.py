"""Parts of a vision-language model: the part of a parameter, what trains, at which learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from orchestrator.errors import UsageError

VISION_TOWER, PROJECTOR, LANGUAGE_MODEL, COMPRESSOR = "vision_tower", "projector", "language_model", "compressor"
PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL, COMPRESSOR)
AUDIO_TOWER = "audio_tower"
"""No part that trains: no data kind brings sound."""

# First match wins; names are those of transformers' own vision-language models. A merger inside the vision module
# (Qwen-VL) is what LLaVA calls the projector.
_PATTERNS = tuple(
    (part, re.compile(rf"(?:^|\.)(?:{names})(?:\.|$)"))
    for part, names in (
        (COMPRESSOR, "llavolta_compressors"),
        (
            PROJECTOR,
            "multi_modal_projector|projector|layerwise_projectors|spatial_projectors|connector|merger|"
            "deepstack_merger_list|image_newline|aligner|embed_vision|visual_embeddings_table|vision_projection|"
            "resampler_model",
        ),
        (AUDIO_TOWER, "audio_tower|embed_audio"),
        (VISION_TOWER, "vision_tower|visual|vision_model|image_tower|video_tower|vision_encoder"),
        (LANGUAGE_MODEL, "language_model|text_model|lm_head"),
    )
)


def part_of(parameter_name: str) -> str:
    """Return the part a parameter belongs to: `vision_tower`, `projector`, `language_model` (with its head),
    `compressor` or `audio_tower`.

    Raises:
        UsageError: the name matches no part; the model's family is unknown.
    """
    for part, pattern in _PATTERNS:
        if pattern.search(parameter_name):
            return part
    raise UsageError(
        f"the parameter {parameter_name!r} belongs to no known part of a vision-language model "
        f"({', '.join(PARTS)}); this model family needs an entry in orchestrator/models/parts.py"
    )


def part_module(model: nn.Module, part: str) -> tuple[str, nn.Module]:
    """Return the name and module of a part, e.g. `("model.vision_tower", CLIPVisionModel)`.

    Raises:
        UsageError: the model has no such part.
    """
    for name, module in model.named_modules():
        if name and not name.endswith("lm_head") and part_of_or_none(name) == part:
            return name, module
    raise UsageError(f"{type(model).__name__} has no module that is its {part}")


def part_of_or_none(name: str) -> str | None:
    """Return `part_of`, or None where the name matches no part."""
    return next((part for part, pattern in _PATTERNS if pattern.search(name)), None)


def plain_name(name: str) -> str:
    """Return the name in the plain model of a weight beside a LoRA adapter."""
    return name.replace(".base_layer.", ".")


def set_trainable(model: nn.Module, train: Sequence[str], lora: bool) -> None:
    """Freeze every parameter outside the parts in `train`.

    With LoRA only the adapters of the language model train, never its own weights. Compressors may be the only part
    that trains, and need not be attached yet.

    Raises:
        UsageError: a part in `train` has no parameters, or nothing would train.
    """
    counts = dict.fromkeys(train, 0)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = part in counts and (not lora or part != LANGUAGE_MODEL or "lora_" in name)
        parameter.requires_grad_(trains)
        if trains:
            counts[part] += 1
    empty = [part for part, count in counts.items() if not count and part != COMPRESSOR]
    if empty or not counts:
        raise UsageError(f"train: {', '.join(empty) or 'nothing'} has no parameters in {type(model).__name__}")


def parameter_groups(
    model: nn.Module, learning_rate: float | Mapping[Any, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the optimizer groups, one per part and decay, in a fixed order; biases and norms do not decay, as in HF's
    Trainer.

    Args:
        model: Its parameters that require a gradient are grouped.
        learning_rate: One rate for all parts, or rates by part.
        weight_decay: AdamW's weight decay.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`.

    Raises:
        UsageError: a part trains and has no learning rate.
    """
    without_decay = set(names_without_decay(model))
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), name not in without_decay), []).append(parameter)
    found = []
    for part in PARTS:
        for decays in (True, False):
            if parameters := groups.get((part, decays)):
                found.append(
                    {
                        "params": parameters,
                        "lr": rate_of(learning_rate, part),
                        "weight_decay": weight_decay if decays else 0.0,
                        "name": f"{part}{'' if decays else '.no_decay'}",
                    }
                )
    return found


def rate_of(learning_rate: float | Mapping[Any, float], part: str) -> float:
    """Return the learning rate of a part.

    Raises:
        UsageError: rates are given by part, and this part has none.
    """
    if not isinstance(learning_rate, Mapping):
        return learning_rate
    if part not in learning_rate:
        raise UsageError(f"learning_rate: the part {part} trains and has none; given are {', '.join(learning_rate)}")
    return learning_rate[part]


def names_without_decay(model: nn.Module) -> Iterator[str]:
    """Return the names of parameters without weight decay: biases and norms, as in HF's Trainer."""
    for prefix, module in model.named_modules():
        is_norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")
        for name, _ in module.named_parameters(recurse=False):
            if is_norm or name.endswith("bias"):
                yield f"{prefix}.{name}" if prefix else name
