"""Templates against LLaVA-1.5's own strings, written out by hand, and the tokens that carry the loss."""

import re
from dataclasses import replace

import jinja2
import pytest
from conversations import row_of
from PIL import Image

from orchestrator.data.processing.encode import Encoder
from orchestrator.data.processing.templates import ChatFormat, jinja_of, render
from orchestrator.data.rows import Row, Turn
from orchestrator.errors import DataError, UsageError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TWO_TURNS = row_of("<image>\nWhat is it?", "A red square.", "Sure?", "Yes, sure.", images=("a.png",))


def no_chat(messages, add_generation_prompt):
    raise AssertionError("this template asks for no chat template")


LLAMA = ChatFormat("<image>", "</s>", no_chat)


def spoken(rendered):
    return [rendered.text[first:last] for first, last in rendered.answers]


def test_vicuna_v1_is_llava_15s_prompt():
    rendered = render("vicuna_v1", TWO_TURNS, LLAMA)
    assert rendered.text == (
        SYSTEM + " USER: <image>\nWhat is it? ASSISTANT: A red square.</s>USER: Sure? ASSISTANT: Yes, sure.</s>"
    )
    assert spoken(rendered) == [" A red square.</s>", " Yes, sure.</s>"]


def test_vicuna_v1_prompt_ends_before_the_last_answer():
    rendered = render("vicuna_v1", TWO_TURNS, LLAMA, prompt_only=True)
    assert rendered.text == (SYSTEM + " USER: <image>\nWhat is it? ASSISTANT: A red square.</s>USER: Sure? ASSISTANT:")


@pytest.mark.parametrize(
    "text", ["<image>\nWhat is it?", "What is it?\n<image>", "  What is it? <image>", "<image>What is it?"]
)
def test_vicuna_v1_moves_the_image_to_the_front_as_llava_does(text):
    rendered = render("vicuna_v1", row_of(text, "a", images=("a.png",)), LLAMA)
    assert rendered.text == SYSTEM + " USER: <image>\nWhat is it? ASSISTANT: a</s>"


def test_vicuna_v1_keeps_several_images_in_their_places():
    rendered = render("vicuna_v1", row_of("A <image> B <image> C", "d", images=("a.png", "b.png")), LLAMA)
    assert rendered.text == SYSTEM + " USER: A <image> B <image> C ASSISTANT: d</s>"


def test_vicuna_v1_text_only_and_an_image_alone():
    assert render("vicuna_v1", row_of("Hi", "Yo"), LLAMA).text == SYSTEM + " USER: Hi ASSISTANT: Yo</s>"
    alone = render("vicuna_v1", row_of("<image>", "Yo", images=("a.png",)), LLAMA)
    assert alone.text == SYSTEM + " USER: <image> ASSISTANT: Yo</s>"


def test_plain_is_llavas_pretraining():
    row = row_of("Describe it.\n<image>", "a red square", images=("a.png",))
    rendered = render("plain", row, LLAMA)
    assert rendered.text == "<image>a red square\n" and spoken(rendered) == ["a red square\n"]
    assert render("plain", row, LLAMA, prompt_only=True).text == "<image>"
    with pytest.raises(DataError, match="row 0: plain takes"):
        render("plain", row_of("Hi", "Yo"), LLAMA)


def test_chat_template_of_the_tiny_model(processor):
    rendered = render("chat_template", TWO_TURNS, processor.chat)
    assert rendered.text == (
        "<s>USER: <image>\nWhat is it? ASSISTANT: A red square.</s>USER: Sure? ASSISTANT: Yes, sure.</s>"
    )
    assert spoken(rendered) == [" A red square.</s>", " Yes, sure.</s>"]


def llama_like(messages, add_generation_prompt):
    """The chat template of llava-hf/llava-1.5-7b-hf, as Python: it ends no answer."""
    text = ""
    for message in messages:
        parts = message["content"]
        text += message["role"].upper() + ": " + "<image>\n" * sum(part["type"] == "image" for part in parts)
        text += "".join(part["text"] + " " for part in parts if part["type"] == "text")
    return text + ("ASSISTANT:" if add_generation_prompt else "")


