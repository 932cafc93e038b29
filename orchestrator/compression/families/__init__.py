"""One adapter per model family: where its images are and how its decoder is reached."""

from __future__ import annotations

from torch import nn

from orchestrator.compression.families.base import Family
from orchestrator.compression.families.llava import LlavaFamily
from orchestrator.errors import UsageError

FAMILIES: dict[str, type[Family]] = {"llava": LlavaFamily}


def family_of(model: nn.Module) -> Family:
    """The adapter of a model.

    Args:
        model: A Hugging Face image-text-to-text model, unwrapped.

    Raises:
        UsageError: its type has no adapter, or the model lacks a part the mechanism needs.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise UsageError(
            f"attach: no adapter for {type(model).__name__} (model_type {model_type!r}); known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type](model)


__all__ = ["FAMILIES", "Family", "family_of"]
