"""One adapter per model family: where its images are and how its decoder is reached."""

from __future__ import annotations

from torch import nn

from orchestrator.compression.families.base import Family
from orchestrator.errors import UsageError
from orchestrator.registry import load_object

FAMILIES = {
    # model_type: module and class; imported when the first model of that type is attached.
    "llava": "llava:LlavaFamily",
    "llava_next": "llava_next:LlavaNextFamily",
    "granite4_vision": "llava_next:Granite4VisionFamily",
    "llava_next_video": "llava_next:LlavaNextVideoFamily",
    "llava_onevision": "llava_next:LlavaOnevisionFamily",
    "video_llava": "llava:VideoLlavaFamily",
    "vipllava": "llava:LlavaFamily",
    "internvl": "tiles:InternVLFamily",
    "aya_vision": "tiles:AyaVisionFamily",
    "cohere2_vision": "tiles:AyaVisionFamily",
    "ovis2": "tiles:Ovis2Family",
    "got_ocr2": "tiles:GotOcr2Family",
    "pp_chart2table": "tiles:GotOcr2Family",
    "step3p7": "tiles:Step3p7Family",
    "aria": "tiles:AriaFamily",
    "llama4": "tiles:Llama4Family",
    "idefics3": "idefics3:Idefics3Family",
    "smolvlm": "idefics3:Idefics3Family",
    "mistral3": "mistral3:Mistral3Family",
    "lighton_ocr": "mistral3:Mistral3Family",
    "qwen2_vl": "qwen_vl:Qwen2VLFamily",
    "qwen2_5_vl": "qwen_vl:Qwen2VLFamily",
    "qwen3_vl": "qwen_vl:Qwen3VLFamily",
    "qwen3_vl_moe": "qwen_vl:Qwen3VLFamily",
    "qwen3_5": "qwen_vl:Qwen2VLFamily",
    "qwen3_5_moe": "qwen_vl:Qwen2VLFamily",
    "qwen2_5_omni_thinker": "qwen_vl:Qwen2VLFamily",
    "qwen3_omni_moe_thinker": "qwen_vl:Qwen3VLFamily",
    "glm4v": "qwen_vl:Glm4vFamily",
    "glm4v_moe": "qwen_vl:Glm4vFamily",
    "glm46v": "qwen_vl:Glm4vFamily",
    "glm_ocr": "qwen_vl:Glm4vFamily",
    "ernie4_5_vl_moe": "qwen_vl:Ernie45VLFamily",
    "video_llama_3": "video_llama:VideoLlama3Family",
    "lfm2_vl": "lfm2_vl:Lfm2VlFamily",
    "paligemma": "gemma:PaliGemmaFamily",
    "gemma3": "gemma:Gemma3Family",
    "gemma4": "gemma:Gemma4Family",
    "molmo2": "molmo2:Molmo2Family",
    "perception_lm": "perception_lm:PerceptionLMFamily",
}
_GENERIC = "generic:GenericFamily"


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
    found: type[Family] = load_object(f"{__name__}.{FAMILIES.get(model_type, _GENERIC)}")
    return found(model)


__all__ = ["FAMILIES", "Family", "family_of"]