def test_answers_are_found_in_a_template_that_marks_nothing():
    rendered = render("chat_template", TWO_TURNS, ChatFormat("<image>", "</s>", llama_like))
    assert rendered.text == (
        "USER: <image>\nWhat is it? ASSISTANT: A red square. USER: Sure? ASSISTANT: Yes, sure. </s>"
    )
    assert spoken(rendered) == [" A red square. ", " Yes, sure. </s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    def rewrites(messages, add_generation_prompt):
        return f"{len(messages)} turns: " + llama_like(messages, add_generation_prompt)

    with pytest.raises(DataError, match="chat template changes earlier turns"):
        render("chat_template", TWO_TURNS, ChatFormat("<image>", "</s>", rewrites))


WITH_SYSTEM = replace(TWO_TURNS, turns=(Turn("system", " Be a pirate.\n"), *TWO_TURNS.turns))


def as_parts(message):
    """Text of a message in either shape, as the templates of most models write it."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def chatml(messages, add_generation_prompt):
    text = "".join(f"<|{message['role']}|>{as_parts(message)}</s>" for message in messages)
    return text + ("<|assistant|>" if add_generation_prompt else "")


def for_strings(messages, add_generation_prompt):
    """As templates that know no parts do to a system text."""
    first = [dict(message, content=f"{message['content']}") for message in messages if message["role"] == "system"]
    return chatml([*first, *messages[len(first) :]], add_generation_prompt)


def into_the_question(messages, add_generation_prompt):
    """Gemma's: the system text opens the first question."""
    if messages[0]["role"] == "system":
        first, second, *rest = messages
        question = {"role": "user", "content": f"{as_parts(first)}\n\n{as_parts(second)}"}
        messages = [question, *rest]
    return chatml(messages, add_generation_prompt)


def test_vicuna_v1_takes_a_rows_system_text_for_its_own():
    rendered = render("vicuna_v1", WITH_SYSTEM, LLAMA)
    assert rendered.text.startswith("Be a pirate. USER: <image>\nWhat is it? ASSISTANT: A red square.</s>USER: Sure?")
    assert spoken(rendered) == [" A red square.</s>", " Yes, sure.</s>"]
    assert render("vicuna_v1", WITH_SYSTEM, LLAMA, prompt_only=True).text.endswith("USER: Sure? ASSISTANT:")


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        (chatml, "<|system|>Be a pirate.</s><|user|><image>"),
        (for_strings, "<|system|>Be a pirate.</s><|user|><image>"),
        (into_the_question, "<|user|>Be a pirate.\n\n<image>"),
    ],
)
def test_a_chat_template_gets_a_system_message_in_the_shape_it_reads(template, begins):
    chat = ChatFormat("<image>", "</s>", template)
    rendered = render("chat_template", WITH_SYSTEM, chat)
    assert rendered.text.startswith(begins) and "type" not in rendered.text
    assert spoken(rendered) == ["A red square.</s>", "Yes, sure.</s>"]
    prompt = render("chat_template", WITH_SYSTEM, chat, prompt_only=True).text
    assert rendered.text.startswith(prompt) and prompt.startswith(begins)


def refusing(messages, add_generation_prompt):
    if messages[0]["role"] == "system":
        raise jinja2.TemplateError("System role not supported")
    return chatml(messages, add_generation_prompt)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (refusing, "refuses it: System role not supported"),
        (lambda messages, prompt: chatml([m for m in messages if m["role"] != "system"], prompt), "leaves it out"),
        (
            lambda messages, prompt: chatml([{**m, "role": "x"} for m in messages], prompt),
            "takes it for the user's words",
        ),
    ],
)
def test_a_chat_template_without_a_system_turn_is_told(template, reason):
    with pytest.raises(DataError, match=f"row 0: it has a system text, and the model's chat template {reason}"):
        render("chat_template", WITH_SYSTEM, ChatFormat("<image>", "</s>", template))


def test_a_template_for_strings_is_told():
    """It would write Python's form of a list into the prompt."""

    def strings(messages, add_generation_prompt):
        return "".join(f"<|{message['role']}|>{message['content']}</s>" for message in messages)

    chat = ChatFormat("<image>", "</s>", strings)
    for prompt_only in (False, True):
        with pytest.raises(DataError, match="row 0: the model's chat template reads strings"):
            render("chat_template", row_of("Hi", "Yo"), chat, prompt_only)
    # A row that speaks of such lists is text like any other.
    assert (
        "{'type': 'text'"
        in render("chat_template", row_of("{'type': 'text'}", "Yo"), ChatFormat("<image>", "</s>", chatml)).text
    )


