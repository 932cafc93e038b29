"""Model folders of every family as the hub has them, tiny: config, tokenizer, image processor, chat template."""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repository import MODELS
from transformers import PreTrainedTokenizerFast, VideoLlavaImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from orchestrator.compression.testing.families import TINY

SQUARE = {"height": 24, "width": 24}
PINPOINTS = [[24, 48], [48, 24], [48, 48]]
_TEMPLATE = (
    "{%- for message in messages %}{{ '[' ~ message['role'] ~ '] ' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{%- endfor %}{% endif %}{{ eos_token ~ '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@dataclass(frozen=True)
class Folder:
    """What a family's folder holds.

    Attributes:
        processor: Name of its processor's class.
        image_processor: Small images.
        tokens: The tokenizer's named tokens; `image` ones stand in texts.
        settings: Further values of its processor.
        visual: The token that stands once for every visual token.
        image: An image in the chat template; None for a model without a template.
        more: Further special tokens.
        videos: Settings of its video processor; None for a folder that reads images alone.
    """

    processor: str
    image_processor: Any
    tokens: dict[str, str] = field(default_factory=lambda: {"image_token": "<image>"})
    settings: dict[str, Any] = field(default_factory=dict)
    visual: str = "<image>"
    image: str | None = "<image>"
    more: tuple[str, ...] = ()
    videos: dict[str, Any] | None = None


_CROPPED = {"size": {"shortest_edge": 24}, "crop_size": SQUARE, "do_center_crop": True}
_CLIP = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>")
_TILES = (
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


def _clip() -> Any:
    return CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_center_crop=False)


def _qwen(processor: str) -> Folder:
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 128, "longest_edge": 1024}
    )
    wrapped = f"{_QWEN_MARKS[0]}<|image_pad|>{_QWEN_MARKS[1]}"
    videos = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "cap_pixels_per_frame": False}
    videos |= {"size": {"shortest_edge": 128, "longest_edge": 4096}}
    return Folder(processor, images, _QWEN, {}, "<|image_pad|>", wrapped, _QWEN_MARKS, videos)


def _tiled(processor: str, image_processor: Any) -> Folder:
    images = image_processor(size={"longest_edge": 54}, max_image_size={"longest_edge": 18})
    return Folder(processor, images, settings={"image_seq_len": 9}, more=_TILES)


_LARGER = [[32, 64], [64, 32], [64, 64]]
_LARGE = {"height": 32, "width": 32}
# Beside FOLDERS, whose families are tried on images.
_OF_VIDEOS = {
    "llava_next_video": lambda: Folder(
        "LlavaNextVideoProcessor",
        LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=_LARGE, image_grid_pinpoints=_LARGER),
        {"image_token": "<image>", "video_token": "<video>"},
        _CLIP,
        videos={"size": {"shortest_edge": 32}, "crop_size": _LARGE, "do_center_crop": True},
    ),
}
FOLDERS = {
    "llava": lambda: Folder("LlavaProcessor", _clip(), settings=_CLIP),
    "vipllava": lambda: Folder("LlavaProcessor", _clip(), settings=_CLIP),
    "llava_next": lambda: Folder(
        "LlavaNextProcessor",
        LlavaNextImageProcessorPil(size={"shortest_edge": 24}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS),
        settings=_CLIP,
    ),
    "llava_onevision": lambda: Folder(
        "LlavaOnevisionProcessor",
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        {"image_token": "<image>", "video_token": "<video>"},
        {"num_image_tokens": 9, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"},
        videos={"size": SQUARE},
    ),
    "video_llava": lambda: Folder(
        "VideoLlavaProcessor",
        VideoLlavaImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE),
        {"image_token": "<image>", "video_token": "<video>"},
        _CLIP,
        videos=_CROPPED,
    ),
    "internvl": lambda: Folder(
        "InternVLProcessor",
        GotOcr2ImageProcessorPil(size={"height": 18, "width": 18}, min_patches=1, max_patches=4, crop_to_patches=True),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_seq_length": 9},
        "<IMG_CONTEXT>",
        "<IMG_CONTEXT>\n",
    ),
    "idefics3": lambda: _tiled("Idefics3Processor", Idefics3ImageProcessorPil),
    "smolvlm": lambda: _tiled("SmolVLMProcessor", SmolVLMImageProcessorPil),
    "mistral3": lambda: Folder(
        "PixtralProcessor",
        PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8}),
        {"image_token": "[IMG]"},
        {"patch_size": 4, "spatial_merge_size": 2, "image_token": "[IMG]"},
        "[IMG]",
        "[IMG]",
        ("[IMG_BREAK]", "[IMG_END]"),
    ),
    "qwen2_vl": lambda: _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": lambda: _qwen("Qwen3VLProcessor"),
    "qwen3_vl_moe": lambda: _qwen("Qwen3VLProcessor"),
    "paligemma": lambda: Folder(
        "PaliGemmaProcessor", SiglipImageProcessorPil(size=SQUARE, image_seq_length=9), image=None
    ),
    "gemma3": lambda: Folder(
        "Gemma3Processor",
        Gemma3ImageProcessorPil(size={"height": 48, "width": 48}),
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        {"image_seq_length": 9},
        "<image_soft_token>",
        "<start_of_image>",
    ),
}


def write_folder(family: str, folder: Path) -> Path:
    """Writes a family's folder, without weights."""
    holds = (FOLDERS | _OF_VIDEOS)[family]()
    base = runpy.run_path(str(MODELS / "make_tiny_llava.py"))["make_tokenizer"]()
    base.add_special_tokens({"additional_special_tokens": [*holds.tokens.values(), *holds.more]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=holds.tokens,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    holds.image_processor.save_pretrained(folder)
    settings = {"processor_class": holds.processor, **holds.settings}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    if holds.image is not None:
        video = holds.image.replace(holds.visual, holds.tokens.get("video_token", ""))
        template = _TEMPLATE.replace("IMAGE", json.dumps(holds.image)[1:-1]).replace("VIDEO", json.dumps(video)[1:-1])
        (folder / "chat_template.jinja").write_text(template)
    if holds.videos is not None:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(holds.videos))
    config = TINY[family].build("eager", 0).config
    if family in _OF_VIDEOS:  # frames of 4 x 4 patches, which two by two pool without a rest
        config.vision_config.image_size, config.image_grid_pinpoints = 32, _LARGER
    ids = {name.removesuffix("_token"): token for name, token in holds.tokens.items()} | {"image": holds.visual}
    for name, token in ids.items():
        for attribute in (f"{name}_token_id", f"{name}_token_index"):
            if getattr(config, attribute, None) is not None:
                setattr(config, attribute, tokenizer.convert_tokens_to_ids(token))
    for part in (config, config.get_text_config()):
        part.vocab_size = len(tokenizer) + 1100  # PaliGemma's processor adds its own
        part.pad_token_id, part.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        part.bos_token_id = tokenizer.bos_token_id
    config.save_pretrained(folder)
    return folder
