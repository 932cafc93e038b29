"""One adapter per model family: where its images are and how its decoder is reached."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from torch import nn

from orchestrator.compression.families.base import Family
from orchestrator.errors import UsageError

# model_type: module and class; imported when the first model of that type is attached.
_CLASSES = {
    "llava": "llava:LlavaFamily",
    "llava_next": "llava_next:LlavaNextFamily",
    "llava_onevision": "llava_onevision:LlavaOnevisionFamily",
    "video_llava": "video_llava:VideoLlavaFamily",
    "vipllava": "vipllava:VipLlavaFamily",
    "internvl": "internvl:InternVLFamily",
    "idefics3": "idefics3:Idefics3Family",
    "smolvlm": "idefics3:Idefics3Family",
    "mistral3": "mistral3:Mistral3Family",
    "qwen2_vl": "qwen2_vl:Qwen2VLFamily",
    "qwen2_5_vl": "qwen2_5_vl:Qwen25VLFamily",
    "qwen3_vl": "qwen3_vl:Qwen3VLFamily",
    "qwen3_vl_moe": "qwen3_vl:Qwen3VLFamily",
    "paligemma": "paligemma:PaliGemmaFamily",
    "gemma3": "gemma3:Gemma3Family",
}
_GENERIC = "generic:GenericFamily"


class _Families(Mapping[str, type[Family]]):
    """Adapters by `model_type`."""

    def __getitem__(self, model_type: str) -> type[Family]:
        return _load(_CLASSES[model_type])

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


FAMILIES: Mapping[str, type[Family]] = _Families()


def _load(place: str) -> type[Family]:
    module, _, name = place.partition(":")
    found: type[Family] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found


def family_of(model: nn.Module) -> Family:
    """Return the adapter of a model; a model of no known family gets the generic one.

    Args:
        model: A Hugging Face image-text-to-text model, unwrapped.

    Raises:
        UsageError: the model lacks a part the mechanism needs; the message names it.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UsageError(
            f"attach: {type(model).__name__} is no Hugging Face model (it has no config.model_type); known families: "
            f"{', '.join(FAMILIES)}, and others whose decoder is a list of layers"
        )
    return _load(_CLASSES.get(model_type, _GENERIC))(model)


__all__ = ["FAMILIES", "Family", "family_of"]
