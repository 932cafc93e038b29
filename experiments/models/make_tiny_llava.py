"""Writes config, tokenizer, processor and chat template of two LLaVAs for easy-VQA and one for digit_grid, no weights.

Run it as `python experiments/models/make_tiny_llava.py`; it overwrites tiny-llava, tiny-llava-16 and tiny-llava-digits
beside it with the same bytes; the first two differ in their number of decoder layers alone.
The shapes: 64x64 pixels in patches of 8 give 64 visual tokens; width 64 everywhere; one vision layer that runs
(`vision_feature_layer: -1`; LLaVA's -2 would hold one more that never runs) and four or 16 decoder layers.
For digit_grid 32x32 pixels give 16 tokens: a patch is one digit as the data set has it, so that no picture is resized
and two tokens averaged are two digits mixed. Its tokenizer knows its questions' words: 10 tokens for one of place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import easy_vqa
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

FOLDER = Path(__file__).parent
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
VOCABULARY = 256
IMAGE_PIXELS = 64
PATCH_PIXELS = 8
WIDTH = 64

# LLaVA's own turn format; `generation` marks what the assistant says, so that the loss can be put there.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- 'ASSISTANT:' }}{% generation %}"
    "{{- ' ' }}{% if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{% for part in message['content'] %}{{- part['text'] }}{% endfor %}{% endif %}"
    "{{- eos_token }}{% endgeneration %}"
    "{%- else %}"
    "{{- 'USER: ' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{% for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<image>\\n' }}{% else %}{{- part['text'] }}{% endif %}"
    "{%- endfor %}{% endif %}{{- ' ' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif %}"
)


def easy_vqa_texts() -> list[str]:
    """Return the questions and answers that LLaVAs for easy-VQA read."""
    questions, answers, _ = easy_vqa.get_train_questions()
    return [f"USER: \n{q} ASSISTANT: {a}" for q, a in zip(questions, answers, strict=True)]


def digit_grid_texts() -> list[str]:
    """Return the questions and answers about grids of 4x4 digits."""
    digits, places = range(10), range(1, 5)
    asked = [(f"What digit is in row {r}, column {c}?", d) for r, c, d in product(places, places, digits)]
    asked += [(f"How many {digit}s are there?", number) for digit, number in product(digits, range(5))]
    asked += [(f"Is there a{'n' * (d == 8)} {d}?", answer) for d, answer in product(digits, ("yes", "no"))]
    return [f"USER: \n{question} ASSISTANT: {answer}" for question, answer in asked]


def make_tokenizer(
    texts: Sequence[str] | None = None, named: Sequence[str] = ("image",), template: str = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE over printable ASCII: any such text survives a round trip, the rest becomes `<unk>`.

    Args:
        texts: What it is trained on; None for easy-VQA's.
        named: Placeholders, `<image>` the first.
        template: The chat template.
    """
    special_tokens = [*SPECIAL_TOKENS, *(f"<{name}>" for name in named[1:])]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Byte-level BPE writes a space and a line end as these two letters.
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(easy_vqa_texts() if texts is None else texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={f"{name}_token": f"<{name}>" for name in named},
        model_max_length=2048,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def make_config(tokenizer: PreTrainedTokenizerFast, layers: int = 4, pixels: int = IMAGE_PIXELS) -> LlavaConfig:
    """Return shapes. At width 64 an initialisation of 0.02 leaves the layers nearly silent: learning starts late."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=pixels,
        patch_size=PATCH_PIXELS,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.14,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(pixels // PATCH_PIXELS) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        architectures=["LlavaForConditionalGeneration"],
    )


def write(folder: Path, texts: Sequence[str], **shape: Any) -> None:
    """Write one model's folder; the shape is `make_config`'s."""
    tokenizer = make_tokenizer(texts)
    config = make_config(tokenizer, **shape)
    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    config.save_pretrained(folder)


def main(folder: Path = FOLDER) -> None:
    """Write the three model folders into a folder."""
    write(folder / "tiny-llava", easy_vqa_texts())
    write(folder / "tiny-llava-16", easy_vqa_texts(), layers=16)
    write(folder / "tiny-llava-digits", digit_grid_texts(), pixels=32)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
