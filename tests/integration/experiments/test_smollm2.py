"""SmolLM2 behind the tiny tower: its configs fit together, and it is asked what must be seen."""

import json
import runpy

import pytest
from repository import ROOT

from orchestrator import plugin
from orchestrator.data.rows import open_data_set
from orchestrator.spec.loader import load_experiment

EXPERIMENTS = ROOT / "experiments"


def test_the_llava_is_its_language_model_behind_the_tiny_tower():
    """The script writes these configs beside weights that do not come with the repository."""
    smollm2 = EXPERIMENTS / "smollm2" / "models"
    text = json.loads((smollm2 / "smollm2-135m" / "config.json").read_text())
    llava = json.loads((smollm2 / "llava" / "config.json").read_text())
    tower = json.loads((EXPERIMENTS / "models" / "tiny-llava-trained" / "config.json").read_text())
    assert llava["vision_config"] == tower["vision_config"]
    del text["transformers_version"]
    assert llava["text_config"] == {**text, "vocab_size": text["vocab_size"] + 1}
    assert llava["image_token_index"] == text["vocab_size"]  # the one token more
    assert llava["tie_word_embeddings"] and text["tie_word_embeddings"]


@pytest.mark.slow
def test_it_is_asked_what_must_be_seen():
    """For the colour and for the shape, once each, together or apart; no question tells an answer."""
    file = EXPERIMENTS / "smollm2" / "open_questions.py"
    plugin.check_data(str(file))
    spec = load_experiment(EXPERIMENTS / "smollm2" / "redundancy.yaml").spec
    rows = {name: open_data_set(data).rows() for name, data in spec.data.items()}
    asked = [[turn.text for turn in row.turns if turn.role == "user"] for row in (*rows["train"], *rows["test"])]
    assert {len(texts) for texts in asked} == {1, 2} and all(text.count("<image>") == 1 for text, *_ in asked)
    words = {turn.text for row in rows["train"] for turn in row.turns if turn.role == "assistant"}
    assert len(words) == 11 and not any(word in text for word in words for texts in asked for text in texts)
    assert {row.answer_type for row in rows["test"]} == {"color", "shape"}


def test_the_chat_template_marks_the_answer_and_its_end():
    from transformers.utils.chat_template_utils import render_jinja_template

    template = runpy.run_path(str(EXPERIMENTS / "smollm2" / "make_smollm2.py"))["CHAT_TEMPLATE"]
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is it?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    prompt, _ = render_jinja_template(conversations=[[question]], chat_template=template, add_generation_prompt=True)
    (text,), ((found,),) = render_jinja_template(
        conversations=[[question, answer]], chat_template=template, return_assistant_tokens_mask=True
    )
    assert prompt == ["<|im_start|>user\n<image>\nwhat color is it?<|im_end|>\n<|im_start|>assistant\n"]
    assert text.startswith(prompt[0]) and text[slice(*found)] == "red<|im_end|>"
