"""Writes config, tokenizer, processor and chat template of a LLaVA-OneVision for moving_shapes, no weights.

Run it as `python experiments/models/make_tiny_onevision.py`; it overwrites tiny-onevision beside it with the same
bytes.
The shapes: frames of 64x64 pixels in patches of 16 give 16 tokens, pooled to 4 a frame; width 64 everywhere; one vision
layer and four decoder layers, as in tiny-llava.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from orchestrator_plugins.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

FOLDER = Path(__file__).parent
TINY_LLAVA: dict[str, Any] = runpy.run_path(str(FOLDER / "make_tiny_llava.py"))
PIXELS, WIDTH = TINY_LLAVA["IMAGE_PIXELS"], TINY_LLAVA["WIDTH"]
PATCH_PIXELS = 16
SIZE = {"height": PIXELS, "width": PIXELS}
PIXEL_SETTINGS = {"size": SIZE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
CHAT_TEMPLATE = TINY_LLAVA["CHAT_TEMPLATE"].replace(
    "{%- if part['type'] == 'image' %}{{- '<image>\\n' }}",
    "{%- if part['type'] in ('image', 'video') %}{{- '<' ~ part['type'] ~ '>\\n' }}",
)


def make_tokenizer() -> Any:
    """Return tiny-llava's kind of tokenizer, trained on the questions of moving_shapes."""
    texts = [
        f"USER: \nWhich way does the {colour} {shape} move? ASSISTANT: {direction}"
        for colour in COLOURS
        for shape in SHAPES
        for direction in DIRECTIONS
    ]
    return TINY_LLAVA["make_tokenizer"](texts, ("image", "video"), CHAT_TEMPLATE)


def make_config(tokenizer: Any) -> LlavaOnevisionConfig:
    """Return shapes; the initialisation of the decoder is tiny-llava's."""
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=PATCH_PIXELS,
        vision_use_head=False,  # its pooling is not used
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.14,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[PIXELS, PIXELS]],
        architectures=["LlavaOnevisionForConditionalGeneration"],
        tie_word_embeddings=False,
    )


def processor_settings() -> dict[str, Any]:
    """Return the settings of the processor. Plain values: its video processor needs torchvision to be built."""
    images = LlavaOnevisionImageProcessorPil(**PIXEL_SETTINGS, image_grid_pinpoints=[[PIXELS, PIXELS]]).to_dict()
    videos = {**PIXEL_SETTINGS, "video_processor_type": "LlavaOnevisionVideoProcessor"}
    return {
        "image_processor": images,
        "image_token": "<image>",
        "num_image_tokens": (PIXELS // PATCH_PIXELS) ** 2,
        "processor_class": "LlavaOnevisionProcessor",
        "video_processor": videos,
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
    }


def main(folder: Path = FOLDER) -> None:
    """Write the model folder into a folder."""
    tokenizer, own = make_tokenizer(), folder / "tiny-onevision"
    own.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(own)
    (own / "processor_config.json").write_text(json.dumps(processor_settings(), indent=2, sort_keys=True) + "\n")
    make_config(tokenizer).save_pretrained(own)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
