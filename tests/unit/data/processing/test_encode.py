"""Encoding: placeholders, the length limit, odd text, and tokenizers that join blanks to words."""

import numpy as np
import pytest
from conversations import row_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from orchestrator.data.processing.encode import Encoder
from orchestrator.data.processing.processor import VisionTextProcessor
from orchestrator.errors import DataError


def test_a_prompt_is_the_beginning_of_its_row(processor):
    for template in ("chat_template", "vicuna_v1"):
        encoder = Encoder(processor, template, 2048)
        row = row_of("<image>\nwhat is the red shape?", "circle", images=("a.png",))
        whole, prompt = encoder.encode(row), encoder.encode_prompt(row)
        assert (whole.input_ids[: len(prompt)] == prompt.input_ids).all()
        assert (prompt.labels == -100).all()
        rest = whole.input_ids[len(prompt) :]
        assert processor.tokenizer.convert_ids_to_tokens(rest) == ["Ġcircle", "</s>"]
        assert (whole.labels[len(prompt) :] == rest).all()


def test_several_images_anywhere(processor):
    row = row_of("A <image> B <image>", "two", "and <image>?", "three", images=("a", "b", "c"))
    sample = Encoder(processor, "chat_template", 2048).encode(row)
    blocks = np.flatnonzero(np.diff(np.concatenate([[0], sample.input_ids == processor.image_token_id, [0]])))
    assert (blocks[1::2] - blocks[::2]).tolist() == [64, 64, 64]
    assert [image.path for image in sample.images] == ["a", "b", "c"] and sample.num_visual_tokens == 192


@settings(deadline=None, max_examples=150)
@given(limit=st.integers(65, 260))
def test_the_limit_never_cuts_an_image(processor, limit):
    row = row_of("<image> x <image>", "first answer", "<image>?", "second answer", images=("a", "b", "c"))
    whole = Encoder(processor, "chat_template", 2048).encode(row)
    sample = Encoder(processor, "chat_template", limit).encode(row)
    assert len(sample) <= limit
    assert (sample.input_ids == whole.input_ids[: len(sample)]).all()
    assert (sample.labels == whole.labels[: len(sample)]).all()
    visual = int((sample.input_ids == processor.image_token_id).sum())
    assert visual == 64 * len(sample.images) == sample.num_visual_tokens
    if len(sample) < min(limit, len(whole)):
        assert whole.input_ids[len(sample)] == processor.image_token_id, "it ends early only before an image"


def test_an_image_longer_than_the_limit_is_a_fault(processor):
    row = row_of("<image>", "an answer", images=("a",), index=17)
    with pytest.raises(DataError, match="row 17: an image of 64 tokens, model_max_length is 64"):
        Encoder(processor, "chat_template", 64).encode(row)


def test_a_prompt_is_never_cut(processor):
    with pytest.raises(DataError, match="row 3: the prompt has"):
        Encoder(processor, "chat_template", 70).encode_prompt(row_of("<image> why?", "a", images=("a",), index=3))


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60), st.text(min_size=1, max_size=60).filter(str.strip))
def test_any_text_is_encoded(processor, question, answer):
    if "<image>" in question + answer:
        return
    sample = Encoder(processor, "vicuna_v1", 2048).encode(row_of(question, answer))
    assert (sample.labels != -100).any() and len(sample.input_ids) == len(sample.labels)


def test_a_blank_joined_to_a_word_belongs_to_the_answer(processor):
    """As Llama's tokenizer does it: `▁circle` begins at the blank after `ASSISTANT:`."""
    words = ["<unk>", "<s>", "</s>", "<image>", "▁USER", ":", "▁what", "?", "▁ASSISTANT", "▁circle", "USER", "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(":", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never", split=True)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<image>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    other = VisionTextProcessor(
        LlavaProcessor(
            processor.processor.image_processor,
            fast,
            patch_size=8,
            num_additional_image_tokens=1,
            vision_feature_select_strategy="default",
        )
    )
    sample = Encoder(other, "vicuna_v1", 2048).encode(row_of("what", "circle"))
    kept = sample.labels[sample.labels != -100]
    assert fast.convert_ids_to_tokens(kept) == ["▁circle", "</s>"]
    assert (sample.input_ids == 2).sum() == 1, "the end token that this tokenizer adds by itself is left out"


def test_repeated_texts_are_tokenised_once(processor):
    encoder = Encoder(processor, "chat_template", 2048)
    one = encoder.encode(row_of("<image>\nis it red?", "yes", images=("a",), index=1))
    two = encoder.encode(row_of("<image>\nis it red?", "yes", images=("b",), index=2))
    assert one.input_ids is two.input_ids and two.images[0].path == "b"