def test_the_tiny_models_template_has_no_system_turn(processor):
    with pytest.raises(DataError, match="takes it for the user's words; use conversation_template vicuna_v1"):
        Encoder(processor, "chat_template", 2048).encode(WITH_SYSTEM)
    text = processor.tokenizer.decode(Encoder(processor, "vicuna_v1", 2048).encode(WITH_SYSTEM).input_ids)
    assert text.startswith("<s>Be a pirate. USER: ")


def test_plain_takes_no_system_text():
    with pytest.raises(DataError, match="no system text"):
        render("plain", replace(WITH_SYSTEM, turns=WITH_SYSTEM.turns[:3]), LLAMA)


def test_a_template_that_drops_images_is_refused():
    with pytest.raises(DataError, match="0 image placeholders"):
        render("chat_template", TWO_TURNS, ChatFormat("<image>", "</s>", lambda messages, prompt: "nothing"))


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("vicuna_v1", " A red square.</s> Yes, sure.</s>"),
        ("chat_template", " A red square.</s> Yes, sure.</s>"),
    ],
)
def test_only_the_assistants_tokens_carry_labels(processor, template, wanted):
    sample = Encoder(processor, template, 2048).encode(TWO_TURNS)
    assert processor.tokenizer.decode(sample.labels[sample.labels != -100]) == wanted
    where = sample.labels != -100
    assert (sample.labels[where] == sample.input_ids[where]).all()
    assert (sample.input_ids == processor.image_token_id).sum() == sample.num_visual_tokens == 64


def test_plain_labels_the_caption_and_begins_once(processor):
    row = row_of("<image>", "a red square", images=("a.png",))
    sample = Encoder(processor, "plain", 2048).encode(row)
    assert processor.tokenizer.decode(sample.labels[sample.labels != -100]) == "a red square\n"
    assert (sample.input_ids == processor.tokenizer.bos_token_id).sum() == 1
    assert sample.input_ids[0] == processor.tokenizer.bos_token_id


def test_an_unknown_template_is_refused(processor):
    with pytest.raises(UsageError, match="vicuna_v1"):
        Encoder(processor, "v0", 2048)


@pytest.mark.parametrize("template", ["plain", "vicuna_v1"])
def test_the_chat_template_of_an_export_writes_what_training_rendered(processor, template):
    rows = [row_of("What is it?\n<image>", "A cat", images=("a.png",))]
    if template == "vicuna_v1":
        rows += [
            row_of("<image>\nWho's there?", "Ada", "And here: <image> or <image>?", 'No "one"', images=("a", "b", "c")),
            row_of("Hello {{ x }}", "Hi"),
            Row(0, (), (Turn("system", " Be brief. "), Turn("user", "Why?"), Turn("assistant", "So."))),
        ]
    for row in rows:
        messages = [{"role": turn.role, "content": _content(turn.text)} for turn in row.turns]
        for prompt_only in (False, True):
            text = processor.tokenizer.apply_chat_template(
                messages[: -1 if prompt_only else None],
                chat_template=jinja_of(template, processor.image_token),
                tokenize=False,
                add_generation_prompt=prompt_only,
            )
            assert text == render(template, row, processor.chat, prompt_only).text


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "chat_template"])
def test_an_export_s_chat_template_gives_the_tokens_of_training(processor, template, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    row = row_of("<image>\nWhat is it?", "A cat", images=(str(tmp_path / "a.png"),))
    content = [{"type": "image", "image": Image.open(tmp_path / "a.png")}, {"type": "text", "text": "What is it?"}]
    given = processor.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=jinja_of(template, processor.image_token),
        add_generation_prompt=True, tokenize=True, return_dict=True,
    )  # fmt: skip
    assert given["input_ids"][0] == Encoder(processor, template, 2048).encode_prompt(row).input_ids.tolist()


def _content(text):
    pieces = [piece for piece in re.split("(<image>)", text) if piece]
    return [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces]


def test_the_tokenizer_s_own_template_is_not_written_anew():
    assert jinja_of("chat_template", "<image>") is None
